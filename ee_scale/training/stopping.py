"""How a run is stopped: signals set a flag, the ranks vote on it, and all leave after the same step."""

import signal
from collections import deque
from dataclasses import dataclass
from math import ceil
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from ee_scale.grid import Grid

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # preemption, and a time limit that comes near


class StopSignals:
    """Remembers the last of `SIGNALS` that this process got. It never acts inside a handler: a collective may run."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """From now on those signals only set a flag. Python tells the main thread alone of them."""
        if current_thread() is not main_thread():
            return
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def restore(self) -> None:
        """As it was before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number


@dataclass(frozen=True)
class Verdict:
    """The largest word of all ranks: a signal's number or 0, and whether one gave up."""

    signal: int = 0
    gave_up: bool = False


class Votes:
    """One small all-reduce per step in the background, read `lag` steps later, so that no stage waits for another.

    Every rank reads the vote of the same step at the same step: what follows from it happens on all ranks together.
    """

    def __init__(self, grid: Grid, num_micro_batches: int):
        self._group = grid.metrics_group
        # Stage 0 of a forward pipeline is up to pp - 1 micro-batches ahead of the last one.
        self.lag = 1 + ceil((grid.layout.pp - 1) / num_micro_batches)
        self._cast: deque[tuple[torch.Tensor, Any]] = deque()

    def cast(self, signal_number: int, gave_up: bool) -> None:
        """This rank's word after a step."""
        word = torch.tensor([signal_number, gave_up], dtype=torch.int64)
        self._cast.append((word, dist.all_reduce(word, dist.ReduceOp.MAX, group=self._group, async_op=True)))

    def read(self) -> Verdict:
        """What was voted `lag` steps before the newest vote."""
        return self._take() if len(self._cast) > self.lag else Verdict()

    def drain(self) -> Verdict:
        """The newest vote, after all of them: at the end of a run."""
        verdict = Verdict()
        while self._cast:
            verdict = self._take()
        return verdict

    def _take(self) -> Verdict:
        word, work = self._cast.popleft()
        work.wait()
        number, gave_up = word.tolist()
        return Verdict(number, bool(gave_up))
