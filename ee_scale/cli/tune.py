"""`ee-scale tune`: everything is checked and prepared by one process; then the ranks start, train and save."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ee_scale.artifact.run_folder import OpenedRun, data_identity, open_run, tune_identity
from ee_scale.artifact.save import load_checkpoint
from ee_scale.backbone.hub import find_model
from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.backbone.shard import model_tensors
from ee_scale.cli.console import console
from ee_scale.cli.inputs import load_tokenizer, sources, text_dataset
from ee_scale.cli.job import Job, log_as_rank, reporter, training_loop
from ee_scale.data.builtin import TINY, tiny_model
from ee_scale.data.dataset import check_tokens
from ee_scale.data.text import prepare_text
from ee_scale.grid import Grid
from ee_scale.log import log
from ee_scale.training.memory import tune_parameters
from ee_scale.training.plan import TunePlan, plan_tune
from ee_scale.training.tune import TuneRun, metrics_stream, start_run, train


def run(config: Any, overrides: Sequence[str]) -> int:
    """Train exits."""
    log_as_rank(config)
    plan = make_plan(config)

    def prepare() -> OpenedRun:
        data = prepare_data(config, plan, progress=config.logging.progress)
        return open_run(Path(config.out).expanduser(), config, tune_identity(config, plan) | {"data": data})

    job = Job("tune", config, overrides, plan.layout, config.train.steps, "export")
    return job.run(
        prepare, lambda: show_plan(config, plan), lambda grid, opened: train_rank(config, plan, grid, opened)
    )


def make_plan(config: Any) -> TunePlan:
    """Find and read the model, and check the config against it. Raises `UserError`."""
    folder = tiny_model() if config.model.path == TINY else find_model(config.model.path)
    plan = plan_tune(config, folder, ModelFolder(folder).decoder_config)
    model_tensors(folder, plan.model_config)  # weights that do not fit are said now, not by a rank
    return plan


def prepare_data(config: Any, plan: TunePlan, *, progress: bool) -> dict[str, Any]:
    """Tokenise what is not cached, check it against the model, and say which data it is. Raises `UserError`."""
    tokenizer, names = load_tokenizer(plan.model_dir), sources(config.data.path)
    prefixes = prepare_text(names, tokenizer, plan.model_dir, config.data.cache_dir, config.data.text_key, progress)
    vocab_size, seq_length = plan.shape.vocab_size, config.data.seq_length
    digests = check_tokens(prefixes, vocab_size, seq_length, names=names, tokenizer=tokenizer)
    return data_identity(digests, tokenizer)


def train_rank(config: Any, plan: TunePlan, grid: Grid, opened: OpenedRun | None) -> None:
    """One rank's whole run: data, stage, resume, loop. `opened` is known on rank 0."""
    opened = grid.from_rank_0(opened)
    tokenizer = load_tokenizer(plan.model_dir)
    names = sources(config.data.path)
    prefixes = prepare_text(names, tokenizer, plan.model_dir, config.data.cache_dir, config.data.text_key, False)
    samples = config.train.steps * config.train.global_batch_size
    dataset = text_dataset(config, tokenizer, prefixes, samples, plan.shape.vocab_size)
    tune_run = start_run(config, plan, grid)
    if opened.checkpoint is not None:
        resume(tune_run, opened)
    facts = {"steps": config.train.steps, "early_exit": plan.spec.to_dict(), "backbone": plan.backbone.mode}
    with reporter(config, grid, opened, config.train.steps, tune_run.step, "exit") as report:
        train(tune_run, dataset, training_loop(tune_run, opened, metrics_stream(tune_run), report, lambda: facts))


def resume(tune_run: TuneRun, opened: OpenedRun) -> None:
    """Continue from the run's last checkpoint."""
    load_checkpoint(opened.checkpoint, tune_run, opened.state)
    log.info("continuing from %s", opened.checkpoint)
    steps = opened.state["steps"]
    if steps != tune_run.config.train.steps and tune_run.grid.rank == 0:
        log.warning("train.steps was %d: learning rate and order of the data now follow the new value", steps)


def show_plan(config: Any, plan: TunePlan) -> None:
    """The stage table."""
    table = Table(title=f"{plan.model_config.model_type}, {plan.shape.num_layers} layers", title_justify="left")
    for column in ("stage", "layers", "exits after layer", "trained by a rank"):
        table.add_column(column, justify="right")
    for stage in range(len(plan.stages.bounds) - 1):
        if stage >= plan.stages.launched:
            first, last = plan.stages.bounds[stage] + 1, plan.stages.bounds[stage + 1]
            table.add_row(str(stage), f"{first}-{last}", "", "not launched")
            continue
        layers, exits = plan.stages.layers(stage), ", ".join(map(str, plan.stages.exits(stage)))
        trained = tune_parameters(plan, config, stage).trained
        table.add_row(str(stage), f"{layers.start + 1}-{layers.stop}", exits, f"{trained:,}")
    console(stderr=True).print(table)
