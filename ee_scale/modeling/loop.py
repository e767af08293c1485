"""What both decode loops share.

B rows; a slot is the place of an unfinished row in the cache.
"""

from math import nan
from typing import Any

import torch

from .attention import without_cudnn
from .layer_runner import Block, LayerRunner
from .policies import ExitPolicy
from .sequences import Sequences
from .trail import Trail
from .transfers import read, send


class DecodeLoop:
    """What both loops share: the prompt, slots of unfinished rows, and what is left of rows that finished."""

    def __init__(
        self,
        runner: LayerRunner,
        sequences: Sequences,
        policy: ExitPolicy,
        pads: list[int],
        trail: Trail,
        wants_cache: bool,
    ):
        self.runner, self.sequences, self.policy = runner, sequences, policy
        self.pads, self.trail, self.wants_cache = pads, trail, wants_cache
        self.retired: list[Any] = [None] * len(pads)
        self.rows = list(range(len(pads)))  # slot -> row of the batch
        self.next = [sequences.prompt_length - pad for pad in pads]  # slot -> position of the newest token
        # The same rows, and slot -> the newest token, not run yet: on the device, [R].
        self.index = torch.arange(len(pads), device=runner.device)
        self.tokens = sequences.ids.new_zeros(len(pads))
        self.passes = 0

    @torch.inference_mode()
    def run(self, chunk: int | None) -> None:
        """Decode until every row is done. Inference mode: small passes spend much of their time in bookkeeping."""
        with without_cudnn():
            self.prefill(chunk)
            while self.rows:
                self.step()
                self.passes += 1
                self.drop_finished()

    def prefill(self, chunk: int | None) -> None:
        """The prompts through all layers, and the first token of each row by the final layer."""
        sequences, runner, device = self.sequences, self.runner, self.runner.device
        width, longest = sequences.prompt_length, sequences.prompt_length - min(self.pads)
        shift = torch.tensor(self.pads, device=device)[:, None] + torch.arange(longest, device=device)
        ids = sequences.ids[:, :width].gather(1, shift.clamp(max=width - 1))
        last = [width - pad - 1 for pad in self.pads]
        states = None
        for start in range(0, longest, chunk or longest):
            part = ids[:, start : start + (chunk or longest)]
            block = runner.block([start] * len(ids), part.shape[1])
            hidden = runner.run(runner.embed(part), block, 0, runner.num_layers)
            self.saw_prompt(hidden, block)
            states = hidden.new_zeros(len(ids), hidden.shape[2]) if states is None else states
            for row, position in enumerate(last):
                if 0 <= position - start < part.shape[1]:
                    states[row] = hidden[row, position - start]
        logits = runner.final_logits(states)
        runner.freeze()
        self.tokens = sequences.pick(self.scored(logits, self.rows))
        tokens, ended = read(self.tokens, sequences.write(self.index, self.tokens))
        sequences.append_to_all(self.rows, tokens, [runner.num_layers] * len(ids), [nan] * len(ids), ended)
        self.drop_finished()

    def scored(self, logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """Logits [N, V] for the next token of N rows -> scores [N, V], kept if the caller wants them."""
        sequences = self.sequences
        scores = sequences.process(logits, rows, [sequences.lengths[row] for row in rows])
        if sequences.keeps_scores:
            for index, row in enumerate(rows):
                sequences.keep_scores(row, sequences.lengths[row], scores[index], logits[index])
        return scores

    def drop_finished(self) -> None:
        """Rows that are done give their place up."""
        done = [slot for slot, row in enumerate(self.rows) if self.sequences.done[row]]
        if not done:
            return
        self.complete(done)
        if self.wants_cache:
            for slot in done:
                row = self.rows[slot]
                self.retired[row] = self.runner.cache.row(slot, self.next[slot], self.runner.num_layers)
        gone = set(done)
        self.keep_slots([slot for slot in range(len(self.rows)) if slot not in gone])

    def keep_slots(self, keep: list[int]) -> None:
        """Forget all slots but these."""
        index = send(keep, self.runner.device)
        if keep:
            self.runner.keep_rows(keep, index)
        self.rows = [self.rows[slot] for slot in keep]
        self.next = [self.next[slot] for slot in keep]
        self.tokens, self.index = self.tokens[index], self.index[index]

    def saw_prompt(self, hidden: torch.Tensor, block: Block) -> None:
        """After each chunk of the prompt."""

    def step(self) -> None:
        """New tokens for every slot."""
        raise NotImplementedError

    def complete(self, slots: list[int]) -> None:
        """Before rows leave: what the caches lack, if anybody will read it."""

    def stats(self) -> dict[str, Any]:
        """Numbers for `exit_stats`."""
        return {"passes": self.passes}
