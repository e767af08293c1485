"""Read Megatron-Core's `torch_dist` checkpoints, from any grid and of any of its layouts (see `torch_dist`).

Layers are stacked, or have a key each; gates (`_w`) and ups (`_v`) of `linear_fc1` may have keys of their own.
"""

import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from ee_scale.conversion.args import check_agrees, to_config
from ee_scale.conversion.folders import hugging_face_part
from ee_scale.conversion.formats.torch_dist import COMMON, LAYERS
from ee_scale.conversion.model import Model, Opened, check_whole, check_words
from ee_scale.conversion.target_files import archive_extent
from ee_scale.conversion.tensors import Extent, Piece, Stored, cut
from ee_scale.conversion.unpickle import load_index, load_part, load_safely, reads_strangers
from ee_scale.errors import UserError
from ee_scale.families.megatron import EMBEDDING, FINAL_NORM, HEAD, Row, Rule
from ee_scale.files import named_file

PREFIXES = ("module.", "model.")  # NeMo 2 and 1
NOT_WEIGHTS = ("optimizer.", "rng_state", "common_state", "opt_param_scheduler", "rerun_state_machine", "iteration")


@reads_strangers
def open_folder(folder: Path, iteration: Path, model_folder: Path | None, trust: bool) -> Opened:
    """An iteration's folder. Raises `UserError`."""
    index = load_index(iteration / ".metadata")
    common = _common(iteration, index, trust)
    args = common.get("args")
    small, config = hugging_face_part(folder, model_folder)
    if config is None:
        if not isinstance(args, Namespace):
            raise UserError(f"{iteration}: no 'args' in it; give model=<Hugging Face folder with config.json>")
        config = to_config(args, None)
    elif isinstance(args, Namespace):
        check_agrees(args, config, small)
    entries = _weights(index)
    if EMBEDDING.core not in entries:
        raise UserError(
            f"{iteration}: no '{EMBEDDING.core}' in its index; keys start with {next(iter(entries), '-')!r}"
        )
    embedding = index.state_dict_metadata[entries[EMBEDDING.core]]
    sizes = {
        name: index.state_dict_metadata[entries[name]].size for name in (EMBEDDING.core, HEAD.core) if name in entries
    }
    check_words(iteration, config, args, [(name, size[:1]) for name, size in sizes.items()])
    model = Model(config, None, embedding.properties.dtype, embedding.size[0])
    stored = list(_stored(iteration, index, entries, model))
    return Opened("megatron_core", folder, model, stored, args=args, small=small)


def _common(iteration: Path, index: Metadata, trust: bool) -> dict[str, Any]:
    """args and counters: `common.pt`, or since release 0.19 an item of the checkpoint itself."""
    path = iteration / COMMON
    if path.is_file():
        found = load_safely(path, path, trust=trust)
    else:
        key = next((key for key in index.state_dict_metadata if key.startswith("common_state/")), None)
        if key is None:
            return {}
        with _Files(iteration) as files:
            found = files.item(_place(iteration, index, MetadataIndex(key)), trust)
    found = found[0] if isinstance(found, list) and found else found
    return found if isinstance(found, dict) else {}


def _place(iteration: Path, index: Metadata, entry: MetadataIndex) -> _StorageInfo:
    """Where an entry of the index lies. Raises `UserError`."""
    if entry not in (index.storage_data or {}):
        raise UserError(f"{iteration / '.metadata'}: does not say where '{entry.fqn}' at {entry.offset} lies")
    return index.storage_data[entry]


def _weights(index: Metadata) -> dict[str, str]:
    """Key without a framework's prefix -> key of the index, for the model's tensors."""
    found = {}
    for key, entry in index.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata) or key.startswith(NOT_WEIGHTS):
            continue
        plain = next((key.removeprefix(prefix) for prefix in PREFIXES if key.startswith(prefix)), key)
        if not plain.endswith("_extra_state"):
            found[plain] = key
    return found


def _stored(iteration: Path, index: Metadata, entries: dict[str, str], model: Model) -> Iterator[Stored]:
    expected = _expected(model)
    known, layers = {}, model.map.shape.num_layers
    for plain, key in entries.items():
        known[plain] = _meaning(plain, index.state_dict_metadata[key].size, expected, layers)
    needed = {(row, layer) for row, layer in _wanted(model)}
    found = {(row, layer) for meaning in known.values() if meaning for row, layer in meaning.parts}
    unknown = [plain for plain, meaning in known.items() if meaning is None]
    check_whole(iteration, [*map(_told, found), *unknown], map(_told, needed))
    with _Files(iteration) as files:
        for plain, key in entries.items():
            entry, meaning = index.state_dict_metadata[key], known[plain]
            _check_size(iteration, plain, entry.size, meaning, model)
            for chunk in entry.chunks:
                extent = files.extent(_place(iteration, index, MetadataIndex(key, chunk.offsets)))
                if extent.shape != tuple(chunk.sizes):
                    raise UserError(
                        f"{extent.path}: '{plain}' at {list(chunk.offsets)} has shape {list(extent.shape)}, "
                        f"its index says {list(chunk.sizes)}"
                    )
                yield from _pieces(iteration, plain, meaning, chunk, extent, model)


@dataclass(frozen=True)
class _Meaning:
    """What a key holds: (row, layer) for each index of its leading axis; half: gates or ups alone."""

    parts: tuple[tuple[Row, int | None], ...]
    stacked: bool
    half: int | None = None


def _expected(model: Model) -> dict[str, Row]:
    rows = {row.core: row for row in model.map.layer_rows} | {
        row.local: row for row in model.map.layer_rows if row.local
    }
    for row in model.map.layer_rows:
        if row.rule is Rule.GATE_UP:
            rows |= {f"{row.core}_w": row, f"{row.core}_v": row}
    return rows


def _wanted(model: Model) -> Iterator[tuple[Row, int | None]]:
    top = (EMBEDDING, FINAL_NORM) if model.config.tie_word_embeddings else (EMBEDDING, FINAL_NORM, HEAD)
    yield from ((row, None) for row in top)
    yield from ((row, layer) for layer in range(model.map.shape.num_layers) for row in model.map.layer_rows)


def _meaning(plain: str, size: Sequence[int], rows: dict[str, Row], layers: int) -> _Meaning | None:
    for row in (EMBEDDING, FINAL_NORM, HEAD):
        if plain == row.core:
            return _Meaning(((row, None),), stacked=False)
    if not plain.startswith(LAYERS):
        return None
    name = plain.removeprefix(LAYERS)
    if match := re.match(r"(\d+)\.", name):
        name, numbers, stacked = name[match.end() :], [int(match[1])], False
    else:
        numbers, stacked = range(size[0]), True
    row = rows.get(name)
    if row is None or (stacked and size[0] != layers):
        return None
    half = {"_w": 0, "_v": 1}.get(name[-2:]) if row.rule is Rule.GATE_UP else None
    return _Meaning(tuple((row, number) for number in numbers), stacked, half)


def _told(part: tuple[Row, int | None] | str) -> str:
    if isinstance(part, str):
        return part
    row, layer = part
    return row.core if layer is None else f"{LAYERS}{layer}.{row.core}"


def _check_size(iteration: Path, plain: str, size: Sequence[int], meaning: _Meaning, model: Model) -> None:
    row = meaning.parts[0][0]
    shape = list(model.map.stored_shape(row))
    if meaning.half is not None:
        shape[0] //= 2
    found = list(size[1:] if meaning.stacked else size)
    if found != shape:
        raise UserError(f"{iteration}: '{plain}' has shape {found} (of a layer), but the config asks for {shape}")


def _pieces(
    iteration: Path, plain: str, meaning: _Meaning, chunk: ChunkStorageMetadata, extent: Extent, model: Model
) -> Iterator[Stored]:
    """The spans of one chunk, layer by layer."""
    offsets, sizes = list(chunk.offsets), list(chunk.sizes)
    first, count = 0, 1
    if meaning.stacked:
        first, count = offsets.pop(0), sizes.pop(0)
    for number in range(count):
        row, layer = meaning.parts[first + number]
        joined = model.map.joined(row, "" if layer is None else f"model.layers.{layer}.")
        if meaning.half is not None:
            joined = joined[meaning.half : meaning.half + 1]
        shape = list(model.map.stored_shape(row))
        if any(offsets[axis] or sizes[axis] != shape[axis] for axis in range(len(shape)) if axis != row.dim):
            raise UserError(f"{iteration}: '{plain}' is cut at {offsets} along another axis than tensor ranks cut it")
        start = offsets[row.dim]
        part = extent.part(number, number + 1).first() if meaning.stacked else extent
        spans = cut(joined, start, start + sizes[row.dim])
        place = start + (meaning.half or 0) * shape[0] // 2
        name = row.core if layer is None else f"layers.{layer}.{row.core}"
        yield Stored(Piece(plain, row.dim, spans, tuple(sizes)), part, name, place)


class _Files:
    """Open data files, each once."""

    def __init__(self, folder: Path):
        self.folder, self._open = folder, {}

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()

    def extent(self, info: _StorageInfo) -> Extent:
        """Where the tensor of an entry lies. Raises `UserError`."""
        path = self._path(info)
        return archive_extent(path, self._file(path), info.offset, info.length)

    def item(self, info: _StorageInfo, trust: bool) -> Any:
        """An entry that is no tensor. Raises `UserError`."""
        path = self._path(info)
        file = self._file(path)
        return load_part(path, file, info.offset, info.length, trust=trust)

    def _path(self, info: _StorageInfo) -> Path:
        return named_file(self.folder, info.relative_path, self.folder / ".metadata")

    def _file(self, path: Path) -> IO[bytes]:
        if path not in self._open:
            if not path.is_file():
                raise UserError(f"{path}: named by the index, but not there")
            self._open[path] = path.open("rb")
        return self._open[path]
