"""The threshold loop: each row leaves at the first exit that satisfies the policy.

A token that leaves at an exit has no keys and values in the deeper layers yet. They are computed later, together
with those of the next token that goes deeper: its pass takes the waiting positions along as one block. The result is
that of a run without a cache (EE-LLM's recomputation, arXiv 2312.04916 section 4, without running shallow layers
twice: hidden states at the exits are remembered).

Rows of a batch decide by themselves, and layers that no row needs do not run. Where one row goes deeper the others
come along: their positions have to be computed once in any case, and here they cost no pass of their own.
"""

from math import nan
from typing import Any

import torch

from .layer_runner import Block
from .loop import DecodeLoop
from .policies import Decisions


class EarlyExits(DecodeLoop):
    """One token per step and row."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.bounds = (0, *self.policy.layers, self.runner.num_layers)
        # waiting[j]: positions before the newest whose keys the layers between bounds j and j + 1 lack, in every row.
        self.waiting = [0] * (len(self.bounds) - 1)
        self.decisions = Decisions(self.policy, len(self.pads), self.runner.device)

    def step(self) -> None:
        """Shallow layers, then deeper ones as long as a row wants them."""
        runner, last = self.runner, len(self.waiting) - 1
        chosen: dict[int, int] = {}  # slot -> layer
        logits: dict[int, torch.Tensor] = {}  # slot -> what its token is chosen from, [V]
        seen = [nan] * len(self.rows)
        self.decisions.start()
        hidden, block = runner.embed(self.tokens[:, None]), runner.block(self.next, 1)
        for part, depth in enumerate(self.bounds[1:]):
            hidden, block = self._bring(part, hidden, block)
            hidden = runner.run(hidden, block, self.bounds[part], depth)
            self.waiting[part] = 0
            if part == last:
                self._finish(hidden, block, chosen, logits)
            elif len(chosen) < len(self.rows):
                self._ask(depth, hidden, block, chosen, logits, seen)
                # A full queue goes on to the last layer though every next token is known.
                if len(chosen) == len(self.rows) and self.waiting[last] < self.policy.max_pending:
                    for deeper in range(part + 1, last + 1):
                        self.waiting[deeper] += 1
                    break
        slots = range(len(self.rows))
        # All rows at once: processors may count their calls.
        scores = self.scored(torch.stack([logits[slot] for slot in slots]), self.rows)
        self._check_some(scores, chosen)
        self.tokens = self.sequences.pick(scores)
        self.next = [position + 1 for position in self.next]
        self.sequences.append_to_all(self.rows, self.tokens.tolist(), [chosen[slot] for slot in slots], seen)

    def _bring(self, part: int, hidden: torch.Tensor, block: Block) -> tuple[torch.Tensor, Block]:
        """The newest position of each row and those that wait in front of layers `bounds[part]`..: [B, q, D]."""
        length = self.waiting[part] + 1
        if length == block.length:
            return hidden, block
        block = self.runner.block([position + 1 - length for position in self.next], length)
        return self.runner.recall(self.bounds[part], block), block

    def _ask(
        self,
        k: int,
        hidden: torch.Tensor,
        block: Block,
        chosen: dict[int, int],
        logits: dict[int, torch.Tensor],
        seen: list[float],
    ) -> None:
        """Exit k: the rows that leave here, and their logits."""
        own = self.runner.exit_logits(k, hidden, block, -1)
        index = None if len(self.rows) == len(self.pads) else torch.tensor(self.rows, device=own.device)
        leave, scores, tokens = (answer.tolist() for answer in self.decisions.ask(k, own, index))
        undecided = [slot for slot in range(len(self.rows)) if slot not in chosen]
        for slot in undecided:
            seen[slot] = scores[slot]
        for slot in undecided:
            if not leave[slot]:
                continue
            row = self.rows[slot]
            chosen[slot], logits[slot] = k, own[slot]
            self.trail.left_early(row, self.next[slot], len(self.sequences.layers[row]), tokens[slot])

    def _check_some(self, scores: torch.Tensor, chosen: dict[int, int]) -> None:
        """Raise ValueError where processors leave a choice, but none among the tokens of an exit's shortlist head.

        scores [N, V]. What they then say of the others is not the model's; a single token left is forced, and right.
        """
        count = self.runner.spec.shortlist
        if count and self.sequences.processors:
            ids = self.runner.model.exit_heads[str(self.policy.layers[0])].shortlist.ids(scores.device)
            empty = (scores[:, ids].isneginf().all(-1) & (scores.isfinite().sum(-1) != 1)).tolist()
            if layers := [k for slot, k in chosen.items() if empty[slot] and k < self.runner.num_layers]:
                raise ValueError(
                    f"exit_policy={self.policy.name}: logits processors forbid all {count} tokens that the exit at "
                    f"layer {layers[0]} scores (head=shortlist); use exit_policy=lossless, or leave it out"
                )

    def _finish(
        self, hidden: torch.Tensor, block: Block, chosen: dict[int, int], logits: dict[int, torch.Tensor]
    ) -> None:
        """The final layer: logits of the rows that want it, and the comparison with what exits said before."""
        self._compare(hidden, block)
        undecided = [slot for slot in range(len(self.rows)) if slot not in chosen]
        if not undecided:
            return
        newest = hidden[:, -1] if not chosen else hidden[undecided, -1]
        logits |= zip(undecided, self.runner.final_logits(newest), strict=True)
        chosen |= dict.fromkeys(undecided, self.runner.num_layers)

    def _compare(self, hidden: torch.Tensor, block: Block) -> None:
        """The full model's choice at positions whose token left early and is audited."""
        if not self.trail.waiting:
            return
        found = [
            (slot, column, row, start + column)
            for slot, (row, start) in enumerate(zip(self.rows, block.starts, strict=True))
            for column in range(block.length)
            if (row, start + column) in self.trail.waiting
        ]
        if not found:
            return
        states = hidden[[item[0] for item in found], [item[1] for item in found]]
        for item, token in zip(found, self.runner.final_logits(states).argmax(-1).tolist(), strict=True):
            self.trail.compare(item[2], item[3], token)

    def complete(self, slots: list[int]) -> None:
        """What waits in front of deeper layers, if a row that leaves needs it."""
        audited = {row for row, _ in self.trail.waiting}
        if not self.wants_cache and not any(self.rows[slot] in audited for slot in slots):
            return
        for part, length in enumerate(self.waiting):
            if length:
                block = self.runner.block([position - length for position in self.next], length)
                hidden = self.runner.recall(self.bounds[part], block)
                hidden = self.runner.run(hidden, block, self.bounds[part], self.bounds[part + 1])
                self.waiting[part] = 0
                if part == len(self.waiting) - 1:
                    self._compare(hidden, block)

    def stats(self) -> dict[str, Any]:
        """Passes, and the agreement of the audited tokens."""
        audited = self.trail.agrees
        extra = {"audited": len(audited), "agreed": sum(audited.values())} if audited else {}
        return super().stats() | extra
