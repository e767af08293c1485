"""Which layers a decoder can lose, by what it says without them: one is dropped, the others are measured again.

The worth of a layer is KL(full net || net without it and without those dropped before) on a few sequences. Measuring
again after every drop is SLEB's greedy search (arXiv 2402.09025), with the distance to the full net's distribution in
the place of the loss, as in FinerCut (arXiv 2405.18218). A net without layer i computes up to i what the net with it
does: it starts from that state, half of a forward on average.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from ee_scale.elastic.stage import ElasticStage
from ee_scale.elastic.subnet import drop_in_turn
from ee_scale.errors import UserError
from ee_scale.exits.losses import chunk_tokens
from ee_scale.exits.vocab_parallel import kl_divergence, mask_padding


def divergence_order(
    stage: ElasticStage, batches: Sequence[dict[str, torch.Tensor]], parts: int, drops: int
) -> list[int]:
    """Layers of a causal LM in the order in which they are dropped, the same on every rank. All ranks call it.

    batches: the same on every rank; with a 'loss_mask' only the tokens that it keeps count. parts: as for `drop_order`.
    drops: layers that are chosen by measuring; nobody asks for the order of those behind them.
    Raises `UserError` where what the net says is no number.
    """
    return drop_in_turn(stage.map.shape.num_layers, parts, _Divergences(stage, batches, drops).without)


class _Divergences:
    """KL of the net without a layer, summed over all sequences.

    Attributes:
        finals: last stage: what the head of the full net reads, batch by batch.
        known: of the latest measurement.
    """

    def __init__(self, stage: ElasticStage, batches: Sequence[dict[str, torch.Tensor]], drops: int):
        self.stage, self.grid, self.drops = stage, stage.grid, drops
        self.batches = [{name: tensor.to(stage.grid.device) for name, tensor in batch.items()} for batch in batches]
        self.finals: list[torch.Tensor] = []
        self.known: dict[int, float] = {}

    @torch.no_grad()
    def without(self, dropped: Sequence[int], candidates: Sequence[int]) -> Mapping[int, float]:
        """Of each candidate, when `dropped` are gone already."""
        if len(dropped) < self.drops:
            kept = [i for i in range(self.stage.map.shape.num_layers) if i not in dropped]
            try:
                self.known = self._measure(kept, sorted(candidates))
            finally:
                self._select(self.stage.map.shape.full.layers)
        return {i: self.known.get(i, 0.0) for i in candidates}

    def _measure(self, kept: list[int], candidates: list[int]) -> dict[int, float]:
        sums = torch.zeros(len(candidates), dtype=torch.float64)
        for number, batch in enumerate(self.batches):
            sums += self._of_batch(number, batch, kept, candidates).cpu()
        layout = self.grid.layout
        dist.broadcast(sums, layout.rank(layout.pp - 1, 0, 0), group=self.grid.metrics_group)
        found = dict(zip(candidates, sums.tolist(), strict=True))
        if broken := [i for i, value in found.items() if not torch.tensor(value).isfinite()]:
            words = f"the logits of the model, or of that without layer {broken[0]}, are no numbers"
            raise UserError(f"importance.layers=divergence: {words}")
        return found

    def _of_batch(
        self, number: int, batch: dict[str, torch.Tensor], kept: list[int], candidates: list[int]
    ) -> torch.Tensor:
        """fp64 [candidates], on the last stage. The states in front of this stage's layers come from the net of `kept`;
        a net without a layer of an earlier stage arrives from there."""
        stage, mine = self.stage, self.stage.layer_indices
        start = self._receive(batch)
        final, after = self._run(kept, start, batch)
        if stage.is_last and number == len(self.finals):
            self.finals.append(final)
        sums = torch.zeros(len(candidates), dtype=torch.float64, device=self.grid.device)
        for place, i in enumerate(candidates):
            if i in mine:
                before = [layer for layer in kept if layer in mine and layer < i]
                state = after[before[-1]] if before else start
                final, _ = self._run([layer for layer in kept if layer > i], state, batch)
            elif i < mine[0]:
                final, _ = self._run(kept, self._receive(batch), batch)
            else:
                continue
            if stage.is_last:
                sums[place] = self._divergence(final, self.finals[number], batch.get("loss_mask"))
        return sums

    def _receive(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the first layer of this stage reads, or the ids."""
        tokens, grid = batch["tokens"], self.grid
        if self.stage.is_first:
            return tokens
        x = torch.empty(*tokens.shape, self.stage.map.shape.hidden, dtype=self.stage.dtype, device=grid.device)
        dist.recv(x, grid.layout.rank(grid.stage - 1, grid.dp_rank, grid.tp_rank))
        return x

    def _run(
        self, layers: Sequence[int], x: torch.Tensor, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """This stage with those of its layers, from a state inside it; sends on what comes out."""
        grid = self.grid
        self._select(layers)
        hidden, states = self.stage(x, batch, features=True)
        if not self.stage.is_last:
            dist.send(hidden.contiguous(), grid.layout.rank(grid.stage + 1, grid.dp_rank, grid.tp_rank))
        return hidden, states

    def _select(self, layers: Sequence[int]) -> None:
        self.stage.select(replace(self.stage.map.shape.full, layers=tuple(layers)))

    def _divergence(self, final: torch.Tensor, taught: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """KL(full || net), summed over the tokens of a batch; logits exist for a chunk of them at a time."""
        final, taught = final.flatten(0, 1), taught.flatten(0, 1)
        if mask is not None:
            learned = mask.flatten() > 0
            final, taught = final[learned], taught[learned]
        vocab, head = self.stage.map.config.vocab_size, self.stage.head
        size = chunk_tokens(None, head.weight.shape[0], final.device.type)
        total = final.new_zeros((), dtype=torch.float64)
        for state, target in zip(final.split(size), taught.split(size), strict=True):
            student, teacher = (mask_padding(head(x), vocab) for x in (state, target))
            total += kl_divergence(student, teacher).double().sum()
        return total
