"""Where a run's numbers go on rank 0: a progress line, metrics.jsonl, and Weights & Biases."""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ee_scale.config.groups import LoggingConfig
from ee_scale.errors import one_line
from ee_scale.log import Terminal, log
from ee_scale.training.metrics import Key, StepMetrics


class Sink(Protocol):
    """Takes every step."""

    def __call__(self, metrics: StepMetrics) -> None: ...

    def close(self) -> None: ...


class Reporter(AbstractContextManager):
    """Calls every sink with every step; closes them all at the end."""

    def __init__(self, sinks: Sequence[Sink]):
        self.sinks = sinks

    def __call__(self, metrics: StepMetrics) -> None:
        for sink in self.sinks:
            sink(metrics)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for sink in self.sinks:
            sink.close()


class MetricsFile:
    """metrics.jsonl: one object per step, appended as it comes."""

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def __call__(self, metrics: StepMetrics) -> None:
        self._file.write(json.dumps(metrics.to_json(), allow_nan=False) + "\n")

    def close(self) -> None:
        """Flush and close."""
        self._file.close()


class ProgressLine:
    """A bar with the losses on a terminal; a log line every `every` steps elsewhere."""

    def __init__(self, steps: int, start: int, every: int, keyed_by: str, *, enabled: bool):
        self._steps, self._every, self._keyed_by = steps, every, keyed_by
        self._bar = None
        terminal = Terminal(stderr=True)
        if enabled and (sys.stderr.isatty() or terminal.is_jupyter):
            columns = (
                TextColumn("training"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, TimeRemainingColumn(), console=terminal)
            self._task = self._bar.add_task("", total=steps, completed=start)
            self._bar.start()

    def __call__(self, metrics: StepMetrics) -> None:
        losses = "  ".join(f"{key}:{loss:.3f}" for key, loss in metrics.values["loss"].items())
        text = f"loss by {self._keyed_by} {losses}  {metrics.tokens_per_second:,.0f} tokens/s{_utilisation(metrics)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=metrics.step, description=text)
        elif metrics.step % self._every == 0 or metrics.step in (1, self._steps):
            log.info("step %d/%d  %s", metrics.step, self._steps, text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def _utilisation(metrics: StepMetrics) -> str:
    """MFU, the stage that waits most, updates left out: what there is of them."""
    text = "" if metrics.mfu is None else f"  mfu {metrics.mfu:.1%}"
    idle = metrics.stages.get("idle", {})
    if len(idle) > 1:
        stage = max(idle, key=idle.__getitem__)
        text += f"  idle {idle[stage]:.0%} (stage {stage})"
    if metrics.skipped:
        text += f"  skipped {max(metrics.skipped.values())}"
    return text


class WandbSink:
    """Weights & Biases. Whatever fails there is said once and never stops the run.

    A run that goes on has the same id. It may repeat steps that were logged before it was killed, and wandb drops what
    is not above its own last step: so that one goes on counting, and the run's step is the x axis of every chart.
    """

    def __init__(self, out: Path, logging: LoggingConfig, config: dict[str, Any], run_id: str, keyed_by: str):
        self._run, self._keyed_by = None, keyed_by
        self._repeated: int | None = None
        try:
            import wandb  # here, because it takes seconds and few runs want it

            self._run = wandb.init(
                project=logging.wandb_project,
                name=logging.wandb_name or out.name,
                group=logging.wandb_group,
                mode=logging.wandb,  # type: ignore[arg-type]
                dir=str(out),
                id=run_id,
                resume="allow",
                config=config,
                settings=wandb.Settings(silent=True),
            )
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:
            self._give_up(error)

    def __call__(self, metrics: StepMetrics) -> None:
        if self._run is None:
            return
        try:
            if self._repeated is None:
                self._repeated = max(0, self._run.starting_step - metrics.step)
            self._run.log(_series(metrics, self._keyed_by), step=metrics.step + self._repeated)
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """Finish the upload."""
        try:
            if self._run is not None:
                self._run.finish()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        log.warning("wandb failed and is off for the rest of the run: %s", one_line(error))


def _series(metrics: StepMetrics, keyed_by: str) -> dict[str, float]:
    """Names of charts, grouped by what is in front of the slash."""
    columns: dict[str, Mapping[Key, float]] = metrics.values | {
        "grad_norm": metrics.grad_norms,
        "skipped": metrics.skipped,
    }
    values = {f"{name}/{keyed_by}_{key}": value for name, column in columns.items() for key, value in column.items()}
    values |= {f"{name}/stage_{s}": value for name, column in metrics.stages.items() for s, value in column.items()}
    values |= {name: getattr(metrics, name) for name in ("step", "tokens", "learning_rate", "tokens_per_second")}
    return values if metrics.mfu is None else values | {"mfu": metrics.mfu}
