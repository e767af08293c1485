"""Losses of all stages on rank 0, without making any stage wait for another."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from ee_scale.grid import Grid

Key = int | str  # an exit's layer, or the role of a subnet


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, averaged over replicas. `step` counts from 1; `tokens` is the total so far.

    values: measure ('loss', 'kl', ...) -> key -> number. Every run has 'loss'.
    """

    step: int
    tokens: int
    learning_rate: float
    values: dict[str, dict[Key, float]]
    tokens_per_second: float

    def only(self, keys: Sequence[Key]) -> "StepMetrics":
        """Without the other keys."""
        kept = {name: {key: column[key] for key in keys} for name, column in self.values.items()}
        return replace(self, values=kept)

    def to_json(self) -> dict[str, Any]:
        """One line of metrics.jsonl."""
        record = {"step": self.step, "tokens": self.tokens, "learning_rate": self.learning_rate, **self.values}
        return record | {"tokens_per_second": round(self.tokens_per_second, 1)}


@dataclass
class _Window:
    steps: list[tuple[int, int, float]]  # step, tokens so far, learning rate
    values: torch.Tensor  # [steps, keys, measures] fp32
    work: Any
    seconds: float


class MetricsStream:
    """Collects each step's losses on the device; every window is summed over all ranks in the background."""

    def __init__(self, grid: Grid, keys: Sequence[Key], tokens_per_step: int, measures: Sequence[str] = ("loss",)):
        self.grid, self.keys, self.tokens_per_step, self.measures = grid, list(keys), tokens_per_step, measures
        self._pending: deque[_Window] = deque()
        self._steps: list[tuple[int, int, float]] = []
        self._losses: list[dict[Key, torch.Tensor]] = []
        self._started = time.perf_counter()

    def add(self, step: int, learning_rate: float, losses: dict[Key, torch.Tensor]) -> None:
        """What this stage knows at a step (counted from 1): fp32 [measures or more] by key, of this replica."""
        self._steps.append((step, step * self.tokens_per_step, learning_rate))
        self._losses.append(losses)

    def flush(self) -> None:
        """Start the sum of the window. All ranks call it at the same steps."""
        if not self._steps:
            return
        values = torch.zeros(len(self._steps), len(self.keys), len(self.measures))
        if self.grid.tp_rank == 0 and self._losses[0]:
            mine = torch.stack([torch.stack(list(losses.values())) for losses in self._losses]).cpu()
            columns = [self.keys.index(key) for key in self._losses[0]]
            values[:, columns] = mine[..., : len(self.measures)] / self.grid.layout.dp
        work = dist.all_reduce(values, group=self.grid.metrics_group, async_op=True)
        now = time.perf_counter()
        self._pending.append(_Window(self._steps, values, work, now - self._started))
        self._steps, self._losses, self._started = [], [], now

    def ready(self, wait: bool = False) -> Iterator[StepMetrics]:
        """Steps whose sums have arrived, in order; with `wait` all that were flushed."""
        while self._pending and (wait or self._pending[0].work.is_completed()):
            window = self._pending.popleft()
            window.work.wait()
            speed = len(window.steps) * self.tokens_per_step / max(window.seconds, 1e-9)
            for (step, tokens, learning_rate), row in zip(window.steps, window.values.tolist(), strict=True):
                columns = zip(*row, strict=True)
                found = {
                    name: dict(zip(self.keys, column, strict=True))
                    for name, column in zip(self.measures, columns, strict=True)
                }
                yield StepMetrics(step, tokens, learning_rate, found, speed)

    def restart_clock(self) -> None:
        """Leave out of the next speed what happened since the last flush (a checkpoint)."""
        self._started = time.perf_counter()
