"""Files of tensors, made with their space reserved first and filled afterwards in any order.

Neither safetensors nor torch.save writes a file without holding all of its tensors. A safetensors file is a short
header and the bytes; for torch.save, torch itself can leave the bytes out (`skip_data`) and tell where they belong
(tensors loaded under `FakeTensorMode` know their offset).
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data

from ee_scale.conversion.archive import walk
from ee_scale.conversion.tensors import Extent, Piece, Stored
from ee_scale.conversion.unpickle import load_part, load_safely
from ee_scale.errors import UserError, one_line
from ee_scale.reading import parse_json

ST_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ST_DTYPES = {name: dtype for dtype, name in ST_NAMES.items()}

with FakeTensorMode():  # torch sets its CUDA guard on entering, without a lock: here, before threads enter it
    pass


class TargetFile(Protocol):
    """A file to be written.

    Attributes:
        name: relative to the output folder; pieces: what goes into it.
    """

    name: str
    pieces: list[Piece]

    def create(self, path: Path) -> list[Stored]:
        """Make the file with empty space for every piece; returns where each belongs."""


@dataclass
class SafetensorsFile:
    """`model.safetensors` or one of its shards."""

    name: str
    pieces: list[Piece]

    def create(self, path: Path) -> list[Stored]:
        """As `TargetFile.create`."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for piece in self.pieces:
            header[piece.key] = {
                "dtype": ST_NAMES[piece.dtype],
                "shape": list(piece.shape),
                "data_offsets": [end, end + piece.nbytes],
            }
            end += piece.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            reserve(file.fileno(), 8 + len(text) + end)
        start = 8 + len(text)
        begins = [start + header[piece.key]["data_offsets"][0] for piece in self.pieces]
        return [
            Stored(piece, Extent(path, begin, piece.shape, piece.dtype))
            for piece, begin in zip(self.pieces, begins, strict=True)
        ]


@dataclass
class PickleFile:
    """A file of torch.save.

    Attributes:
        build: tensors by key -> what is saved: nested dicts.
    """

    name: str
    pieces: list[Piece]
    build: Callable[[dict[str, torch.Tensor]], Any]

    def create(self, path: Path) -> list[Stored]:
        """As `TargetFile.create`."""
        with FakeTensorMode():
            tensors = {piece.key: torch.empty(piece.shape, dtype=piece.dtype) for piece in self.pieces}
            content = self.build(tensors)
        _save(content, path)
        with path.open("r+b") as file:
            reserve(file.fileno(), os.fstat(file.fileno()).st_size)
        with FakeTensorMode():
            found = load_safely(path, path)
        keys = {id(tensor): key for key, tensor in tensors.items()}
        pairs = zip(walk(content), walk(found), strict=True)
        extents = {keys[id(ours)]: tensor_extent(path, theirs) for ours, theirs in pairs if id(ours) in keys}
        return [Stored(piece, extents[piece.key]) for piece in self.pieces]


@dataclass
class ArchivesFile:
    """`__<rank>_0.distcp`: one small archive of torch.save after another, as torch's distributed checkpoints have it.

    Attributes:
        objects: what is stored beside tensors, by key.
        places: after `create`, (offset, length) of each archive by key of the piece or object.
    """

    name: str
    pieces: list[Piece]
    objects: dict[str, Any] = field(default_factory=dict)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)

    def create(self, path: Path) -> list[Stored]:
        """As `TargetFile.create`."""
        with path.open("w+b") as file:
            for key, value in self.objects.items():
                self.places[key] = self._append(file, value)
            for piece in self.pieces:
                with FakeTensorMode():
                    tensor = torch.empty(piece.stored_shape, dtype=piece.dtype)
                self.places[piece.key] = self._append(file, tensor)
            reserve(file.fileno(), file.tell())
        with path.open("rb") as file:
            extents = [archive_extent(path, file, *self.places[piece.key]) for piece in self.pieces]
        return [Stored(piece, extent.at(*[0] * piece.lead)) for piece, extent in zip(self.pieces, extents, strict=True)]

    def _append(self, file: IO[bytes], value: object) -> tuple[int, int]:
        start = file.tell()
        _save(value, file)
        return start, file.tell() - start


def archive_extent(path: Path, file: IO[bytes], offset: int, length: int) -> Extent:
    """Where the tensor of one archive inside a file lies. Raises `UserError`."""
    with FakeTensorMode():
        tensor = load_part(path, file, offset, length)
    if not isinstance(tensor, torch.Tensor):
        raise UserError(f"{path}: a {type(tensor).__name__} at byte {offset}, where its index has a tensor")
    extent = tensor_extent(path, tensor)
    return Extent(path, extent.offset + offset, extent.shape, extent.dtype)


def tensor_extent(path: Path, tensor: torch.Tensor) -> Extent:
    """Where a tensor lies that was loaded under `FakeTensorMode`. Raises `UserError` if its bytes are not in order."""
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None or not tensor.is_contiguous():
        raise UserError(f"{path}: a tensor of shape {list(tensor.shape)} is not stored in order; save it contiguous")
    offset = start + tensor.storage_offset() * tensor.element_size()
    return Extent(path, offset, tuple(tensor.shape), tensor.dtype)


def safetensors_extents(path: Path) -> dict[str, Extent]:
    """The tensors of a safetensors file by name. Raises `UserError` if it is broken or cut off."""
    try:
        with safe_open(path, framework="pt"):  # the library checks header and length
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(size).decode())
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from error
    header.pop("__metadata__", None)
    return {
        name: Extent(path, 8 + size + entry["data_offsets"][0], tuple(entry["shape"]), _dtype(path, name, entry))
        for name, entry in header.items()
    }


def reserve(file: int, size: int) -> None:
    """Take the space of a file now, so that a full disk is met before any work is done. Raises OSError."""
    if size:
        os.posix_fallocate(file, 0, size)


def _save(value: object, target: Path | IO[bytes]) -> None:
    """torch.save that leaves out the bytes of tensors. Raises OSError."""
    try:
        with skip_data(materialize_fake_tensors=True):
            torch.save(value, target)
    except RuntimeError as error:  # what torch's archive writer makes of a full disk
        raise OSError(f"torch.save: {one_line(error)}") from error


def _dtype(path: Path, name: str, entry: Mapping[str, Any]) -> torch.dtype:
    if entry["dtype"] not in ST_DTYPES:
        raise UserError(f"{path}: '{name}' is of type {entry['dtype']}; known: {', '.join(ST_DTYPES)}")
    return ST_DTYPES[entry["dtype"]]
