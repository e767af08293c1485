"""The one idea of the converters: a stored tensor is spans of the model's tensors, joined along one dimension.

The model's tensors are those of its Hugging Face folder (`model.layers.0.self_attn.q_proj.weight`, ...). A piece of any
format says which rows (or columns) of them it holds; a map from one format to another is then the overlap of spans.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Extent:
    """A row-major tensor as bytes of a file.

    Attributes:
        path: the file; offset: its first byte; shape, dtype: as stored.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def part(self, start: int, stop: int) -> "Extent":
        """Rows [start, stop) along the first dimension."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return Extent(self.path, self.offset + start * row, (stop - start, *self.shape[1:]), self.dtype)

    def at(self, *places: int) -> "Extent":
        """What lies at these places of the leading dimensions, without those."""
        found = self
        for place in places:
            part = found.part(place, place + 1)
            found = Extent(part.path, part.offset, part.shape[1:], part.dtype)
        return found


@dataclass(frozen=True)
class Update:
    """A low-rank update that is merged on the way: `tensor + (up @ down) * scale`, by the names of its halves."""

    up: str
    down: str
    scale: float = 1.0


@dataclass(frozen=True)
class Span:
    """Rows (or columns) [start, stop) of a tensor of the model; without a name: zeros.

    Attributes:
        update: merged into it.
    """

    name: str | None
    start: int
    stop: int
    update: Update | None = None

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int) -> "Span":
        """[start, stop) of this span, counted from its own start."""
        return Span(self.name, self.start + start, self.start + stop, self.update)


@dataclass(frozen=True)
class Piece:
    """A tensor as one format stores it.

    Attributes:
        key: its name in the file; dim: where the spans are joined; shape: of the stored tensor.
        copy: the same values lie in an earlier piece too (norms on every tensor rank, a tied output matrix).
        lead: how many more axes the file has in front, of length 1; dtype: number type to write.
    """

    key: str
    dim: int
    spans: tuple[Span, ...]
    shape: tuple[int, ...]
    copy: bool = False
    lead: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        return (1,) * self.lead + self.shape

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Stored:
    """A piece and where it lies.

    Attributes:
        name: in a Megatron checkpoint, its name there with the layer counted over the whole model; place: its order
            among the pieces of that name (tensor rank, or offset).
    """

    piece: Piece
    extent: Extent
    name: str = ""
    place: int = 0


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the model: its shape, and the dimension that tensor parallelism cuts (0 where it cuts none)."""

    shape: tuple[int, ...]
    dim: int = 0

    def whole(self, name: str) -> Span:
        """All of it."""
        return Span(name, 0, self.shape[self.dim])


def cut(spans: Iterable[Span], start: int, stop: int) -> tuple[Span, ...]:
    """[start, stop) of the joined spans."""
    found, at = [], 0
    for span in spans:
        first, last = max(start - at, 0), min(stop - at, len(span))
        if first < last:
            found.append(span.part(first, last))
        at += len(span)
    return tuple(found)
