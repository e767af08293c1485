"""Hugging Face folders: read with or without exits (or as a sidecar), written in shards of a given size."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ee_scale.artifact.hf_folder import (
    shard_names,
    shards,
    write_beside,
    write_calibration,
    write_index,
    write_sidecar,
)
from ee_scale.artifact.trained_base import EMBEDDING, HEAD
from ee_scale.backbone.fingerprint import fingerprint
from ee_scale.backbone.loading import WAY_OUT
from ee_scale.backbone.model_folder import CHANGED, SIDECAR_WEIGHTS, ModelFolder
from ee_scale.backbone.model_path import plain_folder
from ee_scale.backbone.small_files import has_vocabulary
from ee_scale.backbone.stored_names import parameter_names
from ee_scale.conversion.args import rope_of
from ee_scale.conversion.copying import Source
from ee_scale.conversion.model import Model, Opened, check_whole
from ee_scale.conversion.target_files import SafetensorsFile, safetensors_extents
from ee_scale.conversion.tensors import Extent, Piece, Span, Stored, TensorInfo
from ee_scale.errors import UserError
from ee_scale.families.build import meta_model
from ee_scale.families.experts import STACK
from ee_scale.families.registry import experts_of
from ee_scale.modeling.modeling_early_exit import PREFIX, auto_map, copy_code
from ee_scale.reading import read_object

DROPPED = ("rotary_emb.inv_freq",)  # buffers of old files


def find_folder(path: Path) -> Opened:
    """A model folder, or a sidecar together with its base model. Raises `UserError`."""
    return open_folder(ModelFolder.find(path, here=f"src={path}", other=CHANGED))


def open_folder(folder: ModelFolder) -> Opened:
    """With exits where there are any. Raises `UserError`."""
    base, config = folder.base, folder.decoder_config
    extents = _by_parameter(base, config, folder.weight_files)
    first = extents.get(EMBEDDING)
    model = Model(config, folder.exits, first.dtype if first else torch.float32, config.vocab_size)
    info = model.info()
    check_tensors(base, extents, info)
    stored = [Stored(whole_piece(name, info[name]), extent) for name, extent in extents.items()]
    return Opened("hf", base, model, stored, small=base, exits_from=folder.path if folder.exits else None)


def _by_parameter(folder: Path, config: PreTrainedConfig, files: list[Path]) -> dict[str, Extent]:
    """Where each parameter lies, by transformers' own names; tied matrices once. Raises `UserError`."""
    stored = {name: extent for path in files for name, extent in safetensors_extents(path).items()}
    experts = experts_of(config)
    single = {name for name in stored if experts is not None and experts.is_one(name)}  # none is one parameter
    try:
        names = parameter_names(meta_model(config, torch.float32), stored.keys() - single)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    names |= {name: name for name in single}
    extents = {names[name]: extent for name, extent in stored.items() if not name.endswith(DROPPED)}
    extents = expert_by_expert(folder, config, extents)
    for name, extent in extents.items():
        if not extent.dtype.is_floating_point:
            raise UserError(
                f"{folder}: '{name}' is stored as {extent.dtype}: encoded (quantized) weights are not read; {WAY_OUT}"
            )
    if config.tie_word_embeddings and HEAD in extents:
        head = extents.pop(HEAD)
        extents.setdefault(EMBEDDING, head)
    return extents


def expert_by_expert(folder: Path, config: PreTrainedConfig, extents: dict[str, Extent]) -> dict[str, Extent]:
    """Stacks of experts, as transformers' modules have them, taken apart; a router by its name on the hub.

    Raises `UserError` if a stack has not the shape that the config asks for, or an expert is there twice.
    """
    experts, found = experts_of(config), {}
    for name, extent in extents.items():
        parts = {name if experts is None else experts.renamed(name): extent}
        if experts is not None and (match := STACK.fullmatch(name)):
            count, width, hidden = config.num_experts, getattr(config, experts.width), config.hidden_size
            joined = match[2] == "gate_up_proj"
            shape = (count, 2 * width, hidden) if joined else (count, hidden, width)
            if extent.shape != shape:
                raise UserError(
                    f"{folder}: '{name}' has shape {list(extent.shape)}, but the config asks for {list(shape)}"
                )
            parts = {}
            for number in range(count):
                gate, up, down = (match[1] + own for own in experts.names(number))
                one = extent.at(number)
                parts |= {gate: one.part(0, width), up: one.part(width, 2 * width)} if joined else {down: one}
        if twice := found.keys() & parts.keys():
            raise UserError(f"{folder}: '{min(twice)}' is there twice, alone and in '{name}'")
        found |= parts
    return found


def check_tensors(folder: Path, extents: dict[str, Extent], info: dict[str, TensorInfo]) -> None:
    """Raise `UserError` naming a tensor that is missing, not known, or of another shape than the config asks for."""
    check_whole(folder, extents, info)
    for name, extent in extents.items():
        if extent.shape != info[name].shape:
            raise UserError(
                f"{folder}: '{name}' has shape {list(extent.shape)}, but the config asks for {list(info[name].shape)}"
            )


def whole_piece(name: str, info: TensorInfo) -> Piece:
    """A tensor of the model as its own folder stores it."""
    return Piece(name, info.dim, (info.whole(name),), info.shape)


def target_files(model: Model, itemsize: int, shard_bytes: int) -> list[SafetensorsFile]:
    """Shards of at most `shard_bytes` at `itemsize` bytes a number, in the order of the layers, exits at the end."""
    info, base, exits = model.info(), [], []
    for name in sorted(info, key=_order):
        (exits if name.startswith(PREFIX) else base).append(whole_piece(name, info[name]))

    def nbytes(piece: Piece) -> int:
        return math.prod(piece.shape) * itemsize

    groups = shards(base, nbytes, shard_bytes) + shards(exits, nbytes, shard_bytes)
    return [SafetensorsFile(name, pieces) for name, pieces in zip(shard_names(len(groups)), groups, strict=True)]


def sidecar_file(model: Model) -> SafetensorsFile:
    """The exits alone."""
    info = model.info()
    names = sorted((name for name in info if name.startswith(PREFIX)), key=_order)
    return SafetensorsFile(SIDECAR_WEIGHTS, [whole_piece(name, info[name]) for name in names])


def finish_folder(folder: Path, opened: Opened, dtype: torch.dtype, files: list[SafetensorsFile]) -> None:
    """Config, index, tokenizer and, for exits, the code that opens them."""
    write_index(folder, {piece.key: file.name for file in files for piece in file.pieces})
    exits = opened.model.exits
    own = {"early_exit": exits.to_dict(), "auto_map": auto_map(exits)} if exits else {}
    types = {stored.extent.dtype for stored in opened.stored} | {piece.dtype for file in files for piece in file.pieces}
    # Rounded exits, and those of a model that an adapter changes, decide otherwise.
    calibrated = opened.exits_from if len(types) == 1 and not opened.updates else None
    same = calibrated is not None and calibrated == opened.small
    write_beside(folder, opened.small, config_values(opened, dtype), same_exits=same, **own)
    if calibrated not in (None, opened.small) and (calibration := ModelFolder(calibrated).calibration()) is not None:
        write_calibration(folder, calibration)
    if exits:
        copy_code(exits, folder)


def copy_part(folder: Path, opened: Opened, dtype: torch.dtype) -> None:
    """Config and tokenizer without weights or exits: what Megatron's formats have no place for."""
    write_beside(folder, opened.small, config_values(opened, dtype))


def has_tokenizer(opened: Opened) -> bool:
    """Whether a tokenizer lies in the folder that came along."""
    return opened.small is not None and has_vocabulary(opened.small)


def check_base(folder: Path, opened: Opened) -> None:
    """Raise `UserError` if a folder is not the base model of the exits, by shapes and the first row of every tensor."""
    base = open_folder(ModelFolder(folder))
    theirs, ours, info = Source(base.stored), Source(opened.stored), base.model.info()
    if info != replace(opened.model, exits=None).info():
        raise UserError(f"model={folder}: its tensors have other names or shapes than the base model of the exits")
    for name, tensor in info.items():
        rows = [torch.empty(1, math.prod(tensor.shape[1:]), dtype=source.dtype(name)) for source in (theirs, ours)]
        for source, row in zip((theirs, ours), rows, strict=True):
            source.fill(Span(name, 0, 1 if tensor.dim == 0 else tensor.shape[1]), row, tensor.dim, (0, 1))
        coarse = max((row.dtype for row in rows), key=lambda dtype: torch.finfo(dtype).eps)
        if not torch.equal(rows[0].to(coarse), rows[1].to(coarse)):
            raise UserError(f"model={folder}: '{name}' differs from that of the base model of the exits")


def finish_sidecar(folder: Path, model: Model, base: Path) -> None:
    """exits.json beside the weights."""
    facts = {
        "step": None,
        "base_model": str(base.resolve()),
        "base_fingerprint": fingerprint(plain_folder(base)),
        "early_exit": model.exits.to_dict(),
    }
    write_sidecar(folder, facts)


def config_values(opened: Opened, dtype: torch.dtype) -> dict[str, Any]:
    """config.json: the model's own where there is one, with rotary base and number type told as transformers 4 and 5
    read them (each ignores the other's key, and 4 then falls back to a base of 10000 without a word).
    """
    model = opened.model
    if opened.small is not None and (opened.small / "config.json").is_file():
        values = read_object(opened.small / "config.json")
    else:
        values = model.config.to_diff_dict() | {"architectures": model.config.architectures}
    rope = rope_of(model.config)
    name = str(dtype).removeprefix("torch.")
    values |= {"rope_parameters": rope, "rope_theta": rope["rope_theta"], "dtype": name, "torch_dtype": name}
    scaled = {key: value for key, value in rope.items() if key != "rope_theta"}
    values["rope_scaling"] = None if rope["rope_type"] == "default" else scaled
    values["tie_word_embeddings"] = model.config.tie_word_embeddings
    return values


def _order(name: str) -> tuple[Any, ...]:
    """Embedding, layers by number, norm, head, exits by number."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    rank = ("model.embed", "model.layers", "model.norm", "lm_head", PREFIX)
    return next((i for i, start in enumerate(rank) if name.startswith(start)), len(rank)), numbers, name
