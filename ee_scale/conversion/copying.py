"""Fill a stored tensor from the spans of another checkpoint, a block of rows at a time.

Memory is a few blocks per worker, whatever the size of a tensor.
"""

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
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


def blocks_of(piece: Piece, source: Source, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
    """The rows of a piece, in order: (first row, block [rows, width] in `dtype`). A vector is a matrix of width 1."""
    height = piece.shape[0]
    width = math.prod(piece.shape[1:])
    step = max(1, BLOCK // (width * 4))
    for first in range(0, height, step):
        last = min(first + step, height)
        block = torch.empty(last - first, width, dtype=dtype)
        at = 0
        for span in piece.spans:
            if piece.dim == 0:
                start, stop = max(first, at), min(last, at + len(span))
                if start < stop:
                    part = block[start - first : stop - first]
                    source.fill(span.part(start - at, stop - at), part, 0, (0, stop - start))
            else:
                source.fill(span, block[:, at : at + len(span)], 1, (first, last))
            at += len(span)
        yield first, block


def write_piece(target: Stored, source: Source, file: int, moved: Callable[[int], None]) -> None:
    """Fill a target's bytes in an open file (a descriptor). `moved` is told the bytes as they go."""
    extent = target.extent
    row = math.prod(extent.shape[1:]) * extent.dtype.itemsize
    for first, block in blocks_of(target.piece, source, extent.dtype):
        data = memoryview(block.view(torch.uint8).numpy()).cast("B")
        at = extent.offset + first * row
        while data:
            written = os.pwrite(file, data, at)
            data, at = data[written:], at + written
        moved(block.nbytes)


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
    size = extent.dtype.itemsize
    step = max(1, BLOCK // max(1, width * size))
    for start in range(first, last, step):
        stop = min(start + step, last)
        # Mapped and let go block by block: only the pages that are read count, and only while they are.
        mapped = np.memmap(
            extent.path, np.uint8, "c", extent.offset + start * width * size, ((stop - start), width * size)
        )
        part = mapped if columns is None else mapped[:, columns[0] * size : columns[1] * size]
        values = torch.from_numpy(part).view(extent.dtype)
        target = out[start - first : stop - first]
        look(values, target.copy_(values))
