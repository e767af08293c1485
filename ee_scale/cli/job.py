"""What every training command does around its run: check, prepare once, start the ranks, tell the numbers."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.distributed import DistError

from ee_scale.artifact.run_folder import CHECKPOINTS, METRICS, OpenedRun
from ee_scale.artifact.writer import CheckpointWriter
from ee_scale.cli.ranks import run_ranks
from ee_scale.config.schema import TrainingConfig
from ee_scale.errors import REQUEUE, STOPPED, Requeue, RunError, UserError
from ee_scale.grid import Grid, Layout, join_grid, launch_info, pick_device, world_size_message
from ee_scale.log import configure_logging, log
from ee_scale.reading import Count, check_fields, read_object
from ee_scale.training.loop import Loop
from ee_scale.training.metrics import MetricsStream, StepMetrics
from ee_scale.training.parts import Run
from ee_scale.training.report import MetricsFile, ProgressLine, Reporter, WandbSink
from ee_scale.training.watchdog import Watchdog

LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")  # gloo's words


def log_as_rank(config: TrainingConfig) -> None:
    """Rank 0 logs, the others only complain."""
    launched = launch_info()
    configure_logging(0 if launched is None or launched.rank == 0 else 1, config.logging.level)


@dataclass(frozen=True)
class Job:
    """A training command: `layout` is what is launched, `next_verb` what a person runs on the result."""

    verb: str
    config: TrainingConfig
    overrides: Sequence[str]
    layout: Layout
    total_steps: int
    next_verb: str

    def run(
        self,
        prepare: Callable[[], OpenedRun],
        show: Callable[[], None],
        train_rank: Callable[[Grid, OpenedRun | None], None],
    ) -> int:
        """Prepare, then train in this process (one rank, or started by torchrun) or in ranks that this process starts.

        prepare: data and output folder, in one process; show: the plan, to a person; train_rank: this rank's whole
        run, which knows the opened folder on rank 0 only. Returns the exit code.
        """
        config, launched = self.config, launch_info()
        if launched is not None:
            _leave_again(Path(config.out).expanduser())
        if launched is not None and launched.world_size != self.layout.world_size:
            raise UserError(world_size_message(self.layout, launched.world_size))
        device = pick_device(config.parallel.device, launched.local_rank if launched else 0)
        # Under torchrun the other ranks wait for rank 0 in join_grid; bad input ends the job before they train.
        opened = prepare() if launched is None or launched.rank == 0 else None
        if launched is None:
            show()
            if (step := opened.state.get("step", 0)) >= self.total_steps:
                log.info("%s is finished (step %d); more steps would go on from there", config.out, step)
                return 0
        code = 0
        if launched is None and self.layout.world_size > 1:
            out, restarts = Path(config.out).expanduser(), config.launcher.max_restarts
            code = run_ranks(self.verb, self.overrides, self.layout.world_size, device, out, restarts)
        else:
            with _one_line_for_lost_ranks():
                train_rank(join_grid(self.layout, device, config.parallel.timeout_minutes), opened)
        if launched is None and code == 0:
            log.info("done; next: ee-scale %s src=%s out=<folder>", self.next_verb, config.out)
        return code


@contextmanager
def _one_line_for_lost_ranks() -> Iterator[None]:
    """The ranks that are left when one dies fail in whatever they were doing; where that was helps nobody."""
    try:
        yield
    except (DistError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, RunError) or not (isinstance(error, DistError) or any(word in text for word in LOST)):
            raise
        log.debug("lost a rank", exc_info=True)
        raise RunError("another rank is gone, so this one leaves; the launcher's lines tell which one died") from error


def _leave_again(out: Path) -> None:
    """torchrun starts ranks again however they left; those of a run that stopped on purpose leave at once."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and (out / STOPPED).is_file():
        stopped = read_object(out / STOPPED)
        check_fields(stopped, out / STOPPED, reason=str, code=Count)
        raise Requeue(stopped["reason"]) if stopped["code"] == REQUEUE else RunError(stopped["reason"])


def training_loop(
    run: Run,
    opened: OpenedRun,
    stream: MetricsStream,
    report: Callable[[StepMetrics], None],
    facts: Callable[[], dict[str, Any]],
) -> Loop:
    """The loop of a run's rank, with its writer of checkpoints and its watchdog."""
    config, grid = run.config, run.grid
    writer = CheckpointWriter(opened.out / CHECKPOINTS, grid, config.train.keep, background=config.train.async_save)
    watchdog = Watchdog(grid, 60 * config.parallel.timeout_minutes, opened.out)
    return Loop(run, opened.out, stream, report, writer, watchdog, facts)


def reporter(config: TrainingConfig, grid: Grid, opened: OpenedRun, steps: int, step: int, keyed_by: str) -> Reporter:
    """Progress, metrics.jsonl and wandb on rank 0; nothing elsewhere."""
    if grid.rank != 0:
        return Reporter([])
    out: Path = opened.out
    sinks: list[Any] = [
        MetricsFile(out / METRICS),
        ProgressLine(steps, step, config.logging.every, keyed_by, enabled=config.logging.progress),
    ]
    if config.logging.wandb != "disabled":
        sinks.append(WandbSink(out, config.logging, asdict(config), opened.identity["run_id"], keyed_by))
    return Reporter(sinks)
