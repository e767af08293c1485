"""Fill a stored tensor from the spans of another checkpoint, a block of rows at a time.

Memory is a few blocks per worker, whatever the size of a tensor.
"""

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from ee_scale.conversion.tensors import Extent, Piece, Span, Stored, Update
from ee_scale.conversion.values import Values
from ee_scale.errors import UserError

BLOCK = 8 << 20  # bytes
TOGETHER = 256  # rows of an update that are computed in one product
Look = Callable[[torch.Tensor, torch.Tensor], None]  # a block before and after


@dataclass(frozen=True)
class Slab:
    """[start, stop) along a tensor's dimension of the model, found in [at, at + length) of a stored one."""

    extent: Extent
    dim: int
    start: int
    stop: int
    at: int


class Source:
    """Where every span of the model's tensors lies."""

    def __init__(
        self, stored: Iterable[Stored], values: Values | None = None, updates: Mapping[str, Update] | None = None
    ):
        """`values`: what looks at everything that is read; None: one of its own. `updates`: merged, by tensor."""
        self.values, self.updates = values or Values(), updates or {}
        self._slabs: dict[str, list[Slab]] = defaultdict(list)
        for item in stored:
            at = 0
            for span in item.piece.spans:
                if span.name is not None and not item.piece.copy:
                    slab = Slab(item.extent, item.piece.dim, span.start, span.stop, at)
                    self._slabs[span.name].append(slab)
                at += len(span)
        for slabs in self._slabs.values():
            slabs.sort(key=lambda slab: slab.start)

    def names(self) -> set[str]:
        """Tensors of the model of which there is any part."""
        return set(self._slabs)

    def covers(self, name: str, length: int) -> bool:
        """Whether all of a tensor is there, once."""
        at = 0
        for slab in self._slabs.get(name, ()):
            if slab.start != at:
                return False
            at = slab.stop
        return at == length

    def dtype(self, name: str) -> torch.dtype:
        """The number type that a tensor is stored in."""
        return self._slabs[name][0].extent.dtype

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor; one that an update is merged into, in fp32."""
        slabs = self._slabs[name]
        shape, dim = list(slabs[0].extent.shape), slabs[0].dim
        shape[dim] = slabs[-1].stop
        piece = Piece(name, dim, (Span(name, 0, shape[dim]),), tuple(shape))
        dtype = torch.float32 if name in self.updates else self.dtype(name)
        blocks = [block for _, block in blocks_of(piece, self, dtype)]
        return torch.cat(blocks).view(shape)

    def fill(self, span: Span, out: torch.Tensor, dim: int, rows: tuple[int, int]) -> None:
        """Write a span into `out` [rows, width]: whole rows (dim 0), or `rows` of the span's columns (dim 1).

        Raises `UserError` if it is not wholly there, or holds a number that the type of `out` has not.
        """
        if span.name is None:
            out.zero_()
            return
        updates = [update for update in (self.updates.get(span.name), span.update) if update is not None]
        if not updates:
            self._copy(span, out, dim, rows)
            return
        whole = torch.empty(out.shape)
        self._copy(span, whole, dim, rows)
        for update in updates:
            whole += self._product(update, *(((span.start, span.stop), None) if dim == 0 else (rows, span)))
        out.copy_(whole)
        self.values.look(span.name, whole, out)

    def _copy(self, span: Span, out: torch.Tensor, dim: int, rows: tuple[int, int]) -> None:
        done = 0
        for slab in self._slabs[span.name]:
            start, stop = max(span.start, slab.start), min(span.stop, slab.stop)
            if start >= stop:
                continue
            at, length = slab.at + start - slab.start, stop - start
            part = out.narrow(dim, start - span.start, length)
            look = partial(self.values.look, span.name)
            if dim == 0:
                _read(slab.extent, (at, at + length), None, part, look)
            else:
                _read(slab.extent, rows, (at, at + length), part, look)
            done += length
        if done != len(span):
            raise UserError(
                f"'{span.name}': the source holds {done} of the {len(span)} rows [{span.start}, {span.stop})"
            )

    def _product(self, update: Update, rows: tuple[int, int], columns: Span | None) -> torch.Tensor:
        """(up @ down) * scale in fp32: `rows` of it, all columns or those of a span.

        Always of the same rows at a time, so that a number does not depend on how the tensor is cut.
        """
        down = self.read(update.down).float()
        first = rows[0] // TOGETHER * TOGETHER
        last = min(-(-rows[1] // TOGETHER) * TOGETHER, self._slabs[update.up][-1].stop)
        up = torch.empty(last - first, down.shape[0], dtype=self.dtype(update.up))
        self._copy(Span(update.up, first, last), up, 0, (0, last - first))
        product = torch.cat([part @ down for part in up.float().split(TOGETHER)]) * update.scale
        product = product[rows[0] - first : rows[1] - first]
        return product if columns is None else product[:, columns.start : columns.stop]


def block_rows(piece: Piece) -> int:
    """How many rows of a piece are filled at once."""
    return max(1, BLOCK // (4 * math.prod(piece.shape[1:])))


def fill_rows(piece: Piece, source: Source, first: int, block: torch.Tensor) -> None:
    """`block` [rows, width] = the rows of a piece from `first` on. A vector is a matrix of width 1."""
    last, at = first + len(block), 0
    for span in piece.spans:
        if piece.dim == 0:
            start, stop = max(first, at), min(last, at + len(span))
            if start < stop:
                part = block[start - first : stop - first]
                source.fill(span.part(start - at, stop - at), part, 0, (0, stop - start))
        else:
            source.fill(span, block[:, at : at + len(span)], 1, (first, last))
        at += len(span)


def blocks_of(piece: Piece, source: Source, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
    """The rows of a piece, in order: (first row, block [rows, width] in `dtype`)."""
    for first in range(0, piece.shape[0], step := block_rows(piece)):
        block = torch.empty(min(step, piece.shape[0] - first), math.prod(piece.shape[1:]), dtype=dtype)
        fill_rows(piece, source, first, block)
        yield first, block


@dataclass(frozen=True)
class Part:
    """`rows` of a target from `first` on: what is read, written and hashed at once."""

    target: Stored
    first: int
    rows: int

    @property
    def extent(self) -> Extent:
        """Where it lies in the file."""
        return self.target.extent.part(self.first, self.first + self.rows)


def parts_of(targets: Iterable[Stored]) -> Iterator[Part]:
    """All parts of some targets, in their order."""
    for target in targets:
        height = target.piece.shape[0]
        for first in range(0, height, step := block_rows(target.piece)):
            yield Part(target, first, min(step, height - first))


def write_part(part: Part, source: Source, file: int, buffer: torch.Tensor) -> memoryview:
    """Fill a part's bytes in an open file (a descriptor). Returns them; they lie in `buffer` [bytes], uint8."""
    extent = part.extent
    data = buffer[: extent.nbytes]
    fill_rows(part.target.piece, source, part.first, data.view(extent.dtype).view(part.rows, -1))
    left, at = memoryview(data.numpy()), extent.offset
    while left:
        written = os.pwrite(file, left, at)
        left, at = left[written:], at + written
    return memoryview(data.numpy())


def differing_copies(stored: Iterable[Stored], source: Source) -> list[Stored]:
    """What is kept in several places and is not the same everywhere: norms of tensor ranks, a tied output matrix."""
    found = []
    for item in stored:
        if item.piece.copy:
            for first, block in blocks_of(item.piece, source, item.extent.dtype):
                theirs = torch.empty_like(block)
                _read(item.extent, (first, first + len(block)), None, theirs, _unseen)
                padding = sum(len(span) for span in item.piece.spans if span.name is None)
                kept = max(0, min(len(block), item.extent.shape[0] - padding - first))  # padding may hold anything
                if not torch.equal(block[:kept], theirs[:kept]):
                    found.append(item)
                    break
    return found


def read_extent(extent: Extent) -> torch.Tensor:
    """A whole stored tensor."""
    out = torch.empty(extent.shape[0], math.prod(extent.shape[1:]), dtype=extent.dtype)
    _read(extent, (0, extent.shape[0]), None, out, _unseen)
    return out.view(extent.shape)


def _unseen(before: torch.Tensor, after: torch.Tensor) -> None:
    """For what is read and goes nowhere."""


def _read(
    extent: Extent, rows: tuple[int, int], columns: tuple[int, int] | None, out: torch.Tensor, look: Look
) -> None:
    """`out` [rows, columns] = part of a stored matrix (or vector), in the type of `out`; `look` sees both."""
    first, last = rows
    width = math.prod(extent.shape[1:])
    step = max(1, BLOCK // max(1, width * extent.dtype.itemsize))
    whole = columns is None or columns == (0, width)
    straight = whole and out.dtype == extent.dtype and out.is_contiguous()
    with extent.path.open("rb", buffering=0) as file:
        for start in range(first, last, step):
            part = extent.part(start, min(start + step, last))
            target = out[start - first : start - first + part.shape[0]]
            values = target if straight else torch.empty(part.shape[0], width, dtype=extent.dtype)
            _read_bytes(file.fileno(), part, values)
            if not straight:
                values = values if columns is None else values[:, slice(*columns)]
                target.copy_(values)
            look(values, target)


def _read_bytes(file: int, extent: Extent, out: torch.Tensor) -> None:
    """All of an extent, into a contiguous tensor of its type. Raises `UserError` where the file ends before."""
    left, at = memoryview(out.view(torch.uint8).numpy()).cast("B"), extent.offset
    while left:
        count = os.preadv(file, [left], at)
        if not count:
            raise UserError(f"{extent.path}: cut off: it ends at byte {at:,}, where a tensor should go on")
        left, at = left[count:], at + count
