"""Read Megatron-Core's `torch_dist` checkpoints, from any grid and of any of its layouts (see `torch_dist`).

Layers are stacked, or have a key each, and so have experts; gates (`_w`) and ups (`_v`) of `linear_fc1` may have keys
of their own.
"""

import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product, starmap
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
HALVES = ("_w", "_v")  # of the gates, of the ups
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
    rows = _expected(model)
    known = {plain: _meaning(plain, index.state_dict_metadata[key].size, rows) for plain, key in entries.items()}
    for plain, meaning in known.items():
        if meaning is not None:
            _check_size(iteration, plain, index.state_dict_metadata[entries[plain]].size, meaning, model)
    found = {part for meaning in known.values() if meaning for part in meaning.parts()}
    unknown = [plain for plain, meaning in known.items() if meaning is None]
    check_whole(iteration, [*starmap(_told, found), *unknown], starmap(_told, _wanted(model)))
    with _Files(iteration) as files:
        for plain, key in entries.items():
            for chunk in index.state_dict_metadata[key].chunks:
                extent = files.extent(_place(iteration, index, MetadataIndex(key, chunk.offsets)))
                if extent.shape != tuple(chunk.sizes):
                    raise UserError(
                        f"{extent.path}: '{plain}' at {list(chunk.offsets)} has shape {list(extent.shape)}, "
                        f"its index says {list(chunk.sizes)}"
                    )
                yield from _pieces(iteration, plain, known[plain], chunk, extent, model)


@dataclass(frozen=True)
class _Meaning:
    """What a key holds.

    Attributes:
        rows: one, or as many as there are experts, which then are the last of its leading axes (`by_expert`).
        layers: one (None: it belongs to no layer), or all, which then are the first of its leading axes (`by_layer`).
        half: gates or ups alone.
    """

    rows: tuple[Row, ...]
    layers: Sequence[int | None]
    by_layer: bool = False
    by_expert: bool = False
    half: int | None = None

    @property
    def lead(self) -> tuple[int, ...]:
        """Lengths of its leading axes."""
        return (*[len(self.layers)] * self.by_layer, *[len(self.rows)] * self.by_expert)

    def parts(self) -> Iterator[tuple[Row, int | None]]:
        """(row, layer) in the order of its leading axes."""
        return ((row, layer) for layer in self.layers for row in self.rows)


def _expected(model: Model) -> dict[str, tuple[Row, ...]]:
    """Name inside a layer -> what it holds: a row, or those of all experts."""
    found: dict[str, tuple[Row, ...]] = {}
    for row in model.map.layer_rows:
        for name in filter(None, (row.core, row.local, row.alias)):
            found[name] = (*found.get(name, ()), row)
        if row.expert is not None:
            found[row.numbered] = (row,)
    gated = {name: rows for name, rows in found.items() if rows[0].rule is Rule.GATE_UP}
    return found | {f"{name}{half}": rows for name, rows in gated.items() for half in HALVES}


def _wanted(model: Model) -> Iterator[tuple[Row, int | None]]:
    top = (EMBEDDING, FINAL_NORM) if model.config.tie_word_embeddings else (EMBEDDING, FINAL_NORM, HEAD)
    yield from ((row, None) for row in top)
    yield from ((row, layer) for layer in range(model.map.shape.num_layers) for row in model.map.layer_rows)


def _meaning(plain: str, size: Sequence[int], known: dict[str, tuple[Row, ...]]) -> _Meaning | None:
    for row in (EMBEDDING, FINAL_NORM, HEAD):
        if plain == row.core:
            return _Meaning((row,), (None,))
    if not plain.startswith(LAYERS):
        return None
    name, layers = plain.removeprefix(LAYERS), range(size[0])
    if match := re.match(r"(\d+)\.", name):
        name, layers = name[match.end() :], range(int(match[1]), int(match[1]) + 1)
    if name not in known:
        return None
    rows = known[name]
    half = HALVES.index(name[-2:]) if name.endswith(HALVES) else None
    by_expert = rows[0].expert is not None and name.startswith(rows[0].core)
    return _Meaning(rows, layers, match is None, by_expert, half)


def _told(row: Row, layer: int | None) -> str:
    return row.core if layer is None else f"{LAYERS}{layer}.{row.numbered}"


def _check_size(iteration: Path, plain: str, size: Sequence[int], meaning: _Meaning, model: Model) -> None:
    shape = list(model.map.stored_shape(meaning.rows[0]))
    if meaning.half is not None:
        shape[0] //= 2
    lead = list(meaning.lead)
    if meaning.by_layer:
        lead[0] = model.map.shape.num_layers
    if list(size) != lead + shape:
        axes = ["layers"] * meaning.by_layer + ["experts"] * meaning.by_expert
        raise UserError(
            f"{iteration}: '{plain}' has shape {list(size)}, but the config asks for {lead + shape}"
            + (f" ({', '.join(axes)} in front)" if axes else "")
        )


def _pieces(
    iteration: Path, plain: str, meaning: _Meaning, chunk: ChunkStorageMetadata, extent: Extent, model: Model
) -> Iterator[Stored]:
    """The spans of one chunk, layer by layer and expert by expert."""
    lead = len(meaning.lead)
    first, offsets, sizes = chunk.offsets[:lead], list(chunk.offsets[lead:]), list(chunk.sizes[lead:])
    for place in product(*map(range, chunk.sizes[:lead])):
        numbers = [start + step for start, step in zip(first, place, strict=True)]
        layer = meaning.layers[numbers[0] if meaning.by_layer else 0]
        row = meaning.rows[numbers[-1] if meaning.by_expert else 0]
        joined = model.map.joined(row, "" if layer is None else f"model.layers.{layer}.")
        if meaning.half is not None:
            joined = joined[meaning.half : meaning.half + 1]
        shape = list(model.map.stored_shape(row))
        if any(offsets[axis] or sizes[axis] != shape[axis] for axis in range(len(shape)) if axis != row.dim):
            raise UserError(f"{iteration}: '{plain}' is cut at {offsets} along another axis than tensor ranks cut it")
        start = offsets[row.dim]
        spans = cut(joined, start, start + sizes[row.dim])
        order = start + (meaning.half or 0) * shape[0] // 2
        name = row.core if layer is None else f"layers.{layer}.{row.numbered}"
        yield Stored(Piece(plain, row.dim, spans, tuple(sizes)), extent.at(*place), name, order)


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
