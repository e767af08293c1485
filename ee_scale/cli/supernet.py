"""`ee-scale supernet`: checked and prepared by one process; then the ranks start, sort the units, train and save."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ee_scale.artifact.run_folder import OpenedRun, open_run, run_identity
from ee_scale.artifact.save import load_checkpoint, load_frozen
from ee_scale.backbone.hub import find_model
from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.cli.console import console
from ee_scale.cli.job import Job, log_as_rank, reporter, training_loop
from ee_scale.cli.supernet_data import Data, prepare_data, read_labels
from ee_scale.data.builtin import TINY, tiny_model
from ee_scale.elastic.importance import measure_order
from ee_scale.elastic.order import UnitOrder
from ee_scale.elastic.stage import ElasticStage, base_tensors
from ee_scale.errors import UserError
from ee_scale.files import sync
from ee_scale.grid import Grid
from ee_scale.log import log
from ee_scale.training.supernet import (
    SupernetRun,
    begin_stage,
    build_stage,
    metrics_stream,
    open_stages,
    start_run,
    train,
)
from ee_scale.training.supernet_plan import SupernetPlan, plan_supernet, recipe_rows, task_of

ORDER = "order.safetensors"


def run(config: Any, overrides: Sequence[str]) -> int:
    """Train a supernet."""
    log_as_rank(config)
    plan = make_plan(config)

    def prepare() -> OpenedRun:
        data = prepare_data(plan, progress=config.logging.progress)
        identity = run_identity("supernet", config, plan.model_dir) | {"data": data}
        identity |= {"task": plan.task, "labels": list(plan.labels), "parts": plan.parts}
        opened = open_run(Path(config.out).expanduser(), config, identity)
        check_order(plan, opened)
        return opened

    job = Job("supernet", config, overrides, plan.layout, plan.recipe.total_steps, "palette")
    return job.run(prepare, lambda: show_plan(plan), lambda grid, opened: train_rank(plan, grid, opened))


def make_plan(config: Any) -> SupernetPlan:
    """Find and read the model and the classes, and check the config against them. Raises `UserError`."""
    folder = tiny_model() if config.model.path == TINY else find_model(config.model.path)
    model_config, labels = ModelFolder(folder).config, []
    if task_of(config, model_config) == "classify":
        labels = read_labels(config)
    plan = plan_supernet(config, folder, model_config, labels)
    base_tensors(folder, plan.map)  # weights that do not fit are said now, not by a rank
    return plan


def check_order(plan: SupernetPlan, opened: OpenedRun) -> None:
    """Refuse (`UserError`) to go on without the order of units that the checkpoint was trained in."""
    path = opened.out / ORDER
    if path.is_file():
        UnitOrder.load(path, plan.map.shape)
    elif opened.checkpoint is not None:
        raise UserError(f"{path}: missing; the checkpoints beside it mean nothing without the order of their units")


def train_rank(plan: SupernetPlan, grid: Grid, opened: OpenedRun | None) -> None:
    """One rank's whole run: data, order of units, stage, resume, loop. `opened` is known on rank 0."""
    opened = grid.from_rank_0(opened)
    data = Data(plan, grid)
    stage = build_stage(plan, grid)
    order = unit_order(plan, stage, data, opened.out / ORDER)
    supernet = start_run(plan, grid, stage, order)
    if opened.checkpoint is not None:
        resume(supernet, opened)

    def facts() -> dict[str, Any]:
        return {"recipe_stage": supernet.index, "new": sorted(stage.new)}

    with reporter(plan.config, grid, opened, plan.recipe.total_steps, supernet.step, "subnet") as report:
        drawn = lambda metrics: report(metrics.only(supernet.roles))  # noqa: E731
        train(supernet, data.micro_batches, training_loop(supernet, opened, metrics_stream(supernet), drawn, facts))


def unit_order(plan: SupernetPlan, stage: ElasticStage, data: Data, path: Path) -> UnitOrder:
    """The stored order of the run, or one that is measured now and stored by rank 0. All ranks call it."""
    if stage.grid.from_rank_0(path.is_file()):
        return UnitOrder.load(path, plan.map.shape)
    stage.load(base_tensors(plan.model_dir, plan.map), UnitOrder.identity(plan.map.shape))
    log.info("measuring the importance of heads, MLP units, widths and layers")
    order = measure_order(stage, data.sample(), plan.parts)
    if stage.grid.rank == 0:
        temporary = path.with_name(f".{path.name}.tmp")
        order.save(temporary)
        sync(temporary)
        temporary.replace(path)
    return stage.grid.from_rank_0(order)


def resume(supernet: SupernetRun, opened: OpenedRun) -> None:
    """Continue from the run's last checkpoint, at whatever grid."""
    open_stages(supernet, opened.state["recipe_stage"])
    load_frozen(opened.checkpoint, supernet, opened.state)  # before they are merged into the backbone
    begin_stage(supernet)
    load_checkpoint(opened.checkpoint, supernet, opened.state)
    log.info("continuing from %s", opened.checkpoint)


def show_plan(plan: SupernetPlan) -> None:
    """The recipe table."""
    title = f"{plan.map.config.model_type}, {plan.map.shape.num_layers} layers, {plan.task}"
    table = Table(title=title, title_justify="left")
    for column in ("stage", "may shrink", "steps", "rank", "trained parameters", "smallest subnet"):
        table.add_column(column, justify="left" if column in ("stage", "may shrink") else "right")
    for row in recipe_rows(plan):
        table.add_row(*row)
    console(stderr=True).print(table)
