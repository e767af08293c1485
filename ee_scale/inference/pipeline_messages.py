"""What the stages of pipeline decoding say to each other.

Tokens go down, from each stage to the next; decisions go up, from any stage to the first. Each tensor rank talks to the
rank of the same tensor index. Headers and decisions are CPU messages of a gloo group: the host has to know them, and
the accelerator's channel then has one direction only. Sends never block and every receive has its one send, in the
order in which both sides work, so that no two ranks can wait for each other.
"""

from collections import deque
from dataclasses import astuple, dataclass, fields
from math import nan
from typing import Any

import torch
import torch.distributed as dist

from ee_scale.grid import Grid

HEADER, HIDDEN, DECISION, LOGITS = range(4)  # tags


@dataclass
class Token:
    """The header of a row's next token, or of its whole prompt.

    Attributes:
        row: of the batch.
        start: its first position; what caches hold from there on is of drafts that were rejected.
        length: positions that come with it.
        decided: an exit has answered already; later stages only fill their caches, or verify.
        last, agreed: patience: the last exit's token, and how many exits in a row said it.
        score: at the deepest exit that was asked; NaN if none was.
    """

    row: int
    start: int
    length: int
    decided: bool = False
    last: int = -1
    agreed: int = 0
    score: float = nan

    @property
    def prefill(self) -> bool:
        """Whether it is a prompt."""
        return self.start == 0


@dataclass(frozen=True)
class Decision:
    """An answer: the most likely token, the layer it came from (0: none yet), the score at the deepest exit that was
    asked (NaN: none was), and the layer's logits [1, V] if they are wanted."""

    token: int = 0
    layer: int = 0
    score: float = nan
    logits: torch.Tensor | None = None


class Outbox:
    """Sends under way; at most `size` of them, then the oldest is waited for."""

    def __init__(self, size: int):
        self.size = size
        self.sends: deque[tuple[Any, torch.Tensor]] = deque()

    def send(self, tensor: torch.Tensor, destination: int, group: dist.ProcessGroup, tag: int) -> None:
        """Start a send; the tensor is kept until it is out."""
        self.sends.append((dist.isend(tensor, destination, group=group, tag=tag), tensor))
        self.wait(self.size)

    def wait(self, left: int = 0) -> None:
        """Until no more than `left` are under way."""
        while len(self.sends) > left:
            self.sends.popleft()[0].wait()


class Line:
    """This rank's connections to the other stages."""

    def __init__(self, grid: Grid, hidden_size: int, vocab_size: int, dtype: torch.dtype):
        self.grid, self.hidden_size, self.vocab_size, self.dtype = grid, hidden_size, vocab_size, dtype
        self.down, self.up = Outbox(2), Outbox(2)

    def open(self, in_flight: int, ahead: int) -> None:
        """Start a batch: at most so many tokens are in flight, and a stage is at most `ahead` ahead of the next one."""
        self.down.size = 2 * max(1, ahead)  # a token is two messages
        self.up.size = 2 * in_flight  # the answers about all older ones have been read

    def close(self) -> None:
        """End a batch: nothing is left under way."""
        self.down.wait()
        self.up.wait()

    def pass_on(self, token: Token | None, hidden: torch.Tensor | None) -> None:
        """To the next stage: a token and its hidden states [1, S, D]; None ends the batch."""
        following = self._rank(self.grid.stage + 1)
        values = astuple(token or Token(0, 0, 0))
        # Doubles hold every integer here exactly.
        self.down.send(torch.tensor(values, dtype=torch.float64), following, self.grid.metrics_group, HEADER)
        if token is not None:
            self.down.send(hidden.contiguous(), following, self.grid.pp_group, HIDDEN)

    def receive(self) -> tuple[Token, torch.Tensor] | None:
        """The next token from the stage before, or None at the end of the batch."""
        before = self._rank(self.grid.stage - 1)
        header = torch.empty(len(fields(Token)), dtype=torch.float64)
        dist.recv(header, before, group=self.grid.metrics_group, tag=HEADER)
        *numbers, score = header.tolist()
        row, start, length, decided, last, agreed = map(int, numbers)
        if length == 0:
            return None
        hidden = torch.empty(1, length, self.hidden_size, dtype=self.dtype, device=self.grid.device)
        dist.recv(hidden, before, group=self.grid.pp_group, tag=HIDDEN)
        return Token(row, start, length, bool(decided), last, agreed, score), hidden

    def answer(self, decision: Decision, with_logits: bool) -> None:
        """To the first stage."""
        values = torch.tensor([decision.token, decision.layer, decision.score], dtype=torch.float64)
        self.up.send(values, self._rank(0), self.grid.metrics_group, DECISION)
        if with_logits and decision.layer:
            self.up.send(decision.logits.float().cpu().contiguous(), self._rank(0), self.grid.metrics_group, LOGITS)

    def hear(self, stage: int, with_logits: bool) -> Decision:
        """The first stage: what `stage` says about the oldest token that it has not spoken about."""
        values = torch.empty(3, dtype=torch.float64)
        dist.recv(values, self._rank(stage), group=self.grid.metrics_group, tag=DECISION)
        token, layer, score = values.tolist()
        logits = None
        if with_logits and layer:
            logits = torch.empty(1, self.vocab_size)
            dist.recv(logits, self._rank(stage), group=self.grid.metrics_group, tag=LOGITS)
            logits = logits.to(self.grid.device)
        return Decision(int(token), int(layer), score, logits)

    def _rank(self, stage: int) -> int:
        return self.grid.layout.rank(stage, 0, self.grid.tp_rank)
