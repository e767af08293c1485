"""What both decode loops share.

Rows join, make tokens step by step, and leave. A slot is the place of a row that decodes in the cache; the slots in
use are the first ones. B rows at most, R that decode.
"""

from math import nan
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from .attention import without_cudnn
from .layer_runner import Block, LayerRunner
from .policies import ExitPolicy
from .row_texts import RowTexts
from .sequences import Sequences
from .trail import Trail
from .transfers import read, send


class Reading:
    """Prompts of some rows on their way through all layers, chunk by chunk, side by side.

    Attributes:
        rows: theirs are the rows of `runner`, in this order; None where a row has left meanwhile.
        hidden: [N, D], the final layer's states at the ends of the prompts that have been read so far.
    """

    def __init__(self, rows: list[int], runner: LayerRunner, prompts: list[torch.Tensor]):
        """prompts: token ids, each [S]."""
        self.rows: list[int | None] = list(rows)
        self.runner, self.lengths = runner, [len(prompt) for prompt in prompts]
        self.ids = pad_sequence(prompts, batch_first=True)  # what is behind an end is looked at by nobody
        self.start, self.hidden = 0, None

    @property
    def done(self) -> bool:
        """Whether all ends have been reached."""
        return self.start >= self.ids.shape[1]

    def go_on(self, chunk: int | None) -> tuple[torch.Tensor, Block]:
        """The next `chunk` positions (None: all): the final layer's states there [N, q, D], and their block."""
        part = self.ids[:, self.start : self.start + (chunk or self.ids.shape[1])]
        block = self.runner.block([self.start] * len(part), part.shape[1])
        hidden = self.runner.run(self.runner.embed(part), block, 0, self.runner.num_layers)
        if self.hidden is None:
            self.hidden = hidden.new_zeros(len(part), hidden.shape[2])
        for row, length in enumerate(self.lengths):
            if 0 <= length - 1 - self.start < part.shape[1]:
                self.hidden[row] = hidden[row, length - 1 - self.start]
        self.start += part.shape[1]
        return hidden, block


class DecodeLoop:
    """What both loops share: prompts, slots of rows that decode, and what is left of rows that finished."""

    def __init__(
        self,
        runner: LayerRunner,
        sequences: Sequences | RowTexts,
        policy: ExitPolicy,
        pads: list[int],
        trail: Trail,
        wants_cache: bool,
    ):
        self.runner, self.sequences, self.policy = runner, sequences, policy
        self.pads, self.trail, self.wants_cache = pads, trail, wants_cache
        self.retired: list[Any] = [None] * len(pads)
        self.rows: list[int] = []  # slot -> row
        self.next: list[int] = []  # slot -> position of the newest token
        # The same rows, and slot -> the newest token, not run yet: on the device, [R].
        self.index = torch.empty(0, dtype=torch.long, device=runner.device)
        self.tokens = torch.empty(0, dtype=torch.long, device=runner.device)
        self.readings: list[Reading] = []  # of rows that join, oldest first
        self.passes = 0

    @torch.inference_mode()
    def run(self, chunk: int | None) -> None:
        """Decode all rows until every one is done, `chunk` positions of the prompts at a time.

        Inference mode: small passes spend much of their time in bookkeeping.
        """
        with without_cudnn():
            rows = list(range(len(self.pads)))
            reading = Reading(rows, self.runner, [self.sequences.prompt(row, self.pads[row]) for row in rows])
            while not reading.done:
                self.saw_prompt(reading.runner, reading.lengths, *reading.go_on(chunk))
            self.runner.freeze()
            self._start(rows, reading.lengths, reading.hidden)
            self.drop_finished()
            while self.rows:
                self.step()
                self.passes += 1
                self.drop_finished()

    # -- rows that come and go --------------------------------------------------------------------------------------

    def join(self, rows: list[int]) -> None:
        """Let rows in, whose texts are there and whose numbers no other row has; they decode when they are read."""
        prompts = [self.sequences.prompt(row, self.pads[row]) for row in rows]
        runner = self.runner.apart(len(rows), max(map(len, prompts)))
        self.readings.append(Reading(rows, runner, prompts))

    @torch.inference_mode()
    def turn(self, chunk: int) -> list[int]:
        """`chunk` positions of the prompts that joined first, then a step of all rows that decode.

        So no prompt, however long, holds the others up for longer than a chunk takes. Returns rows that are done: they
        have left.
        """
        with without_cudnn():
            if self.readings:
                self._read(self.readings[0], chunk)
            ended = self.drop_finished()
            if self.rows:
                self.step()
                self.passes += 1
                ended += self.drop_finished()
        return ended

    @torch.inference_mode()
    def leave(self, row: int) -> None:
        """Take a row out that is not done."""
        if row in self.rows:
            self._keep([slot for slot, other in enumerate(self.rows) if other != row])
        for reading in self.readings:
            reading.rows = [None if other == row else other for other in reading.rows]
        self.readings = [reading for reading in self.readings if any(row is not None for row in reading.rows)]

    def _read(self, reading: Reading, chunk: int) -> None:
        """One chunk; behind the last one the rows decode."""
        hidden, block = reading.go_on(chunk)
        for k in self.policy.layers:
            reading.runner.read_exit(k, block)
        if self.passes == 0 and not self.rows:
            self.saw_prompt(reading.runner, reading.lengths, hidden, block)
        if not reading.done:
            return
        self.readings.remove(reading)
        reading.runner.clip(reading.lengths)
        self.complete_all()  # from here on all rows lack as much as the new ones: nothing
        places = [place for place, row in enumerate(reading.rows) if row is not None]
        self.runner.take_in(len(self.rows), reading.runner, places, max(reading.lengths))
        rows, lengths = [reading.rows[place] for place in places], [reading.lengths[place] for place in places]
        self._start(rows, lengths, reading.hidden[send(places, self.runner.device)])

    def _start(self, rows: list[int], lengths: list[int], hidden: torch.Tensor) -> None:
        """The first token of rows in new slots, by the final layer: states at the ends of their prompts [N, D]."""
        sequences, runner = self.sequences, self.runner
        tokens = sequences.pick(self.scored(runner.final_logits(hidden), rows), rows)
        index = send(rows, runner.device)
        self.rows, self.next = self.rows + rows, self.next + lengths
        self.index, self.tokens = torch.cat([self.index, index]), torch.cat([self.tokens, tokens])
        news, ended = read(tokens, sequences.write(rows, index, tokens))
        sequences.append_to_all(rows, news, [runner.num_layers] * len(rows), [nan] * len(rows), ended)

    def scored(self, logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """Logits [N, V] for the next token of N rows -> scores [N, V], kept if the caller wants them."""
        sequences = self.sequences
        scores = sequences.process(logits, rows, [sequences.lengths[row] for row in rows])
        if sequences.keeps_scores:
            for index, row in enumerate(rows):
                sequences.keep_scores(row, sequences.lengths[row], scores[index], logits[index])
        return scores

    def drop_finished(self) -> list[int]:
        """Rows that are done give their place up; which they are."""
        done = [slot for slot, row in enumerate(self.rows) if self.sequences.done[row]]
        if not done:
            return []
        self.complete(done)
        rows = [self.rows[slot] for slot in done]
        if self.wants_cache:
            for slot in done:
                row = self.rows[slot]
                self.retired[row] = self.runner.cache.row(slot, self.next[slot], self.runner.num_layers)
        gone = set(done)
        self._keep([slot for slot in range(len(self.rows)) if slot not in gone])
        return rows

    def _keep(self, slots: list[int]) -> None:
        """Forget all slots but these; the last of them move into the places of those that are forgotten."""
        kept, last = set(slots), sorted(slots)
        slots = [slot if slot in kept else last.pop() for slot in range(len(slots))]
        index = send(slots, self.runner.device)
        self.runner.keep_rows(slots)
        self.rows = [self.rows[slot] for slot in slots]
        self.next = [self.next[slot] for slot in slots]
        self.tokens, self.index = self.tokens[index], self.index[index]

    def saw_prompt(self, runner: LayerRunner, lengths: list[int], hidden: torch.Tensor, block: Block) -> None:
        """After each chunk of the first prompts: whose runner it is, where prompts end, states of the final layer."""

    def step(self) -> None:
        """New tokens for every slot."""
        raise NotImplementedError

    def limit(self, row: int, limits: list[float]) -> None:
        """Limits of a row that joins, one for each exit of the policy."""

    def complete(self, slots: list[int]) -> None:
        """Before rows leave: what the caches lack, if anybody will read it."""

    def complete_all(self) -> None:
        """What the caches lack of rows that decode."""

    def stats(self) -> dict[str, Any]:
        """Numbers for `exit_stats`."""
        return {"passes": self.passes}
