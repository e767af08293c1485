"""`ee-scale trace tune|supernet`: a few real steps of a run, and where each stage's time goes in them.

Writes <out>/trace and nothing else: no checkpoint, no run.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ee_scale.cli.console import console
from ee_scale.config.compose import with_value
from ee_scale.config.groups import LoggingConfig
from ee_scale.config.schema import TrainingConfig
from ee_scale.engine.observed import ObservedEngine
from ee_scale.engine.timeline import StageTimeline, TimelineRecorder, chrome_trace, clock_offsets
from ee_scale.errors import UserError
from ee_scale.evaluation.timeline_plot import plot_timeline
from ee_scale.files import remove_folder
from ee_scale.grid import Grid, join_grid, launch_info
from ee_scale.launching.job import log_as_rank, rank_device
from ee_scale.launching.ranks import run_ranks
from ee_scale.log import titled_table
from ee_scale.planning.out_of_memory import told_when_full, training_advice
from ee_scale.reading import write_json
from ee_scale.training.recipe import Recipe, recipe_of

FOLDER = "trace"


def run(verb: str, config: TrainingConfig, overrides: Sequence[str]) -> int:
    """Trace the command `verb`. The ranks are started like those of the command itself."""
    log_as_rank(config)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # lines of torch's profiler about itself
    recipe = recipe_of(verb).of(with_value(config, "train.verify_frozen", False))  # it takes time
    layout, launched = recipe.plan.layout, launch_info()
    _check_window(config.logging, recipe.last_phase_steps)
    device = rank_device(config.parallel, layout, launched)
    folder = Path(config.out).expanduser() / FOLDER
    if launched is None or launched.rank == 0:
        recipe.prepare(progress=config.logging.progress)
        _clear(folder)
    if launched is None and layout.world_size > 1:
        return run_ranks("trace", [verb, *overrides], layout.world_size, device)
    grid = join_grid(layout, device, config.parallel.timeout_minutes)
    with told_when_full(lambda: training_advice(recipe.plan, grid.stage)):
        trace_rank(recipe, grid, folder)
    return 0


def trace_rank(recipe: Recipe[Any, Any], grid: Grid, folder: Path) -> None:
    """One rank's whole part. The first rank of each stage records; rank 0 puts the stages together."""
    run, logging = recipe.build(grid, folder.parent, scratch=folder), recipe.config.logging
    run.start_last_phase()

    def step() -> None:
        run.ready()
        run.train_step()
        run.step += 1

    for _ in range(logging.trace_after):
        step()
    window = range(logging.trace_after + 1, logging.trace_after + logging.trace_steps + 1)
    timeline = None
    if grid.writes_stage():
        timeline = _record(run.ready(), step, window, grid, folder)
    else:
        run.ready()
        dist.barrier(grid.metrics_group)
        for _ in window:
            step()
    layout = grid.layout
    offsets = clock_offsets(grid.metrics_group, [layout.rank(stage, 0, 0) for stage in range(layout.pp)])
    found: list[Any] = [None] * layout.world_size
    dist.all_gather_object(found, timeline, group=grid.metrics_group)
    if grid.rank == 0:
        _write(folder, [timeline for timeline in found if timeline is not None], offsets)


def _record(engine: ObservedEngine, step: Callable[[], None], window: range, grid: Grid, folder: Path) -> StageTimeline:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if grid.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    recorder = TimelineRecorder(grid.device, ranges=True)
    engine.observers.append(recorder)
    with torch.profiler.profile(activities=activities) as profiler:
        dist.barrier(grid.metrics_group)  # profilers take their time to start: the stages begin the window together
        recorder.start()
        for number in window:
            recorder.step(number)
            step()
        timeline = recorder.finish(grid.stage, grid.rank)
    engine.observers.remove(recorder)
    profiler.export_chrome_trace(str(folder / f"stage_{grid.stage}.json"))
    return timeline


def _write(folder: Path, timelines: list[StageTimeline], offsets: dict[int, tuple[int, int]]) -> None:
    clock = "one machine, one clock"
    if len({timeline.host for timeline in timelines}) > 1:
        error = max(error for _, error in offsets.values())
        clock = f"several machines; their clocks differ and were compared by pings, to +- {error / 1e6:.3f} ms"
        timelines = [timeline.shifted(offsets.get(timeline.rank, (0, 0))[0]) for timeline in timelines]
    write_json(folder / "timeline.json", chrome_trace(timelines, clock))
    plot_timeline(folder / "timeline.png", timelines)
    steps = timelines[0].steps
    title = f"steps {steps[0].step} to {steps[-1].step} ({clock})"
    table = titled_table(title, ("stage", "seconds", "busy", "waiting for others", "idle share"))
    for timeline in timelines:
        seconds = (f"{value:.3f}" for value in (timeline.wall, timeline.busy, timeline.waiting))
        table.add_row(str(timeline.stage), *seconds, f"{timeline.idle:.1%}")
    out = console()
    out.print(table)
    stages = f"stage_0.json to stage_{len(timelines) - 1}.json" if len(timelines) > 1 else "stage_0.json"
    for path, what in (
        (folder / "timeline.png", "the picture"),
        (folder / "timeline.json", "the same for https://ui.perfetto.dev or chrome://tracing"),
        (folder / stages, "torch's profiler, by stage, for the same programs"),
    ):
        out.print(f"{path}  {what}", soft_wrap=True, highlight=False)


def _check_window(logging: LoggingConfig, total_steps: int) -> None:
    after, steps = logging.trace_after, logging.trace_steps
    if after + steps > total_steps:
        raise UserError(
            f"logging.trace_after={after} and logging.trace_steps={steps} need {after + steps} steps; "
            f"the run has {total_steps}"
        )


def _clear(folder: Path) -> None:
    try:
        remove_folder(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"out={folder.parent}: cannot write there ({error.strerror})") from error
