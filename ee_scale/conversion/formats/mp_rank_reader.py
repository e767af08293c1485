"""Read Megatron's files per rank, of either kind of classes (see `mp_rank`), with or without EE-LLM's exits."""

import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ee_scale.conversion.args import check_agrees, to_config
from ee_scale.conversion.folders import hugging_face_part
from ee_scale.conversion.formats.ee_llm import numbers_in_file, spec_of_args
from ee_scale.conversion.formats.mp_rank import FILE, MegatronLayout, check_layout, hosted_exits, rank_pieces
from ee_scale.conversion.model import Model, Opened, check_whole, check_words
from ee_scale.conversion.target_files import tensor_extent
from ee_scale.conversion.tensors import Stored
from ee_scale.conversion.unpickle import load_safely, reads_strangers
from ee_scale.errors import UserError
from ee_scale.families.megatron import EMBEDDING

LAYER = re.compile(r"(?:decoder|language_model\.encoder)\.layers\.(\d+)\.(.*)")
WORDS = re.compile(r"(word_embeddings|output_layer|word_embeddings_for_head|exit_output_layer\.\d+)\.weight$")
FOLDER = re.compile(r"mp_rank_(\d\d)(?:_(\d\d\d))?(_\d\d\d)?")
OLD_NAMES = (  # before September 2023, and before 2021
    ("language_model.transformer.", "language_model.encoder."),
    (".attention.", ".self_attention."),
    (".input_layernorm.", ".input_norm."),
    (".post_attention_layernorm.", ".post_attention_norm."),
    (".final_layernorm.", ".final_norm."),
)
IGNORED = ("_extra_state", "inv_freq")


@reads_strangers
def open_folder(folder: Path, iteration: Path, model_folder: Path | None, trust: bool) -> Opened:
    """Every rank's file of an iteration. `model_folder`: Hugging Face folder of the same model. Raises `UserError`."""
    files = _rank_files(iteration)
    tp, pp = (max(place[axis] for place in files) + 1 for axis in (0, 1))
    contents = {}
    for place in ((t, p) for t in range(tp) for p in range(pp)):
        if place not in files:
            raise UserError(f"{iteration}: mp_rank_{place[0]:02d}_{place[1]:03d} is missing of tp={tp} x pp={pp}")
        with FakeTensorMode():
            contents[place] = load_safely(files[place], files[place], trust=trust)
        if not isinstance(contents[place], dict) or "args" not in contents[place]:
            raise UserError(f"{files[place]}: no dict with 'args' in it; not a checkpoint of Megatron-LM")
    args = contents[0, 0]["args"]
    _check_args(args, contents[0, 0], iteration, tp, pp)
    tensors = {place: _chunks(content, files[place]) for place, content in contents.items()}
    small, config = hugging_face_part(folder, model_folder)
    if config is None:
        config = to_config(args, None)
    else:
        check_agrees(args, config, small)
    first, notes = tensors[0, 0][0], []
    legacy = any(key.startswith("language_model.") for key in first)
    embedding = first.get("language_model.embedding.word_embeddings.weight" if legacy else EMBEDDING.core)
    if embedding is None:
        raise UserError(f"{files[0, 0]}: no word embeddings in it; keys start with {next(iter(first), 'nothing')!r}")
    check_words(iteration, config, args, _word_rows(tensors))
    spec = spec_of_args(args, config)
    model = Model(config, spec, embedding.dtype, embedding.shape[0] * tp)
    layout = MegatronLayout(
        tp,
        pp,
        _counts(iteration, tensors, args, model.map.shape.num_layers),
        chunks=len(tensors[0, 0]),
        classes="legacy" if legacy else "core",
        spec="local" if any(map(_is_local, tensors.values())) else "te",
        exit_numbers=tuple(numbers_in_file(args)),
        shift=int(bool(getattr(args, "pre_exit", False))),
    )
    check_layout(model, layout)
    stored = []
    for (rank, stage), chunks in tensors.items():
        for chunk, found in enumerate(chunks):
            stored += _match(model, layout, (rank, stage, chunk), files[rank, stage], found)
    if legacy and getattr(args, "rotary_base", 10000) != 10000:
        notes.append(f"args.rotary_base={args.rotary_base}: the old classes ignore it and compute with 10000")
    return Opened("megatron_legacy", folder, model, stored, args=args, small=small, notes=notes)


def _rank_files(iteration: Path) -> dict[tuple[int, int], Path]:
    found = {}
    for path in sorted(iteration.iterdir()):
        if match := FOLDER.fullmatch(path.name):
            if match[3]:
                raise UserError(f"{path}: a third index (experts); models with experts cannot be converted")
            if not (path / FILE).is_file():
                raise UserError(f"{path / FILE}: missing")
            found[int(match[1]), int(match[2] or 0)] = path / FILE
    if not found:
        raise UserError(f"{iteration}: no folder called mp_rank_00 or mp_rank_00_000 in it")
    return found


def _check_args(args: Namespace, content: dict[str, Any], iteration: Path, tp: int, pp: int) -> None:
    for name, size in (("tensor", tp), ("pipeline", pp)):
        told = getattr(args, f"{name}_model_parallel_size", size)
        if told != size:
            raise UserError(f"{iteration}: args say {name}_model_parallel_size={told}, but files for {size} are there")
    if (number := content.get("checkpoint_version", 0)) < 2.0:
        raise UserError(
            f"{iteration}: checkpoint_version={number}: written before 2021 with another order of attention rows; "
            "load and save it with Megatron-LM once"
        )


def _chunks(content: dict[str, Any], path: Path) -> list[dict[str, torch.Tensor]]:
    """Flat tensors of each virtual chunk of a rank."""
    virtual = sorted((key for key in content if re.fullmatch(r"model\d+", key)), key=lambda key: int(key[5:]))
    names = ["model"] if "model" in content else virtual
    if not names:
        raise UserError(f"{path}: no 'model' in it")
    return [_flat(content[name]) for name in names]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor) and not key.endswith(IGNORED):
            found[_modern(f"{prefix}{key}")] = value
    return found


def _modern(key: str) -> str:
    key = key.removeprefix("module.")
    if key.startswith("language_model."):
        for old, new in OLD_NAMES:
            key = key.replace(old, new)
    return key


def _word_rows(tensors: Mapping[tuple[int, int], list[dict[str, torch.Tensor]]]) -> list[tuple[str, list[int]]]:
    """(key, rows on each tensor rank) of every vocabulary matrix of every stage, the embedding's first."""
    found: dict[tuple[int, int, str], list[int]] = {}
    for (_, stage), chunks in sorted(tensors.items(), key=lambda item: item[0][::-1]):
        for number, chunk in enumerate(chunks):
            for key, tensor in chunk.items():
                if WORDS.search(key):
                    found.setdefault((stage, number, key), []).append(tensor.shape[0])
    return [(key, rows) for (*_, key), rows in found.items()]


def _is_local(chunks: list[dict[str, torch.Tensor]]) -> bool:
    return any(key.endswith("pre_mlp_layernorm.weight") for found in chunks for key in found)


def _counts(iteration: Path, tensors: Mapping[Any, list], args: Namespace, num_layers: int) -> tuple[int, ...]:
    """Layers of each chunk as the files of the first tensor rank have them, in the order of `MegatronLayout.counts`."""
    stages = [chunks for (rank, _), chunks in sorted(tensors.items(), key=lambda item: item[0]) if rank == 0]
    if len({len(chunks) for chunks in stages}) > 1:
        raise UserError(f"{iteration}: stages with {sorted({len(chunks) for chunks in stages})} virtual stages in one")
    counts = []
    for found in (chunks[number] for number in range(len(stages[0])) for chunks in stages):
        layers = [int(match[1]) for key in found if (match := LAYER.match(key))]
        counts.append(max(layers, default=-1) + 1)
    if sum(counts) != num_layers:
        raise UserError(
            f"{iteration}: its stages hold {' + '.join(map(str, counts))} = {sum(counts)} layers, but the config asks "
            f"for num_hidden_layers={num_layers}"
        )
    for name, place in (("first", 0), ("last", -1)):
        told = getattr(args, f"decoder_{name}_pipeline_num_layers", None)
        held = sum(counts[place % len(stages) :: len(stages)])
        if told is not None and told != held:
            raise UserError(
                f"{iteration}: args say decoder_{name}_pipeline_num_layers={told}, but the {name} stage holds {held}"
            )
    return tuple(counts)


def _match(
    model: Model, layout: MegatronLayout, place: tuple[int, int, int], path: Path, found: dict[str, torch.Tensor]
) -> list[Stored]:
    """Pair what a file holds with what the model needs of it."""
    rank, stage, chunk = place
    pieces = {piece.key: piece for piece in rank_pieces(model, layout, rank, stage, chunk)}
    check_whole(path, found, pieces)
    stored = []
    for key, piece in pieces.items():
        if tuple(found[key].shape) != piece.shape:
            raise UserError(
                f"{path}: '{key}' has shape {list(found[key].shape)}, but the model asks for {list(piece.shape)} at "
                f"tp={layout.tp}"
            )
        stored.append(
            Stored(piece, tensor_extent(path, found[key]), _whole_name(model, layout, stage, chunk, key), rank)
        )
    return stored


def _whole_name(model: Model, layout: MegatronLayout, stage: int, chunk: int, key: str) -> str:
    """A key with layers, and output matrices of exits, numbered over the whole model."""
    first, count = layout.layers(stage, chunk)
    if match := LAYER.fullmatch(key):
        return f"layers.{first + int(match[1])}.{match[2]}"
    if match := re.fullmatch(r"language_model\.exit_output_layer\.(\d+)\.weight", key):
        return f"exit_output_layer.{hosted_exits(model, layout, first, count)[int(match[1])][0]}"
    return key
