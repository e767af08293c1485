"""`ee-scale trace tune|supernet`: a few real steps of a run, and where each stage's time goes in them.

Writes <out>/trace and nothing else: no checkpoint, no run.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table

from ee_scale.cli import supernet, tune
from ee_scale.cli.console import console
from ee_scale.cli.inputs import load_tokenizer, sources, text_dataset
from ee_scale.cli.job import log_as_rank
from ee_scale.cli.ranks import run_ranks
from ee_scale.cli.supernet_data import Data
from ee_scale.cli.supernet_data import prepare_data as prepare_supernet_data
from ee_scale.data.text import prepare_text
from ee_scale.elastic.factors import FactorPlan
from ee_scale.elastic.sampling import draw_stream
from ee_scale.engine.observed import ObservedEngine
from ee_scale.engine.timeline import StageTimeline, TimelineRecorder, chrome_trace, clock_offsets
from ee_scale.errors import UserError
from ee_scale.evaluation.timeline_plot import plot_timeline
from ee_scale.files import remove_folder
from ee_scale.grid import Grid, Layout, join_grid, launch_info, pick_device, world_size_message
from ee_scale.reading import write_json
from ee_scale.training import supernet as supernet_recipe
from ee_scale.training import tune as tune_recipe
from ee_scale.training.schedules import LearningRate, loss_weights_at

FOLDER = "trace"
Step = Callable[[int], None]  # runs an optimizer step, counted from 1


@dataclass(frozen=True)
class Traced:
    """A training command: its data are prepared by one process; `begin` gives this rank's engine and its steps."""

    layout: Layout
    total_steps: int
    prepare: Callable[[], None]
    begin: Callable[[Grid, Path], tuple[ObservedEngine, Step]]


def run(verb: str, config: Any, overrides: Sequence[str]) -> int:
    """Trace the command `verb`. The ranks are started like those of the command itself."""
    log_as_rank(config)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # lines of torch's profiler about itself
    traced = {"tune": _tune, "supernet": _supernet}[verb](config)
    _check_window(config.logging, traced.total_steps)
    launched = launch_info()
    if launched is not None and launched.world_size != traced.layout.world_size:
        raise UserError(world_size_message(traced.layout, launched.world_size))
    device = pick_device(config.parallel.device, launched.local_rank if launched else 0)
    folder = Path(config.out).expanduser() / FOLDER
    if launched is None or launched.rank == 0:
        traced.prepare()
        _clear(folder)
    if launched is None and traced.layout.world_size > 1:
        return run_ranks("trace", [verb, *overrides], traced.layout.world_size, device)
    trace_rank(config.logging, traced, join_grid(traced.layout, device, config.parallel.timeout_minutes), folder)
    return 0


def trace_rank(logging: Any, traced: Traced, grid: Grid, folder: Path) -> None:
    """One rank's whole part. The first rank of each stage records; rank 0 puts the stages together."""
    engine, step = traced.begin(grid, folder)
    for number in range(1, logging.trace_after + 1):
        step(number)
    window = range(logging.trace_after + 1, logging.trace_after + logging.trace_steps + 1)
    timeline = None
    if grid.writes_stage():
        timeline = _record(engine, step, window, grid, folder)
    else:
        dist.barrier(grid.metrics_group)
        for number in window:
            step(number)
    layout = grid.layout
    offsets = clock_offsets(grid.metrics_group, [layout.rank(stage, 0, 0) for stage in range(layout.pp)])
    found: list[Any] = [None] * layout.world_size
    dist.all_gather_object(found, timeline, group=grid.metrics_group)
    if grid.rank == 0:
        _write(folder, [timeline for timeline in found if timeline is not None], offsets)


def _record(engine: ObservedEngine, step: Step, window: range, grid: Grid, folder: Path) -> StageTimeline:
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
            step(number)
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
    table = Table(title=f"steps {steps[0].step} to {steps[-1].step} ({clock})", title_justify="left")
    for column in ("stage", "seconds", "busy", "waiting for others", "idle share"):
        table.add_column(column, justify="right")
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


def _check_window(logging: Any, total_steps: int) -> None:
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


def _tune(config: Any) -> Traced:
    plan = tune.make_plan(config)

    def begin(grid: Grid, folder: Path) -> tuple[ObservedEngine, Step]:
        tokenizer, data = load_tokenizer(plan.model_dir), config.data
        prefixes = prepare_text(
            sources(data.path), tokenizer, plan.model_dir, data.cache_dir, data.text_key, progress=False
        )
        samples = config.train.steps * config.train.global_batch_size
        dataset = text_dataset(config, tokenizer, prefixes, samples, plan.shape.vocab_size)
        started = tune_recipe.start_run(config, plan, grid)
        micro_batches = tune_recipe.micro_batches_of(started, dataset)
        rate = LearningRate(config.optim, config.train.steps)

        def step(number: int) -> None:
            started.engine.set_lr(rate.at(number - 1))
            started.engine.loss_weights = loss_weights_at(number - 1, plan.loss_weights, config.exits)
            started.engine.train_step(micro_batches)

        return started.engine, step

    def prepare() -> None:
        tune.prepare_data(config, plan, progress=config.logging.progress)

    return Traced(plan.layout, config.train.steps, prepare, begin)


def _supernet(config: Any) -> Traced:
    """The last stage of the recipe: it draws along every axis, with the teacher that it learns from."""
    plan = supernet.make_plan(config)
    index = len(plan.recipe.stages) - 1
    recipe, first = plan.recipe.stages[index], plan.recipe.start(index)

    def begin(grid: Grid, folder: Path) -> tuple[ObservedEngine, Step]:
        data, stage = Data(plan, grid), supernet_recipe.build_stage(plan, grid)
        started = supernet_recipe.start_run(plan, grid, stage, _order(plan, stage, data, folder))
        supernet_recipe.open_stages(started, index)
        supernet_recipe.begin_stage(started)
        micro_batches = data.micro_batches(0)
        optim = SimpleNamespace(**{**dict(config.optim), "lr": plan.learning_rate(index)})
        rate = LearningRate(optim, recipe.steps)
        trainable = FactorPlan(plan.map, plan.factor_settings(index), stage.new).parameters

        def step(number: int) -> None:
            started.engine.set_lr(rate.at(number - 1))
            count = plan.num_micro_batches
            draws = draw_stream(started.space, recipe.axes, first + number - 1, count, plan.sampling, trainable)
            started.engine.train_step(micro_batches, draws)

        return started.engine, step

    def prepare() -> None:
        prepare_supernet_data(plan, progress=config.logging.progress)

    return Traced(plan.layout, recipe.steps, prepare, begin)


def _order(plan: Any, stage: Any, data: Data, folder: Path) -> Any:
    """The run's order of units if it has one already; else it is measured and not kept."""
    stored, own = folder.parent / supernet.ORDER, folder / supernet.ORDER
    has_one = stage.grid.from_rank_0(stored.is_file())
    order = supernet.unit_order(plan, stage, data, stored if has_one else own)
    if stage.grid.rank == 0:
        own.unlink(missing_ok=True)
    return order
