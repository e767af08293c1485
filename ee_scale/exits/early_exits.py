"""The threshold loop: each row leaves at the first exit that satisfies the policy. Copied into exported folders.

A token that leaves at an exit has no keys and values in the deeper layers yet. They are computed later, together
with those of the next token that goes deeper: its pass takes the pending tokens along as one block. The result is
that of a run without a cache (EE-LLM's recomputation, arXiv 2312.04916 section 4, without running shallow layers
twice: hidden states at the exits are remembered). A slot is the place of an unfinished row in the cache.
"""

from math import nan
from typing import Any

import torch

from .layer_runner import Block, pick
from .loop import DecodeLoop
from .policies import Decisions


class EarlyExits(DecodeLoop):
    """One token per step and row; each row leaves at the first exit that satisfies the policy."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.bounds = (0, *self.policy.layers, self.runner.num_layers)
        self.decisions = Decisions(self.policy, len(self.pads), self.runner.device)

    def started(self) -> None:
        # known[j][slot]: positions whose keys the layers between bounds j and j + 1 have; never more than before them.
        self.known = [list(self.next) for _ in self.bounds[1:]]

    def keep_slots(self, keep: list[int]) -> None:
        super().keep_slots(keep)
        self.known = [[known[slot] for slot in keep] for known in self.known]

    def step(self) -> None:
        """Shallow layers for every slot; deeper ones for the slots that no exit lets go."""
        runner = self.runner
        slots = list(range(len(self.rows)))
        chosen: dict[int, tuple[int, int]] = {}
        seen = [nan] * len(slots)
        self.decisions.start()
        hidden, block = runner.embed(self.tokens[:, None]), runner.block(self.next, 1)
        for part, depth in enumerate(self.bounds[1:]):
            if part:
                hidden, block = self._bring(part, slots, hidden, block)
            hidden = runner.run(hidden, block, self.bounds[part], depth)
            self._know(part, slots)
            undecided = [slot for slot in slots if slot not in chosen]
            at = self._last(slots, block)
            if part == len(self.bounds) - 2:
                self._finish(slots, undecided, hidden, block, at, chosen)
            elif undecided:
                self._ask(depth, slots, undecided, hidden, block, at, chosen, seen)
                slots = [slot for slot in slots if slot not in chosen or self._must_flush(slot)]
                if not slots:
                    break
        order = range(len(self.rows))
        tokens, layers = [chosen[slot][0] for slot in order], [chosen[slot][1] for slot in order]
        self.next = [position + 1 for position in self.next]
        runner.clip(self.next)
        self.tokens = torch.tensor(tokens, device=runner.device)
        self.sequences.append_to_all(self.rows, tokens, layers, seen)

    def _bring(self, part: int, slots: list[int], hidden: torch.Tensor, block: Block) -> tuple[torch.Tensor, Block]:
        """Hidden states that the next layers read: the newest token of each slot and those that wait at this exit."""
        known = self.known[part]
        starts = [known[slot] for slot in slots]
        if len(slots) == len(block.starts) and starts == block.starts:
            return hidden, block  # nothing waits: go on as we are
        length = max(self.next[slot] + 1 - start for slot, start in zip(slots, starts, strict=True))
        block = self.runner.block(starts, length, self._index(slots))
        return self.runner.recall(self.bounds[part], block), block

    def _know(self, part: int, slots: list[int]) -> None:
        for slot in slots:
            self.known[part][slot] = self.next[slot] + 1

    def _index(self, slots: list[int]) -> torch.Tensor | None:
        return None if len(slots) == len(self.rows) else torch.tensor(slots, device=self.runner.device)

    def _last(self, slots: list[int], block: Block) -> torch.Tensor | None:
        """Where the newest token of each slot is in the block (None: in the last column)."""
        at = [self.next[slot] - start for slot, start in zip(slots, block.starts, strict=True)]
        return None if min(at) == block.length - 1 else torch.tensor(at, device=self.runner.device)

    def _must_flush(self, slot: int) -> bool:
        """Too many tokens wait: this one goes on to the last layer though its successor is known."""
        return self.next[slot] + 1 - self.known[-1][slot] > self.policy.max_pending

    def _ask(
        self,
        k: int,
        slots: list[int],
        undecided: list[int],
        hidden: torch.Tensor,
        block: Block,
        at: torch.Tensor | None,
        chosen: dict[int, tuple[int, int]],
        seen: list[float],
    ) -> None:
        """Exit k: tokens of the rows that leave here."""
        logits = self.runner.exit_logits(k, hidden, block, at)
        rows = [self.rows[slot] for slot in slots]
        everybody = len(rows) == len(self.pads)
        index = None if everybody else torch.tensor(rows, device=logits.device)
        leave, scores, tokens = (answer.tolist() for answer in self.decisions.ask(k, logits, index))
        for place, slot in enumerate(slots):
            if slot not in chosen:
                seen[slot] = scores[place]
        leaving = [place for place, slot in enumerate(slots) if leave[place] and slot not in chosen]
        if not leaving:
            return
        picked = tokens
        if self.sequences.do_sample or self.sequences.processors or self.sequences.keeps_scores:
            some = self.choose(logits[leaving], [rows[place] for place in leaving]).tolist()
            picked = dict(zip(leaving, some, strict=True))
        for place in leaving:
            slot, row = slots[place], rows[place]
            chosen[slot] = (picked[place], k)
            self.trail.left_early(row, self.next[slot], len(self.sequences.layers[row]), tokens[place])

    def _finish(
        self,
        slots: list[int],
        undecided: list[int],
        hidden: torch.Tensor,
        block: Block,
        at: torch.Tensor | None,
        chosen: dict[int, tuple[int, int]],
    ) -> None:
        """The final layer: tokens of the rows that got here, and the comparison with what exits said before."""
        if self.trail.waiting:
            self._compare(slots, hidden, block)
        if not undecided:
            return
        newest = pick(hidden, at)
        if len(undecided) < len(slots):
            newest = newest[[slots.index(slot) for slot in undecided]]
        tokens = self.choose(self.runner.final_logits(newest), [self.rows[slot] for slot in undecided])
        for slot, token in zip(undecided, tokens.tolist(), strict=True):
            chosen[slot] = (token, self.runner.num_layers)

    def _compare(self, slots: list[int], hidden: torch.Tensor, block: Block) -> None:
        found = [
            (place, position - block.starts[place], row, position)
            for place, row in enumerate(self.rows[slot] for slot in slots)
            for position in range(block.starts[place], self.next[slots[place]] + 1)
            if (row, position) in self.trail.waiting
        ]
        if not found:
            return
        states = hidden[[item[0] for item in found], [item[1] for item in found]]
        for item, token in zip(found, self.runner.final_logits(states).argmax(-1).tolist(), strict=True):
            self.trail.compare(item[2], item[3], token)

    def complete(self, slots: list[int]) -> None:
        """Deeper keys and values of tokens that left early."""
        waiting = {row for row, _ in self.trail.waiting}
        slots = [s for s in slots if (self.wants_cache or self.rows[s] in waiting) and self.known[-1][s] < self.next[s]]
        for part in range(1, len(self.bounds) - 1):
            behind = [slot for slot in slots if self.known[part][slot] < self.next[slot]]
            if not behind:
                continue
            starts = [self.known[part][slot] for slot in behind]
            length = max(self.next[slot] - start for slot, start in zip(behind, starts, strict=True))
            block = self.runner.block(starts, length, self._index(behind))
            hidden = self.runner.recall(self.bounds[part], block)
            hidden = self.runner.run(hidden, block, self.bounds[part], self.bounds[part + 1])
            for slot in behind:
                self.known[part][slot] = self.next[slot]
            if part == len(self.bounds) - 2 and self.trail.waiting:
                self._compare(behind, hidden, block)

    def stats(self) -> dict[str, Any]:
        """Passes, and the agreement of the audited tokens."""
        audited = self.trail.agrees
        extra = {"audited": len(audited), "agreed": sum(audited.values())} if audited else {}
        return super().stats() | extra
