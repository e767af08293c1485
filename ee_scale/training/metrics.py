"""Losses of all stages on rank 0, without making any stage wait for another."""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

import torch
import torch.distributed as dist

from ee_scale.grid import Grid
from ee_scale.training.meter import StageMeter, mfu

Key = int | str  # an exit's layer, or the role of a subnet
STAGE_COLUMNS = 3  # wall, waiting, memory


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, averaged over replicas. `step` counts from 1; `tokens` is the total so far.

    Attributes:
        values: measure ('loss', 'kl', ...) -> key -> number. Every run has 'loss'.
        grad_norms: L2 norm before clipping, by what is clipped together; empty if the engine does not tell.
        skipped: updates that were left out so far, by key; empty while there are none.
        stages: 'idle' (share of the time) and 'memory_gib' (peak so far) -> stage -> number, of the window.
        mfu: model FLOPs utilisation of the window, a share; None where FLOPs or peak are not known.
    """

    step: int
    tokens: int
    learning_rate: float
    values: dict[str, dict[Key, float]]
    tokens_per_second: float
    grad_norms: dict[Key, float] = field(default_factory=dict)
    skipped: dict[Key, int] = field(default_factory=dict)
    stages: dict[str, dict[int, float]] = field(default_factory=dict)
    mfu: float | None = None

    def only(self, keys: Sequence[Key]) -> "StepMetrics":
        """Without the losses of other keys."""
        kept = {name: {key: column[key] for key in keys} for name, column in self.values.items()}
        return replace(self, values=kept)

    def to_json(self) -> dict[str, Any]:
        """One line of metrics.jsonl; what is no finite number becomes None (JSON knows no NaN)."""
        record = {"step": self.step, "tokens": self.tokens, "learning_rate": self.learning_rate, **self.values}
        record["tokens_per_second"] = round(self.tokens_per_second, 1)
        if self.mfu is not None:
            record["mfu"] = round(self.mfu, 4)
        record |= {name: {s: round(x, 4) for s, x in column.items()} for name, column in self.stages.items()}
        if self.grad_norms:
            record["grad_norm"] = self.grad_norms
        if self.skipped:
            record["skipped"] = self.skipped
        return _finite(record)


def _finite(value: object) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not isfinite(value) else value


@dataclass
class _Window:
    steps: list[tuple[int, int, float]]  # step, tokens so far, learning rate
    values: torch.Tensor  # fp32: a row per step, then STAGE_COLUMNS per stage; see MetricsStream._table
    work: Any
    seconds: float
    flops_per_token: float | None


@dataclass
class _Known:
    """What this rank knows of a step."""

    losses: Mapping[Key, torch.Tensor]
    grad_norms: Mapping[Key, torch.Tensor]
    skipped: Mapping[Key, torch.Tensor]


class MetricsStream:
    """Collects each step's losses on the device; every window is summed over all ranks in the background.

    Attributes:
        flops_per_token: forward and backward, of a whole replica; may change between windows. With `peak_flops` (of
            one device, wanted on rank 0 alone) it gives the MFU.
    """

    def __init__(
        self,
        grid: Grid,
        keys: Sequence[Key],
        tokens_per_step: int,
        measures: Sequence[str] = ("loss",),
        *,
        meter: StageMeter | None = None,
        norm_keys: Sequence[Key] = (),
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
    ):
        """norm_keys: of the gradient norms, which need not be those of the losses; the same on all ranks."""
        self.grid, self.keys, self.tokens_per_step, self.measures = grid, list(keys), tokens_per_step, list(measures)
        self.meter, self.norm_keys = meter, list(norm_keys)
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self._rows = list(dict.fromkeys([*self.keys, *self.norm_keys]))
        self._pending: deque[_Window] = deque()
        self._steps: list[tuple[int, int, float]] = []
        self._known: list[_Known] = []
        self._started = time.perf_counter()

    def add(
        self,
        step: int,
        learning_rate: float,
        losses: Mapping[Key, torch.Tensor],
        *,
        grad_norms: Mapping[Key, torch.Tensor] | None = None,
        skipped: Mapping[Key, torch.Tensor] | None = None,
    ) -> None:
        """What this stage knows at a step (counted from 1): fp32 [measures or more] by key, of this replica.

        grad_norms: of the groups of this stage; skipped: updates left out so far. Of each key one stage tells (all
        its replicas do), and every step of a window has the same keys on a rank.
        """
        self._steps.append((step, step * self.tokens_per_step, learning_rate))
        self._known.append(_Known(losses, grad_norms or {}, skipped or {}))

    def flush(self) -> None:
        """Start the sum of the window. All ranks call it at the same steps."""
        if not self._steps:
            return
        if self.meter is not None:
            self.meter.close()  # before the losses are waited for, so that it can be read after that
        values = torch.cat([self._table().flatten(), self._reading().flatten()])
        work = dist.all_reduce(values, group=self.grid.metrics_group, async_op=True)
        now = time.perf_counter()
        self._pending.append(_Window(self._steps, values, work, now - self._started, self.flops_per_token))
        self._steps, self._known, self._started = [], [], now

    def ready(self, wait: bool = False) -> Iterator[StepMetrics]:
        """Steps whose sums have arrived, in order; with `wait` all that were flushed."""
        while self._pending and (wait or self._pending[0].work.is_completed()):
            window = self._pending.popleft()
            window.work.wait()
            yield from self._unpack(window)

    def restart_clock(self) -> None:
        """Leave out of the next speed what happened since the last flush (a checkpoint)."""
        self._started = time.perf_counter()
        if self.meter is not None:
            self.meter.restart()

    def _table(self) -> torch.Tensor:
        """This rank's part of [steps, keys, measures + gradient norm + skipped], fp32 on the host."""
        table = torch.zeros(len(self._steps), len(self._rows), len(self.measures) + 2)
        first = self._known[0]
        if self.grid.tp_rank == 0:
            if first.losses:
                mine = torch.stack([torch.stack(list(known.losses.values())) for known in self._known])
                measures = slice(0, len(self.measures))
                table[:, self._places(first.losses), measures] = mine[..., measures].float().cpu()
            if first.grad_norms and self.norm_keys:
                norms = torch.stack([torch.stack(list(known.grad_norms.values())) for known in self._known])
                table[:, self._places(first.grad_norms), -2] = norms.float().cpu()
            if first.skipped:
                counts = torch.stack([torch.stack(list(known.skipped.values())) for known in self._known])
                table[:, self._places(first.skipped), -1] = counts.float().cpu()
        return table / self.grid.layout.dp

    def _places(self, keys: Mapping[Key, Any]) -> list[int]:
        return [self._rows.index(key) for key in keys]

    def _reading(self) -> torch.Tensor:
        """[stages, STAGE_COLUMNS]: the first rank of a stage (replica 0, tensor rank 0) speaks for it."""
        table = torch.zeros(self.grid.layout.pp, STAGE_COLUMNS)
        if self.meter is not None:
            reading = self.meter.read()
            if self.grid.writes_stage():
                table[self.grid.stage] = torch.tensor([reading.wall, reading.waiting, reading.memory_gib])
        return table

    def _unpack(self, window: _Window) -> Iterator[StepMetrics]:
        shape = len(window.steps), len(self._rows), len(self.measures) + 2
        cut = window.values.numel() - self.grid.layout.pp * STAGE_COLUMNS
        table, readings = window.values[:cut].view(shape).tolist(), window.values[cut:].view(-1, STAGE_COLUMNS).tolist()
        speed = len(window.steps) * self.tokens_per_step / max(window.seconds, 1e-9)
        used = None
        if window.flops_per_token is not None and self.peak_flops is not None:
            used = mfu(speed, window.flops_per_token, self.grid.layout.world_size, self.peak_flops)
        stages = _stages(readings) if self.meter is not None else {}
        for (step, tokens, learning_rate), rows in zip(window.steps, table, strict=True):
            by_key = dict(zip(self._rows, rows, strict=True))
            values = {name: {key: by_key[key][i] for key in self.keys} for i, name in enumerate(self.measures)}
            norms = {key: by_key[key][-2] for key in self.norm_keys}
            skipped = {key: round(row[-1]) for key, row in by_key.items() if round(row[-1])}
            yield StepMetrics(step, tokens, learning_rate, values, speed, norms, skipped, stages, used)


def _stages(readings: list[list[float]]) -> dict[str, dict[int, float]]:
    """A stage whose device has not come to the end of a window yet has no idle share this time."""
    idle = {stage: waiting / wall for stage, (wall, waiting, _) in enumerate(readings) if wall > 0}
    memory = {stage: gib for stage, (_, _, gib) in enumerate(readings)}
    return {"idle": idle, "memory_gib": memory} if idle else {"memory_gib": memory}
