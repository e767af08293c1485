"""The threshold loop: each row leaves at the first exit that satisfies the policy.

A token that leaves at an exit has no keys and values in the deeper layers yet. They are computed later, together
with those of the next token that goes deeper: its pass takes the waiting positions along as one block. The result is
that of a run without a cache (EE-LLM's recomputation, arXiv 2312.04916 section 4, without running shallow layers
twice: hidden states at the exits are remembered).

Rows of a batch decide by themselves, and layers that no row needs do not run. Where one row goes deeper the others
come along: their positions have to be computed once in any case, and here they cost no pass of their own.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .layer_runner import Block
from .loop import DecodeLoop
from .policies import Decisions, most_likely
from .transfers import read, send, waits_are_free

FADE = 0.97  # of what is remembered of exits, per token
WAIT = 0.5  # layers that the device could run while the host looks at an exit's decisions


class Answers:
    """What is said of the newest position of R rows, exit by exit, on the device.

    Attributes:
        undecided: bool [R], rows that no exit has let go.
        layers: int64 [R], where each row leaves; for those that are undecided the number of layers.
        scores: fp32 [R], the policy's score at the deepest exit that was asked while undecided, or NaN.
        best: int64 [R], the most likely token there, or at the final layer.
        logits: [R, V], the same; None where nobody told them.
    """

    def __init__(self, rows: int, num_layers: int, device: torch.device):
        self.rows, self.num_layers, self.device = rows, num_layers, device
        self.undecided: torch.Tensor | None = None  # all
        self.layers = self.scores = self.best = self.logits = None

    def exit_says(
        self, k: int, leave: torch.Tensor, scores: torch.Tensor, best: torch.Tensor, logits: torch.Tensor | None
    ) -> None:
        """Of all rows [R]; heard by those that are undecided."""
        self._hear(best, logits)
        if self.undecided is None:
            self.scores, self.layers, self.undecided = scores, torch.where(leave, k, self.num_layers), ~leave
            return
        self.scores = torch.where(self.undecided, scores, self.scores)
        self.layers = self.layers.masked_fill(leave & self.undecided, k)
        self.undecided = self.undecided & ~leave

    def final_layer_says(self, logits: torch.Tensor) -> None:
        """Logits [R, V]."""
        self._hear(most_likely(logits), logits)

    def _hear(self, best: torch.Tensor, logits: torch.Tensor | None) -> None:
        if self.undecided is not None:
            best = torch.where(self.undecided, best, self.best)
            if self.logits is not None:
                logits = torch.where(self.undecided[:, None], logits, self.logits)
        self.best, self.logits = best, logits

    def tell(self) -> tuple[torch.Tensor, ...]:
        """undecided, layers, scores and best."""
        if self.undecided is None:
            self.undecided = torch.ones(self.rows, dtype=torch.bool, device=self.device)
            self.layers = torch.full((self.rows,), self.num_layers, device=self.device)
            self.scores = torch.full((self.rows,), float("nan"), device=self.device)
        return self.undecided, self.layers, self.scores, self.best


class Waits:
    """At which exits the host waits for decisions, so that deeper layers need not be queued if all rows have left.

    On a CPU that costs nothing. A GPU stands still meanwhile: there it has to be worth it, by how often all rows left.
    Layers that were not needed change no token: what they compute would have been computed later.
    """

    def __init__(self, layers: Sequence[int], num_layers: int, free: bool):
        self.num_layers, self.free = num_layers, free
        self.counts = {k: [1.0, 2.0] for k in layers}  # tokens that needed nothing deeper, of those that got here

    def pays(self, k: int) -> bool:
        """Whether to wait at exit k."""
        left, seen = self.counts[k]
        return self.free or left / seen * (self.num_layers - k) > WAIT

    def saw(self, deepest: int) -> None:
        """The layer that the last of the rows left at."""
        for k, count in self.counts.items():
            count[0] = FADE * count[0] + (deepest <= k)
            count[1] = FADE * count[1] + 1
            if deepest <= k:
                return


class EarlyExits(DecodeLoop):
    """One token per step and row."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.bounds = (0, *self.policy.layers, self.runner.num_layers)
        # waiting[j]: positions before the newest whose keys the layers between bounds j and j + 1 lack, in every row.
        self.waiting = [0] * (len(self.bounds) - 1)
        self.decisions = Decisions(self.policy, len(self.pads), self.runner.device)
        rows = self.policy.limits
        self.given = [list(limits) for limits in (rows * len(self.pads) if len(rows) == 1 else rows)]
        if self.trail.follow is not None:
            self.decisions.limits = torch.tensor(self.given, device=self.runner.device)
        self.followed = -1  # changes of the levels that the limits know of
        self.waits = Waits(self.policy.layers, self.runner.num_layers, waits_are_free(self.runner.device))
        self.audited: tuple[list[tuple[int, int]], torch.Tensor] | None = None

    @property
    def plain(self) -> bool:
        """Whether the most likely token is taken, and nobody looks at scores."""
        sequences = self.sequences
        return not (sequences.do_sample or sequences.processors or sequences.criteria or sequences.keeps_scores)

    def limit(self, row: int, limits: list[float]) -> None:
        """Limits of a row that joins, one for each exit of the policy."""
        self.decisions.limits[row] = torch.tensor(limits)
        self.given[row], self.followed = limits, -1

    def _follow(self) -> bool:
        """Limits as strict as what was audited wants them. Whether some row may leave early."""
        follow, tags = self.trail.follow, self.trail.tags
        if follow is None:
            return True
        if follow.changes != self.followed:
            self.followed = follow.changes
            rows = [follow.limits(self.policy.name, given, tag) for given, tag in zip(self.given, tags, strict=True)]
            self.decisions.limits.copy_(torch.tensor(rows))
        return not all(follow.off(tags[row]) for row in self.rows)

    def step(self) -> None:
        """Shallow layers, then deeper ones as long as a row wants them."""
        runner, last = self.runner, len(self.waiting) - 1
        answers = Answers(len(self.rows), runner.num_layers, runner.device)
        told: list[list] | None = None
        # A full queue goes on to the last layer though every next token is known.
        full = self.waiting[last] >= self.policy.max_pending
        self.decisions.start()
        asks = self._follow()
        hidden, block = runner.embed(self.tokens[:, None]), runner.block(self.next, 1)
        for part, depth in enumerate(self.bounds[1:]):
            hidden, block = self._bring(part, hidden, block)
            hidden = runner.run(hidden, block, self.bounds[part], depth)
            self.waiting[part] = 0
            if part == last:
                self._finish(hidden, block, answers, known=told is not None)
            elif told is None and asks:
                self._ask(depth, hidden, block, answers)
                told = self._wait(depth, answers, full)
                if told is not None and not full:
                    for deeper in range(part + 1, last + 1):
                        self.waiting[deeper] += 1
                    break
        self._take(told or self._tell(answers))

    def _wait(self, k: int, answers: Answers, full: bool) -> list[list] | None:
        """What is to be told, if exit k is waited for and no row is left that wants deeper layers."""
        if not self.waits.pays(k) or (full and not self.waits.free):
            return None
        # Tokens may be chosen at an exit and again at a deeper one: then one wait tells decisions and tokens.
        if self.plain or not (self.waits.free or self.sequences.in_step):
            told = self._tell(answers)
            return told if not any(told[0]) else None
        (undecided,) = read(answers.undecided)
        return None if any(undecided) else self._tell(answers)

    def _bring(self, part: int, hidden: torch.Tensor, block: Block) -> tuple[torch.Tensor, Block]:
        """The newest position of each row and those that wait in front of layers `bounds[part]`..: [B, q, D]."""
        length = self.waiting[part] + 1
        if length == block.length:
            return hidden, block
        block = self.runner.block([position + 1 - length for position in self.next], length)
        return self.runner.recall(self.bounds[part], block), block

    def _ask(self, k: int, hidden: torch.Tensor, block: Block, answers: Answers) -> None:
        """Exit k about every row, of the tokens that its head scores: the others cannot be chosen there."""
        logits, exit_head = self.runner.exit_logits(k, hidden, block, -1), self.runner.model.exit_heads[str(k)]
        leave, scores, best = self.decisions.ask(k, logits, self.index)
        if exit_head.shortlist is not None:
            best = exit_head.shortlist.ids(best.device)[best]
        answers.exit_says(k, leave, scores, best, None if self.plain else exit_head.over_vocabulary(logits))

    def _tell(self, answers: Answers) -> list[list]:
        """Choose the tokens, put them behind the texts, and tell the host all at once what `_take` wants to know."""
        sequences, none = self.sequences, self.sequences.none_ended
        tokens = answers.best
        empty = none
        if not self.plain:
            scores = self.scored(answers.logits, self.rows)  # all rows at once: processors may count their calls
            tokens, empty = sequences.pick(scores, self.rows), self._empty(scores)
        self.tokens = tokens
        ended = sequences.write(self.rows, self.index, tokens)
        return read(*answers.tell(), tokens, ended, empty, self.audited[1] if self.audited else none)

    def _take(self, told: list[list]) -> None:
        """Keep the tokens that `_tell` told of. Raises ValueError where there was nothing to choose from."""
        undecided, layers, scores, best, tokens, ended, empty, audited = told
        for slot, nothing in enumerate(empty):
            if nothing and not undecided[slot]:
                raise ValueError(
                    f"exit_policy={self.policy.name}: logits processors forbid all {self.runner.spec.shortlist} tokens "
                    f"that the exit at layer {layers[slot]} scores (head=shortlist); use exit_policy=lossless, or "
                    "leave it out"
                )
        for slot, row in enumerate(self.rows):
            if undecided[slot]:
                self.trail.went_deep(row)
            else:
                self.trail.left_early(row, self.next[slot], len(self.sequences.layers[row]), best[slot])
        self._compared(audited)
        self.waits.saw(self.runner.num_layers if any(undecided) else max(layers))
        self.next = [position + 1 for position in self.next]
        self.sequences.append_to_all(self.rows, tokens, layers, scores, ended)

    def _empty(self, scores: torch.Tensor) -> torch.Tensor:
        """Rows where processors leave a choice, but none among the tokens of an exit's shortlist head: bool [R].

        scores [R, V]. What they then say of the others is not the model's; a single token left is forced, and right.
        """
        if not (self.runner.spec.shortlist and self.sequences.processors and self.policy.layers):
            return self.sequences.none_ended
        ids = self.runner.model.exit_heads[str(self.policy.layers[0])].shortlist.ids(scores.device)
        return scores[:, ids].isneginf().all(-1) & (scores.isfinite().sum(-1) != 1)

    def _finish(self, hidden: torch.Tensor, block: Block, answers: Answers, known: bool) -> None:
        """The final layer; `known`: every next token is, from exits."""
        audits = self.trail.share > 0
        if audits or not known:
            logits = self.runner.final_logits(hidden[:, -1])
            if not known:
                answers.final_layer_says(logits)
            if audits:
                self._compare(hidden, block, most_likely(logits))

    def _compare(self, hidden: torch.Tensor, block: Block, newest: torch.Tensor | None) -> None:
        """The full model's choice at positions whose token left early and is audited: told with the next tokens.

        newest: its choice at the last positions [R], of which the host may not know yet which are audited.
        """
        found = [
            (slot, column)
            for slot, (row, start) in enumerate(zip(self.rows, block.starts, strict=True))
            for column in range(block.length)
            if (row, start + column) in self.trail.waiting
        ]
        places = [(self.rows[slot], block.starts[slot] + column) for slot, column in found]
        choices = [] if newest is None else [newest]
        if found:
            slots, columns = send(found, hidden.device).unbind(1)
            choices.insert(0, most_likely(self.runner.final_logits(hidden[slots, columns])))
        if newest is not None:
            places += zip(self.rows, self.next, strict=True)
        if choices:
            self.audited = places, torch.cat(choices)

    def _compared(self, tokens: list[int]) -> None:
        """What `_compare` found, on the host. [] if it has not been told yet."""
        if self.audited is None:
            return
        places, choices = self.audited
        self.audited = None
        for place, token in zip(places, tokens or read(choices)[0], strict=True):
            if place in self.trail.waiting:
                self.trail.compare(*place, token)

    def complete(self, slots: list[int]) -> None:
        """What waits in front of deeper layers, if a row that leaves needs it."""
        audited = {row for row, _ in self.trail.waiting}
        if self.wants_cache or any(self.rows[slot] in audited for slot in slots):
            self.complete_all()

    def complete_all(self) -> None:
        """What waits in front of deeper layers."""
        self._compared([])
        for part, length in enumerate(self.waiting):
            self.waiting[part] = 0
            if length and self.rows:
                block = self.runner.block([position - length for position in self.next], length)
                hidden = self.runner.recall(self.bounds[part], block)
                hidden = self.runner.run(hidden, block, self.bounds[part], self.bounds[part + 1])
                if part == len(self.waiting) - 1:
                    self._compare(hidden, block, None)
                    self._compared([])

    def stats(self) -> dict[str, Any]:
        """Passes, and the agreement of the audited tokens."""
        trail = self.trail
        return super().stats() | ({"audited": trail.audited, "agreed": trail.agreed} if trail.audited else {})
