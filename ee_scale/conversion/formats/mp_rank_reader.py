"""Read Megatron's files per rank, of either kind of classes (see `mp_rank`), with or without EE-LLM's exits."""

import re
from argparse import Namespace
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ee_scale.conversion.args import check_agrees, to_config
from ee_scale.conversion.folders import hugging_face_part
from ee_scale.conversion.formats.ee_llm import numbers_in_file, spec_of_args
from ee_scale.conversion.formats.mp_rank import (
    FILE,
    MegatronLayout,
    Place,
    check_layout,
    folder_name,
    hosted_exits,
    rank_experts,
    rank_pieces,
)
from ee_scale.conversion.model import Model, Opened, check_whole, check_words
from ee_scale.conversion.target_files import tensor_extent
from ee_scale.conversion.tensors import Stored
from ee_scale.conversion.unpickle import load_safely, reads_strangers
from ee_scale.errors import UserError
from ee_scale.families.megatron import EMBEDDING, LOCAL_EXPERTS, STACKED

LAYER = re.compile(r"(?:decoder|language_model\.encoder)\.layers\.(\d+)\.(.*)")
EXPERT = re.compile(rf"{re.escape(LOCAL_EXPERTS)}(\d+)\.")
WORDS = re.compile(r"(word_embeddings|output_layer|word_embeddings_for_head|exit_output_layer\.\d+)\.weight$")
FOLDER = re.compile(r"mp_rank_(\d\d)(?:_(\d\d\d))?(?:_(\d\d\d))?")
GROUPED = re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)$")  # as TEGroupedMLP has an expert
FUSED = re.compile(r"mlp\.experts\.weight[12]$")  # as GroupedMLP has all experts of a rank
OLD_NAMES = (  # before September 2023, and before 2021
    ("language_model.transformer.", "language_model.encoder."),
    (".attention.", ".self_attention."),
    (".input_layernorm.", ".input_norm."),
    (".post_attention_layernorm.", ".post_attention_norm."),
    (".final_layernorm.", ".final_norm."),
)
FIRST: Place = (0, 0, 0)
IGNORED = ("_extra_state", "inv_freq")


@reads_strangers
def open_folder(folder: Path, iteration: Path, model_folder: Path | None, trust: bool) -> Opened:
    """Every rank's file of an iteration. `model_folder`: Hugging Face folder of the same model. Raises `UserError`."""
    files, contents = _contents(iteration, trust)
    args = contents[FIRST]["args"]
    tp, pp, ep = (max(place[axis] for place in files) + 1 for axis in range(3))
    _check_args(args, contents[FIRST], iteration, tp, pp, ep)
    tensors = {place: _chunks(content, files[place]) for place, content in contents.items()}
    small, config = hugging_face_part(folder, model_folder)
    if config is None:
        config = to_config(args, None)
    else:
        check_agrees(args, config, small)
    first, notes = tensors[FIRST][0], []
    legacy = any(key.startswith("language_model.") for key in first)
    embedding = first.get("language_model.embedding.word_embeddings.weight" if legacy else EMBEDDING.core)
    if embedding is None:
        raise UserError(f"{files[FIRST]}: no word embeddings in it; keys start with {next(iter(first), 'nothing')!r}")
    check_words(iteration, config, args, _word_rows(tensors))
    spec = spec_of_args(args, config)
    model = Model(config, spec, embedding.dtype, embedding.shape[0] * tp)
    layout = MegatronLayout(
        tp,
        pp,
        _counts(iteration, tensors, args, model.map.shape.num_layers),
        ep=ep,
        chunks=len(tensors[FIRST]),
        classes="legacy" if legacy else "core",
        spec="local" if any(map(_is_local, tensors.values())) else "te",
        exit_numbers=tuple(numbers_in_file(args)),
        shift=int(bool(getattr(args, "pre_exit", False))),
    )
    check_layout(model, layout)
    stored = []
    for place, chunks in tensors.items():
        for chunk, found in enumerate(chunks):
            stored += _match(model, layout, place, chunk, files[place], found)
    if legacy and getattr(args, "rotary_base", 10000) != 10000:
        notes.append(f"args.rotary_base={args.rotary_base}: the old classes ignore it and compute with 10000")
    return Opened("megatron_legacy", folder, model, stored, args=args, small=small, notes=notes)


def _contents(iteration: Path, trust: bool) -> tuple[dict[Place, Path], dict[Place, dict[str, Any]]]:
    """Files and what they hold, without the bytes of tensors, of all ranks that there must be. Raises `UserError`."""
    found = _rank_files(iteration)
    loaded = {}
    for numbers, path in found.items():
        with FakeTensorMode():
            loaded[numbers] = load_safely(path, path, trust=trust)
        if not isinstance(loaded[numbers], dict) or "args" not in loaded[numbers]:
            raise UserError(f"{path}: no dict with 'args' in it; not a checkpoint of Megatron-LM")
    # mp_rank_00_001 may be a second stage or a second expert rank: nothing but args tells.
    args = next(iter(loaded.values()))["args"]
    stages, experts = (getattr(args, f"{name}_model_parallel_size", 1) for name in ("pipeline", "expert"))
    unstaged = stages == 1 and experts > 1
    places = {
        numbers: (numbers[0], 0, numbers[1]) if unstaged and len(numbers) == 2 else (*numbers, 0, 0)[:3]
        for numbers in found
    }
    files = {places[numbers]: path for numbers, path in found.items()}
    tp, pp, ep = (max(place[axis] for place in files) + 1 for axis in range(3))
    layout = MegatronLayout(tp, pp, (), ep=ep)
    for place in product(range(tp), range(pp), range(ep)):
        if place not in files:
            grid = f"tp={tp} x pp={pp}" + f" x ep={ep}" * (ep > 1)
            raise UserError(f"{iteration}: {folder_name(layout, place)} is missing of {grid}")
    return files, {places[numbers]: content for numbers, content in loaded.items()}


def _rank_files(iteration: Path) -> dict[tuple[int, ...], Path]:
    """By the numbers in the names of their folders. Raises `UserError`."""
    found = {}
    for path in sorted(iteration.iterdir()):
        if match := FOLDER.fullmatch(path.name):
            if not (path / FILE).is_file():
                raise UserError(f"{path / FILE}: missing")
            found[tuple(int(number) for number in match.groups() if number is not None)] = path / FILE
    if not found:
        raise UserError(f"{iteration}: no folder called mp_rank_00 or mp_rank_00_000 in it")
    if lengths := {len(numbers) for numbers in found} - {len(next(iter(found)))}:
        raise UserError(f"{iteration}: folders of ranks with {min(lengths)} numbers beside those with others")
    return found


def _check_args(args: Namespace, content: dict[str, Any], iteration: Path, tp: int, pp: int, ep: int) -> None:
    if ep > 1 and (told := getattr(args, "expert_tensor_parallel_size", None) or tp) != tp:
        raise UserError(
            f"{iteration}: args say expert_tensor_parallel_size={told} beside tensor_model_parallel_size={tp}; such "
            "experts are read from torch_dist only"
        )
    for name, size in (("tensor", tp), ("pipeline", pp), ("expert", ep)):
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
    return GROUPED.sub(rf"{LOCAL_EXPERTS}\2.\1.weight", key)


def _word_rows(tensors: Mapping[Place, list[dict[str, torch.Tensor]]]) -> list[tuple[str, list[int]]]:
    """(key, rows on each tensor rank) of every vocabulary matrix of every stage, the embedding's first."""
    found: dict[tuple[int, int, str], list[int]] = {}
    for (_, stage, expert_rank), chunks in sorted(tensors.items(), key=lambda item: item[0][::-1]):
        if expert_rank:
            continue  # copies
        for number, chunk in enumerate(chunks):
            for key, tensor in chunk.items():
                if WORDS.search(key):
                    found.setdefault((stage, number, key), []).append(tensor.shape[0])
    return [(key, rows) for (*_, key), rows in found.items()]


def _is_local(chunks: list[dict[str, torch.Tensor]]) -> bool:
    return any(key.endswith(".input_layernorm.weight") for found in chunks for key in found)


def _counts(iteration: Path, tensors: Mapping[Any, list], args: Namespace, num_layers: int) -> tuple[int, ...]:
    """Layers of each chunk as the files of the first tensor rank have them, in the order of `MegatronLayout.counts`."""
    stages = [chunks for (rank, _, expert_rank), chunks in sorted(tensors.items()) if rank == expert_rank == 0]
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
    model: Model, layout: MegatronLayout, place: Place, chunk: int, path: Path, found: dict[str, torch.Tensor]
) -> list[Stored]:
    """Pair what a file holds with what the model needs of it."""
    pieces = {piece.key: piece for piece in rank_pieces(model, layout, place, chunk)}
    if fused := next(filter(FUSED.search, found), None):
        raise UserError(
            f"{path}: '{fused}' holds all experts of its rank in one matrix (the old GroupedMLP); save it as torch_dist"
        )
    check_whole(path, found, pieces)
    stored = []
    for key, piece in pieces.items():
        if tuple(found[key].shape) != piece.shape:
            raise UserError(
                f"{path}: '{key}' has shape {list(found[key].shape)}, but the model asks for {list(piece.shape)} at "
                f"tp={layout.tp}"
            )
        name = _whole_name(model, layout, place, chunk, key)
        stored.append(Stored(piece, tensor_extent(path, found[key]), name, place[0]))
    return stored


def _whole_name(model: Model, layout: MegatronLayout, place: Place, chunk: int, key: str) -> str:
    """A key with layers, experts and output matrices of exits numbered over the whole model."""
    first, count = layout.layers(place[1], chunk)
    if match := LAYER.fullmatch(key):
        start = rank_experts(model, layout, place[2]).start
        name = EXPERT.sub(lambda found: f"{STACKED}{start + int(found[1])}.", match[2])
        return f"layers.{first + int(match[1])}.{name}"
    if match := re.fullmatch(r"language_model\.exit_output_layer\.(\d+)\.weight", key):
        return f"exit_output_layer.{hosted_exits(model, layout, first, count)[int(match[1])][0]}"
    return key
