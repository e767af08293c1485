"""What every training command does around its run: check, prepare once, start the ranks, tell the numbers."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed import DistError

from ee_scale.artifact.run_folder import CHECKPOINTS, METRICS, OpenedRun, open_run
from ee_scale.artifact.save import load_checkpoint, load_frozen
from ee_scale.artifact.writer import CheckpointWriter
from ee_scale.config.groups import ParallelConfig
from ee_scale.config.schema import TrainingConfig
from ee_scale.errors import REQUEUE, STOPPED, Requeue, RunError, UserError
from ee_scale.gpu import check_training
from ee_scale.grid import Grid, LaunchInfo, Layout, join_grid, launch_info, pick_device, world_size_message
from ee_scale.launching.ranks import run_ranks
from ee_scale.log import configure_logging, log
from ee_scale.planning.fits import is_bf16
from ee_scale.planning.out_of_memory import told_when_full, training_advice
from ee_scale.reading import Count, check_fields, read_object
from ee_scale.training.loop import Loop
from ee_scale.training.recipe import Recipe
from ee_scale.training.sinks import MetricsFile, ProgressLine, Reporter, Sink, WandbSink
from ee_scale.training.watchdog import Watchdog

LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")  # gloo's words


def log_as_rank(config: TrainingConfig) -> None:
    """Rank 0 logs, the others only complain."""
    launched = launch_info()
    configure_logging(0 if launched is None or launched.rank == 0 else 1, config.logging.level)


def run_job(recipe: Recipe[Any, Any], overrides: Sequence[str], show: Callable[[], None] = lambda: None) -> int:
    """Prepare, then train in this process (one rank, or started by torchrun) or in ranks that this process starts.

    overrides: the command line of those ranks; show: tells a person the plan. Returns the exit code.
    """
    config, layout, launched = recipe.config, recipe.plan.layout, launch_info()
    out = Path(config.out).expanduser()
    if launched is not None:
        _leave_again(out)
    device = rank_device(config.parallel, layout, launched)
    if device.type == "cuda":
        check_training(bf16=is_bf16(config))
    # Under torchrun the other ranks wait for rank 0 in join_grid; bad input ends the job before they train.
    opened = prepare_run(recipe) if launched is None or launched.rank == 0 else None
    if launched is None and opened is not None:
        show()
        if (step := opened.state.get("step", 0)) >= recipe.plan.total_steps:
            log.info("%s is finished (step %d); more steps would go on from there", config.out, step)
            return 0
    code = 0
    if launched is None and layout.world_size > 1:
        code = run_ranks(recipe.verb, overrides, layout.world_size, device, out, config.launcher.max_restarts)
    else:
        with _one_line_for_lost_ranks():
            grid = join_grid(layout, device, config.parallel.timeout_minutes)
            with told_when_full(lambda: training_advice(recipe.plan, grid.stage)):
                train_rank(recipe, grid, opened)
    if launched is None and code == 0:
        log.info("done; next: ee-scale %s src=%s out=<folder>", recipe.next_verb, config.out)
    return code


def rank_device(parallel: ParallelConfig, layout: Layout, launched: LaunchInfo | None) -> torch.device:
    """Of this process. Raises `UserError` where torchrun has started another number of ranks than the layout has."""
    if launched is not None and launched.world_size != layout.world_size:
        raise UserError(world_size_message(layout, launched.world_size))
    return pick_device(parallel.device, launched.local_rank if launched else 0)


def prepare_run(recipe: Recipe[Any, Any]) -> OpenedRun:
    """Data and output folder, in one process. Raises `UserError`."""
    data = recipe.prepare(progress=recipe.config.logging.progress)
    opened = open_run(recipe, data)
    recipe.check_folder(opened.out, resumes=opened.checkpoint is not None)
    return opened


def train_rank(recipe: Recipe[Any, Any], grid: Grid, prepared: OpenedRun | None) -> None:
    """This rank's whole run. `prepared` is known on rank 0 only."""
    opened = grid.from_rank_0(prepared)
    run = recipe.build(grid, opened.out)
    if opened.checkpoint is not None:
        run.reopen(opened.state)
        load_frozen(opened.checkpoint, run, opened.state)  # before the engine is built around what trains
        run.start_engine()
        load_checkpoint(opened.checkpoint, run, opened.state)
        log.info("continuing from %s", opened.checkpoint)
    train, timeout = recipe.config.train, 60 * recipe.config.parallel.timeout_minutes
    writer = CheckpointWriter(opened.out / CHECKPOINTS, grid, train.keep, background=train.async_save)
    with reporter(recipe, grid, opened, run.step) as report:
        watchdog = Watchdog(grid, timeout, opened.out)
        Loop(run, opened.out, run.metrics_stream(), report, writer, watchdog).train(recipe.plan.total_steps)


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


def reporter(recipe: Recipe[Any, Any], grid: Grid, opened: OpenedRun, step: int) -> Reporter:
    """Progress, metrics.jsonl and wandb on rank 0; nothing elsewhere."""
    if grid.rank != 0:
        return Reporter([])
    logging, keyed_by = recipe.config.logging, recipe.keyed_by
    sinks: list[Sink] = [
        MetricsFile(opened.out / METRICS),
        ProgressLine(recipe.plan.total_steps, step, logging.every, keyed_by, enabled=logging.progress),
    ]
    if logging.wandb != "disabled":
        sinks.append(WandbSink(opened.out, logging, asdict(recipe.config), opened.identity["run_id"], keyed_by))
    return Reporter(sinks)
