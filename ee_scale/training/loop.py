"""What every recipe does around its steps: numbers, checkpoints, votes on stopping, and the way out."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from ee_scale.engine.guard import LATE
from ee_scale.engine.observed import ObservedEngine
from ee_scale.errors import FAILED, REQUEUE, STOPPED, Requeue, RunError
from ee_scale.files import write_text
from ee_scale.log import log
from ee_scale.training.metrics import Key, MetricsStream, StepMetrics
from ee_scale.training.recipe import Run, Step
from ee_scale.training.stopping import StopSignals, Votes
from ee_scale.training.watchdog import Watchdog


class Writer(AbstractContextManager, Protocol):
    """Writes checkpoints; see `ee_scale.artifact.writer`."""

    def save(self, run: Run, facts: dict[str, Any]) -> None: ...

    def poll(self) -> None: ...

    def finish(self) -> None: ...


@dataclass
class Loop:
    """One rank's way through its steps: votes, numbers, checkpoints.

    report: called on rank 0 for every step.
    """

    run: Run
    out: Path
    stream: MetricsStream
    report: Callable[[StepMetrics], None]
    writer: Writer
    watchdog: Watchdog
    signals: StopSignals = field(default_factory=StopSignals)

    def __post_init__(self) -> None:
        self.votes = Votes(self.run.grid, self.run.plan.num_micro_batches)
        self._saved_step = self.run.step

    @contextmanager
    def running(self) -> Iterator[None]:
        """Signals are watched for, and what is being written is finished before the end."""
        self.signals.install()
        try:
            with self.writer, self.watchdog:
                yield
                self.votes.drain()
                with self.watchdog.during("save"):
                    self.writer.finish()
        finally:
            self.signals.restore()

    def train(self, total_steps: int) -> None:
        """The steps that are left. Raises RuntimeError if something frozen changed, and what `begin` does."""
        with self.running():
            while self.run.step < total_steps and not self.run.ended:
                self._watch(self.run.ready())  # and keeps no hand on it: an engine is gone when its phase is over
                self.begin()
                self.end(self.run.train_step())

    def _watch(self, engine: ObservedEngine) -> None:
        """What happens in a new engine is metered, and seen by the watchdog."""
        if engine.observers:
            return
        meter = self.stream.meter
        engine.observers += [self.watchdog] if meter is None else [self.watchdog, meter]
        self.stream.restart_clock()

    def begin(self) -> None:
        """Before a step. Raises `Requeue` or `RunError`, on all ranks together, if they agreed to stop."""
        self.watchdog.step(self.run.step + 1)
        with self.watchdog.during("vote"):
            verdict = self.votes.read()
        self.writer.poll()
        if verdict.gave_up:
            self._give_up()
        if verdict.signal:
            self._leave(verdict.signal)

    def end(self, made: Step) -> None:
        """After a step."""
        train, logging = self.run.config.train, self.run.config.logging
        self.run.step += 1
        engine, guard = self.run.engine, self.run.engine.guard
        saves = made.last or self.run.step % train.save_every == 0
        self._tell_left_out(late=0 if saves else LATE)
        self.stream.add(
            self.run.step, made.learning_rate, made.losses, grad_norms=engine.grad_norms, skipped=engine.skipped
        )
        given_up = max(guard.in_a_row.values(), default=0) >= train.max_skipped
        self.votes.cast(self.signals.number, given_up)
        if saves or self.run.step % logging.every == 0:
            self.stream.flops_per_token = self.run.flops_per_token
            self.stream.flush()
        self._report(wait=saves)
        if saves:
            with self.watchdog.during("save"):
                self.run.measure()
            self._save()

    def _tell_left_out(self, late: int) -> None:
        """Of all steps but the last `late`, which a GPU may not have come to yet."""
        for since, reasons in self.run.engine.guard.verdicts(late):
            if self.run.grid.writes_stage():
                for key, reason in reasons.items():
                    log.warning("step %d: update of %s left out (%s)", self.run.step - since, _name(key), reason)

    def _report(self, wait: bool) -> None:
        for metrics in self.stream.ready(wait=wait):
            if self.run.grid.rank == 0:
                self.report(self.run.shown(metrics))

    def _save(self) -> None:
        with self.watchdog.during("save"):
            self.writer.save(self.run, self.run.facts())
        self._saved_step = self.run.step
        self.stream.restart_clock()

    def _leave(self, number: int) -> None:
        """Save what is there, say so, and go; the same command continues."""
        self._finish_numbers()
        saved = f"saved step {self.run.step}"
        try:
            if self._saved_step != self.run.step:
                self._save()
            with self.watchdog.during("save"):
                self.writer.finish()
        except RunError as error:
            saved = str(error)
        reason = f"stopped by {signal.Signals(number).name}; {saved}; the same command goes on"
        self._note(REQUEUE, reason)
        raise Requeue(f"{self.out}: {reason}")

    def _give_up(self) -> None:
        """Too many updates in a row were left out. Nothing is saved: the last checkpoint is from before the trouble."""
        self._finish_numbers()
        guard, most = self.run.engine.guard, self.run.config.train.max_skipped
        mine = [f"{_name(key)} ({guard.reasons[key]})" for key, row in guard.in_a_row.items() if row >= most]
        told: list[Any] = [None] * self.run.grid.layout.world_size
        dist.all_gather_object(told, mine, group=self.run.grid.metrics_group)
        names = ", ".join(dict.fromkeys(name for names in told for name in names))
        reason = (
            f"step {self.run.step}: {most} updates or more in a row of {names} were left out "
            f"(train.max_skipped={most}); lower optim.lr={self.run.config.optim.lr}, look at the data, or raise "
            f"train.spike_factor={self.run.config.train.spike_factor}"
        )
        self._note(FAILED, reason)
        raise RunError(f"{self.out}: {reason}")

    def _finish_numbers(self) -> None:
        self._tell_left_out(late=0)
        self.votes.drain()
        self.stream.flush()
        self._report(wait=True)

    def _note(self, code: int, reason: str) -> None:
        """Leave the file before any rank leaves: a launcher ends the others as soon as one is gone."""
        if self.run.grid.rank == 0:
            note = {"code": code, "step": self.run.step, "reason": reason}
            write_text(self.out / STOPPED, json.dumps(note, indent=1) + "\n")
        dist.barrier(group=self.run.grid.metrics_group)


def _name(key: Key) -> str:
    return f"exit {key}" if key else "all parameters"
