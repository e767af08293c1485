"""Megatron-Core's `torch_dist` checkpoints, by torch's distributed checkpoint alone: no process group, no Megatron.

Layers of one shape are stacked: `decoder.layers.mlp.linear_fc2.weight` [L, D, F], one chunk per layer and tensor rank;
and so are experts: `decoder.layers.mlp.experts.experts.linear_fc2.weight` [L, E, D, F], whatever ranks share them.
The gates and ups of `linear_fc1` are apart in the whole tensor (all gates, then all ups), unlike in a rank's parameter.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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

from ee_scale.conversion.folders import DIST_MARKER
from ee_scale.conversion.model import Model
from ee_scale.conversion.target_files import ArchivesFile
from ee_scale.conversion.tensors import Piece, cut
from ee_scale.errors import UserError
from ee_scale.families.megatron import EMBEDDING, FINAL_NORM, HEAD, Row, Rule
from ee_scale.files import write_text

LAYERS = "decoder.layers."
COMMON = "common.pt"
MARKER = (
    '{"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", '
    '"common_backend_version": 1}'
)


def target_files(model: Model, tp: int, counts: Sequence[int], iteration: str) -> list[ArchivesFile]:
    """A file per tensor and pipeline rank with that rank's chunks. `counts`: layers of each stage."""
    if model.exits:
        raise UserError("to=megatron_core: Megatron-Core has no exits; use to=megatron_legacy (EE-LLM)")
    model.map.check_tensor_parallel(tp)
    files = []
    for stage in range(len(counts)):
        for rank in range(tp):
            pieces = [chunk.piece for chunk in _rank_chunks(model, tp, counts, rank, stage)]
            objects = _extra_state(model, counts, stage) if rank == 0 else {}
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
    folder: Path, model: Model, args: Namespace, counts: Sequence[int], files: list[ArchivesFile]
) -> None:
    """Index, common.pt and, last, the marker. `counts`: layers of each stage; `files`: as written."""
    tp = args.tensor_model_parallel_size
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    results = []
    for number, file in enumerate(files):
        name, dtypes = Path(file.name).name, {piece.key: piece.dtype for piece in file.pieces}
        stage, rank = divmod(number, tp)
        for chunk in _rank_chunks(model, tp, counts, rank, stage):
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
        "args": args,
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


def _layers(counts: Sequence[int], stage: int) -> range:
    first = sum(counts[:stage])
    return range(first, first + counts[stage])


def _rank_chunks(model: Model, tp: int, counts: Sequence[int], rank: int, stage: int) -> Iterator[_Chunk]:
    """What a rank of Megatron-Core would write: of what all tensor ranks hold, rank 0 writes it alone."""
    if stage == 0:
        yield from _chunks(model, EMBEDDING, EMBEDDING.core, "", None, rank, tp)
    for layer in _layers(counts, stage):
        for row in model.map.layer_rows:
            yield from _chunks(model, row, LAYERS + row.core, f"model.layers.{layer}.", layer, rank, tp)
    if stage == len(counts) - 1:
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
    lead = tuple(place for place in (layer, row.expert) if place is not None)
    counts = (model.map.shape.num_layers, model.map.num_experts)[: len(lead)]
    for start in starts:
        shape = (*whole[: row.dim], step, *whole[row.dim + 1 :])
        offsets = tuple(start if axis == row.dim else 0 for axis in range(len(whole)))
        name = f"{key}/{'.'.join(map(str, (*lead, *offsets)))}"
        piece = Piece(name, row.dim, cut(joined, start, start + step), shape, lead=len(lead))
        yield _Chunk(piece, key, (*counts, *whole), (*lead, *offsets))


def _extra_state(model: Model, counts: Sequence[int], stage: int) -> dict[str, list[None]]:
    layers, experts = model.map.shape.num_layers, model.map.num_experts
    found: dict[str, list[None]] = {}
    for layer in _layers(counts, stage):
        for row in model.map.layer_rows:
            if row.has_extra_state:
                place = f"{layer}_{layers}" if row.expert is None else f"{layer}.{row.expert}_{layers}.{experts}"
                found[f"{LAYERS}{row.core.removesuffix('weight')}_extra_state/shard_{place}"] = [None]
    return found


def _result(index: MetadataIndex, name: str, place: Sequence[int]) -> WriteResult:
    offset, length = place
    return WriteResult(index, length, _StorageInfo(name, offset, length))
