"""Drafts of an exit whose early layers are int8 copies.

They share the model's cache, not its states: drafting attends to the true keys and values of the text and writes its
own behind it, where the pass that verifies, through every layer, writes the true ones before it reads them. So nothing
has to be caught up with: no hole behind the last draft, no prompt to run twice, no second cache. D hidden size.
"""

from threading import get_ident

import torch

from .drafting import Drafting
from .heads import ExitTaps
from .int8_layers import int8_layers
from .layer_runner import Block, LayerRunner
from .sequences import Sequences
from .short_head import ShortHead
from .sources import Cycle, Draft, ExitSource

EACH = 0.5, 2.0  # a draft until it is measured, in layers: an int8 layer, the look at the exit


class Int8Source(ExitSource):
    """An exit behind the first k layers in int8."""

    def __init__(
        self, k: int, runner: LayerRunner, sequences: Sequences, drafting: Drafting, short: ShortHead | None = None
    ):
        super().__init__(k, runner, sequences, drafting, short)
        self.name, self.shared, self.each = f"exit {k} int8", 0, EACH[0] * k + EACH[1]
        self.layers = int8_layers(runner.model, k)

    def early(self, cycle: Cycle, drafted: int, tokens: torch.Tensor) -> tuple[Block, torch.Tensor]:
        runner = self.runner
        block = runner.block([start + drafted for start in cycle.starts], 1)
        hidden = runner.embed(tokens[:, None])
        if runner.taps is None:
            return block, runner.run_copies(self.layers, hidden, block)
        taps = ExitTaps(runner.spec, {self.k: self.layers[-1]}, get_ident())
        try:
            hidden = runner.run_copies(self.layers, hidden, block)
        finally:
            taps.remove()
        runner.taps.taps |= taps.pop()
        return block, hidden

    def finish(self, cycle: Cycle, draft: Draft) -> None:
        """Verification begins at layer 0."""

    def agrees(self, runner: LayerRunner, want: torch.Tensor, block: Block, at: slice) -> torch.Tensor | None:
        """The exit behind the true layers tells it."""
