"""Megatron-Core's `torch_dist` checkpoints, by torch's distributed checkpoint alone: no process group, no Megatron.

Layers of one shape are stacked: `decoder.layers.mlp.linear_fc2.weight` [L, D, F], one chunk per layer and tensor rank.
The gates and ups of `linear_fc1` are apart in the whole tensor (all gates, then all ups), unlike in a rank's parameter.
Other layouts are read too: a key per layer, and gates (`_w`) and ups (`_v`) under keys of their own.
"""

import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from ee_scale.convert.args import check_agrees, to_args, to_config
from ee_scale.convert.files import ArchivesFile, archive_extent
from ee_scale.convert.folders import DIST_MARKER, hugging_face_part
from ee_scale.convert.model import Model, Opened, check_whole
from ee_scale.convert.names import EMBEDDING, EXTRA_STATE, FINAL_NORM, HEAD, Row, Rule
from ee_scale.convert.tensors import Extent, Piece, Stored, cut
from ee_scale.convert.unpickle import load_index, load_safely
from ee_scale.errors import UserError
from ee_scale.files import write_text

LAYERS = "decoder.layers."
PREFIXES = ("module.", "model.")  # NeMo 2 and 1
NOT_WEIGHTS = ("optimizer.", "rng_state", "common_state", "opt_param_scheduler", "rerun_state_machine", "iteration")
COMMON = "common.pt"
MARKER = (
    '{"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", '
    '"common_backend_version": 1}'
)


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
    model = Model(config, None, embedding.properties.dtype, embedding.size[0])
    stored = list(_stored(iteration, index, entries, model))
    return Opened("megatron_core", folder, model, stored, args=args, small=small)


def target_files(model: Model, tp: int, pp: int, iteration: str) -> list[ArchivesFile]:
    """A file per tensor and pipeline rank with that rank's chunks."""
    if model.exits:
        raise UserError("to=megatron_core: Megatron-Core has no exits; use to=megatron_legacy (EE-LLM)")
    model.map.check_tensor_parallel(tp)
    layers = model.map.shape.num_layers
    if layers % pp:
        raise UserError(f"pp={pp}: does not divide num_hidden_layers={layers} (stages of equal size only)")
    files = []
    for stage in range(pp):
        for rank in range(tp):
            pieces = [chunk.piece for chunk in _rank_chunks(model, tp, pp, rank, stage)]
            objects = _extra_state(model, pp, stage) if rank == 0 else {}
            files.append(ArchivesFile(f"{iteration}/__{stage * tp + rank}_0.distcp", pieces, objects))
    return files


def unify_dtypes(files: list[ArchivesFile]) -> None:
    """One number type for all chunks of a tensor, the widest: layers that are stacked cannot differ."""
    widest: dict[str, torch.dtype] = {}
    for piece in (piece for file in files for piece in file.pieces):
        key = piece.key.rpartition("/")[0]
        widest[key] = torch.promote_types(widest.get(key, piece.dtype), piece.dtype)
    for file in files:
        file.pieces = [replace(piece, dtype=widest[piece.key.rpartition("/")[0]]) for piece in file.pieces]


def finish_folder(
    folder: Path, model: Model, dtype: torch.dtype, layout: tuple[int, int, int], files: list[ArchivesFile]
) -> None:
    """Index, common.pt and, last, the marker. `layout`: tp, pp, divisor; `files`: as written."""
    tp, pp, divisor = layout
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    results = []
    for number, file in enumerate(files):
        name, dtypes = Path(file.name).name, {piece.key: piece.dtype for piece in file.pieces}
        stage, rank = divmod(number, tp)
        for chunk in _rank_chunks(model, tp, pp, rank, stage):
            properties = TensorProperties(dtype=dtypes[chunk.piece.key])
            entry = tensors.setdefault(chunk.key, TensorStorageMetadata(properties, torch.Size(chunk.whole), []))
            offsets = torch.Size(chunk.offsets)
            entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk.piece.stored_shape)))
            index = MetadataIndex(chunk.key, offsets, len(entry.chunks) - 1)
            results.append(_result(index, name, file.places[chunk.piece.key]))
        for key in file.objects:
            tensors[key] = BytesStorageMetadata()
            results.append(_result(MetadataIndex(key), name, file.places[key]))
    common = {
        "args": to_args(model.config, dtype, tp, pp, model.padded_vocab, divisor),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": {"singleton_local_shards": False, "non_homogeneous_layers": False},
    }
    torch.save(common, folder / COMMON)
    FileSystemWriter(folder).finish(Metadata(tensors), [results])
    write_text(folder / DIST_MARKER, MARKER)


@dataclass(frozen=True)
class _Chunk:
    """A piece, and where it belongs in a tensor of shape `whole` called `key`."""

    piece: Piece
    key: str
    whole: tuple[int, ...]
    offsets: tuple[int, ...]


def _rank_chunks(model: Model, tp: int, pp: int, rank: int, stage: int) -> Iterator[_Chunk]:
    """What a rank of Megatron-Core would write: of what all tensor ranks hold, rank 0 writes it alone."""
    layers = model.map.shape.num_layers
    per_stage = layers // pp
    if stage == 0:
        yield from _chunks(model, EMBEDDING, EMBEDDING.core, "", None, rank, tp)
    for layer in range(stage * per_stage, (stage + 1) * per_stage):
        for row in model.map.layer_rows:
            yield from _chunks(model, row, LAYERS + row.core, f"model.layers.{layer}.", layer, rank, tp)
    if stage == pp - 1:
        yield from _chunks(model, FINAL_NORM, FINAL_NORM.core, "", None, rank, tp)
        if not model.config.tie_word_embeddings:
            yield from _chunks(model, HEAD, HEAD.core, "", None, rank, tp)


def _chunks(model: Model, row: Row, key: str, prefix: str, layer: int | None, rank: int, tp: int) -> Iterator[_Chunk]:
    whole, joined = model.map.stored_shape(row), model.map.joined(row, prefix)
    size = whole[row.dim]
    if row.rule is Rule.WHOLE:
        starts, step = ([0], size) if rank == 0 else ([], size)
    elif row.rule is Rule.GATE_UP:
        step = size // 2 // tp
        starts = [rank * step, size // 2 + rank * step]
    else:
        step = size // tp
        starts = [rank * step]
    lead = () if layer is None else (layer,)
    for start in starts:
        shape = (*whole[: row.dim], step, *whole[row.dim + 1 :])
        offsets = tuple(start if axis == row.dim else 0 for axis in range(len(whole)))
        name = f"{key}/{'.'.join(map(str, (*lead, *offsets)))}"
        piece = Piece(name, row.dim, cut(joined, start, start + step), shape, stacked=bool(lead))
        total = (model.map.shape.num_layers, *whole) if lead else whole
        yield _Chunk(piece, key, total, (*lead, *offsets))


def _extra_state(model: Model, pp: int, stage: int) -> dict[str, list[None]]:
    layers = model.map.shape.num_layers
    per_stage = layers // pp
    return {
        f"{LAYERS}{module}._extra_state/shard_{layer}_{layers}": [None]
        for layer in range(stage * per_stage, (stage + 1) * per_stage)
        for module in EXTRA_STATE
    }


def _result(index: MetadataIndex, name: str, place: Sequence[int]) -> WriteResult:
    offset, length = place
    return WriteResult(index, length, _StorageInfo(name, offset, length))


def _common(iteration: Path, index: Metadata, trust: bool) -> dict[str, Any]:
    """args and counters: `common.pt`, or since release 0.19 an item of the checkpoint itself."""
    path = iteration / COMMON
    if path.is_file():
        found = load_safely(path, path, trust=trust)
    else:
        key = next((key for key in index.state_dict_metadata if key.startswith("common_state/")), None)
        if key is None:
            return {}
        info = index.storage_data[MetadataIndex(key)]
        path = iteration / info.relative_path
        with path.open("rb") as file:
            file.seek(info.offset)
            found = load_safely(BytesIO(file.read(info.length)), path, trust=trust)
    found = found[0] if isinstance(found, list) and found else found
    return found if isinstance(found, dict) else {}


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
                info = index.storage_data[MetadataIndex(key, chunk.offsets)]
                extent = files.extent(info)
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

    def __exit__(self, *_: Any) -> None:
        for file in self._open.values():
            file.close()

    def extent(self, info: _StorageInfo) -> Extent:
        """Where the tensor of an entry lies. Raises `UserError`."""
        path = self.folder / info.relative_path
        return archive_extent(path, self._file(path), info.offset, info.length)

    def _file(self, path: Path) -> IO[bytes]:
        if path not in self._open:
            if path.parent.resolve() != self.folder.resolve() or not path.is_file():
                raise UserError(f"{path}: named by the index, but not there")
            self._open[path] = path.open("rb")
        return self._open[path]
