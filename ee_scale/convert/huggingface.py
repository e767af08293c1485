"""Hugging Face folders: read with or without exits (or as a sidecar), written in shards of a given size."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ee_scale.artifact.calibration import read_calibration, write_calibration
from ee_scale.artifact.files import file_digest, write_json
from ee_scale.artifact.hf_folder import copy_small_files, stock_config, write_config, write_index
from ee_scale.artifact.sidecar import SIDECAR_CONFIG, SIDECAR_WEIGHTS, base_folder, read_sidecar
from ee_scale.artifact.trained_base import EMBEDDING, HEAD
from ee_scale.backbone.fingerprint import fingerprint, is_model
from ee_scale.backbone.loading import SINGLE_NAME, WAY_OUT, load_config, weight_files
from ee_scale.backbone.small_files import has_vocabulary
from ee_scale.backbone.stored_names import parameter_names
from ee_scale.convert.args import rope_of
from ee_scale.convert.copying import Source
from ee_scale.convert.files import SafetensorsFile, safetensors_extents
from ee_scale.convert.model import Model, Opened, check_whole
from ee_scale.convert.tensors import Extent, Piece, Span, Stored, TensorInfo
from ee_scale.errors import UserError
from ee_scale.exits.placement import exits_of, read_spec
from ee_scale.families.build import meta_model
from ee_scale.modeling.heads import ExitSpec
from ee_scale.modeling.modeling_early_exit import AUTO_MAP, PREFIX, copy_code
from ee_scale.reading import read_object

DROPPED = ("rotary_emb.inv_freq",)  # buffers of old files


def open_folder(folder: Path) -> Opened:
    """A model folder, with exits where its config names them. Raises `UserError`."""
    config = load_config(folder)
    exits = exits_of(folder, config)
    return _open(folder, config, exits, weight_files(folder))


def open_sidecar(folder: Path) -> Opened:
    """Exits alone: opened together with the base model that they name. Raises `UserError`."""
    facts = read_sidecar(folder)
    base = base_folder(folder, facts)
    if not base.is_dir():
        raise UserError(f"src={folder}: its base model {base} is not there")
    if not is_model(base, facts["base_fingerprint"]):
        raise UserError(f"src={folder}: {base} changed since the exits were trained")
    config = load_config(base)
    exits = read_spec(facts["early_exit"], folder, config.num_hidden_layers)
    return replace(_open(base, config, exits, [*weight_files(base), folder / SIDECAR_WEIGHTS]), exits_from=folder)


def _open(folder: Path, config: Any, exits: ExitSpec | None, files: list[Path]) -> Opened:
    extents = _by_parameter(folder, config, files)
    first = extents.get(EMBEDDING)
    model = Model(config, exits, first.dtype if first else torch.float32, config.vocab_size)
    info = model.info()
    check_tensors(folder, extents, info)
    stored = [Stored(whole_piece(name, info[name]), extent) for name, extent in extents.items()]
    return Opened("hf", folder, model, stored, small=folder, exits_from=folder if exits else None)


def _by_parameter(folder: Path, config: Any, files: list[Path]) -> dict[str, Extent]:
    """Where each parameter lies, by transformers' own names; tied matrices once. Raises `UserError`."""
    stored = {name: extent for path in files for name, extent in safetensors_extents(path).items()}
    try:
        names = parameter_names(meta_model(config, torch.float32), stored)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    extents = {names[name]: extent for name, extent in stored.items() if not name.endswith(DROPPED)}
    for name, extent in extents.items():
        if not extent.dtype.is_floating_point:
            raise UserError(
                f"{folder}: '{name}' is stored as {extent.dtype}: encoded (quantized) weights are not read; {WAY_OUT}"
            )
    if config.tie_word_embeddings and HEAD in extents:
        head = extents.pop(HEAD)
        extents.setdefault(EMBEDDING, head)
    return extents


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
    shards = _shards(base, itemsize, shard_bytes) + _shards(exits, itemsize, shard_bytes)
    if len(shards) == 1:
        return [SafetensorsFile(SINGLE_NAME, shards[0])]
    return [
        SafetensorsFile(f"model-{number:05d}-of-{len(shards):05d}.safetensors", pieces)
        for number, pieces in enumerate(shards, 1)
    ]


def sidecar_file(model: Model) -> SafetensorsFile:
    """The exits alone."""
    info = model.info()
    names = sorted((name for name in info if name.startswith(PREFIX)), key=_order)
    return SafetensorsFile(SIDECAR_WEIGHTS, [whole_piece(name, info[name]) for name in names])


def finish_folder(folder: Path, opened: Opened, dtype: torch.dtype, files: list[SafetensorsFile]) -> None:
    """Config, index, tokenizer and, for exits, the code that opens them."""
    if len(files) > 1:
        write_index(folder, {piece.key: file.name for file in files for piece in file.pieces})
    values = config_values(opened, dtype)
    if opened.model.exits:
        values |= {"early_exit": opened.model.exits.to_dict(), "auto_map": AUTO_MAP}
    types = {stored.extent.dtype for stored in opened.stored} | {piece.dtype for file in files for piece in file.pieces}
    calibrated = opened.exits_from if len(types) == 1 else None  # rounded exits decide otherwise
    _write_small(folder, opened, values, same_exits=calibrated is not None and calibrated == opened.small)
    if calibrated not in (None, opened.small) and (calibration := read_calibration(calibrated)) is not None:
        write_calibration(folder, calibration)
    if opened.model.exits:
        copy_code(folder)


def copy_part(folder: Path, opened: Opened, dtype: torch.dtype) -> None:
    """Config and tokenizer without weights or exits: what Megatron's formats have no place for."""
    _write_small(folder, opened, config_values(opened, dtype))


def has_tokenizer(opened: Opened) -> bool:
    """Whether a tokenizer lies in the folder that came along."""
    return opened.small is not None and has_vocabulary(opened.small)


def check_base(folder: Path, opened: Opened) -> None:
    """Raise `UserError` if a folder is not the base model of the exits, by shapes and the first row of every tensor."""
    base = open_folder(folder)
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
        "base_fingerprint": fingerprint(base),
        "early_exit": model.exits.to_dict(),
        "files": {SIDECAR_WEIGHTS: file_digest(folder / SIDECAR_WEIGHTS)},
    }
    write_json(folder / SIDECAR_CONFIG, facts)


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
    return stock_config(values)


def _write_small(folder: Path, opened: Opened, values: dict[str, Any], *, same_exits: bool = False) -> None:
    if opened.small is not None:
        copy_small_files(opened.small, folder, same_exits=same_exits)
    write_config(folder, values)


def _shards(pieces: list[Piece], itemsize: int, shard_bytes: int) -> list[list[Piece]]:
    shards: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        size = torch.Size(piece.shape).numel() * itemsize
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(piece)
        room -= size
    return shards


def _order(name: str) -> tuple[Any, ...]:
    """Embedding, layers by number, norm, head, exits by number."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    rank = ("model.embed", "model.layers", "model.norm", "lm_head", PREFIX)
    return next((i for i, start in enumerate(rank) if name.startswith(start)), len(rank)), numbers, name
