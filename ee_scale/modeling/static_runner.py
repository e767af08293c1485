"""A `LayerRunner` whose passes after the prompt have few different shapes, so that they can be recorded.

Rows that finish stay as padding behind the others, keys and values lie where they lie, passes look at a multiple of
`BUCKET` columns behind a mask, and positions are tensors. What callers give and get is of the unfinished rows alone.
B rows at the start, R unfinished, q positions, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Hashable
from functools import partial

import torch
from torch import nn

from .heads import ModelWithExits, Tap
from .layer_runner import Block, LayerRunner
from .short_head import ShortHead
from .step_graphs import StepGraphs, Tensors, recorder
from .transfers import send

BUCKET = 256  # columns
LONGEST = 16  # positions of a pass that is worth recording; what an exit's own layer has missed may be longer


class StaticRunner(LayerRunner):
    """The prompt runs as in any other; from `freeze` on each part of a step is one call of `StepGraphs`."""

    def __init__(self, model: ModelWithExits, exit_layers: tuple[int, ...], batch_size: int, capacity: int):
        super().__init__(model, exit_layers, batch_size, _bucketed(capacity))
        self.graphs = StepGraphs(recorder(self.device))
        self.frozen = False
        self.live = self.rows = batch_size
        self.sizes = (0, 0)  # of what recordings write to and read

    def freeze(self) -> None:
        """The prompt is over."""
        self.frozen = True

    def keep_rows(self, rows: list[int]) -> None:
        """The others are padding."""
        super().keep_rows(rows)
        self.live = len(rows)

    def clear(self) -> None:
        """All rows are padding."""
        super().clear()
        self.live = 0

    def apart(self, rows: int, capacity: int) -> LayerRunner:
        """For prompts, which come in all shapes."""
        other = super().apart(rows, capacity)
        other.frozen, other.live, other.rows = False, rows, rows
        return other

    def take_in(self, first: int, other: LayerRunner, rows: list[int], length: int) -> None:
        """They are no padding any more."""
        self.cache.capacity = max(self.cache.capacity, _bucketed(length))
        super().take_in(first, other, rows, length)
        self.live = first + len(rows)

    def block(self, starts: list[int], length: int) -> Block:
        """The block of `length` positions from `starts` [R] on."""
        if not self.frozen:
            return super().block(starts, length)
        end = _bucketed(max(starts) + length)
        if end > self.cos.shape[1]:
            self._rotary_table(end)
        self.cache.focus(None, None, end)
        sizes = self.cache.capacity, self.cos.shape[1]
        if self.sizes != sizes:
            self.graphs.clear()
            self.sizes = sizes
        columns = send(starts, self.device)[:, None] + self.numbers[:length]
        return Block(starts, length, None, columns, end, (self.cos, self.sin))  # whole tables, read by what is recorded

    def _run(self, hidden: torch.Tensor, block: Block, first: int, last: int) -> torch.Tensor:
        if not self.frozen:
            return super()._run(hidden, block, first, last)
        self.calls[first, last] += 1
        self.positions[first, last] += hidden.shape[0] * hidden.shape[1]
        part = partial(self._layers, range(first, last), last, block.end)
        hidden, *tap = self._call(("layers", first, last, block.end), part, hidden, block.columns)
        if tap:  # the hooks have not been called
            self.taps.taps[last] = Tap(*tap)
        return hidden

    def _layers(self, indices: range, last: int, end: int, hidden: torch.Tensor, columns: torch.Tensor) -> Tensors:
        """Some layers on [B, q, D] at positions [B, q]: hidden states, and the tap of an exit behind them."""
        block = self._everywhere(columns, end)
        for index in indices:
            hidden = self._layer(self.layers[index], self.types[index], hidden, block)
        taps = {} if self.taps is None else self.taps.pop()
        tap = taps.get(last, ())
        return hidden, *(value for value in tap if value is not None)

    def _exit_layer_pass(self, layer: nn.Module, hidden: torch.Tensor, block: Block) -> torch.Tensor:
        if not self.frozen:
            return super()._exit_layer_pass(layer, hidden, block)
        part = partial(self._one_layer, layer, block.end)
        return self._call(("exit layer", id(layer), block.end), part, hidden, block.columns)[0]

    def _one_layer(self, layer: nn.Module, end: int, hidden: torch.Tensor, columns: torch.Tensor) -> Tensors:
        return (self._layer(layer, self.types[-1], hidden, self._everywhere(columns, end)),)

    def _everywhere(self, columns: torch.Tensor, end: int) -> Block:
        """All rows at positions [B, q]: nothing in it is known to the host."""
        block = Block([], columns.shape[1], None, columns, end, self._rotary(columns))
        self.cache.focus(None, columns, end)
        return block

    def final_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, ..., D] after the last layer -> [N, ..., V]."""
        if not self.frozen or len(hidden) != self.live:
            return super().final_logits(hidden)
        return self._call("final head", self._final, hidden)[0]

    def _final(self, hidden: torch.Tensor) -> Tensors:
        return (super().final_logits(hidden),)

    def _head_logits(self, k: int, tap: Tap, shortlist: ShortHead | None) -> torch.Tensor:
        if not self.frozen:
            return super()._head_logits(k, tap, shortlist)
        part = partial(self._head, k, shortlist)
        return self._call(("exit head", k), part, *(value for value in tap if value is not None))[0]

    def _head(self, k: int, shortlist: ShortHead | None, *tap: torch.Tensor) -> Tensors:
        return (super()._head_logits(k, Tap(*tap), shortlist),)

    def _call(self, name: Hashable, part: Callable[..., Tensors], *inputs: torch.Tensor) -> Tensors:
        """A part on [R, ...], with rows of padding: they write over the first columns of rows that nobody reads."""
        padded = inputs
        if self.live < self.rows:
            padded = tuple(_padded(value, self.rows) for value in inputs)
        outputs = (
            part(*padded) if inputs[0].shape[1] > LONGEST and inputs[0].dim() > 2 else self.graphs(name, part, *padded)
        )
        return tuple(value[: self.live] for value in outputs)


def _padded(value: torch.Tensor, rows: int) -> torch.Tensor:
    """[R, ...] -> [rows, ...], zeros behind."""
    whole = value.new_zeros(rows, *value.shape[1:])
    whole[: len(value)] = value
    return whole


def _bucketed(length: int) -> int:
    return -(-length // BUCKET) * BUCKET
