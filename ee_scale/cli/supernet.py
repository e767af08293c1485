"""`ee-scale supernet`: checked and prepared by one process; then the ranks start, sort the units, train and save."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ee_scale.artifact.run_folder import CHECKPOINTS, METRICS, OpenedRun, open_run, run_identity
from ee_scale.artifact.save import load_checkpoint, load_frozen, save_checkpoint
from ee_scale.backbone.loading import TensorFolder, find_model, read_config
from ee_scale.cli.console import console
from ee_scale.cli.inputs import load_tokenizer, sources
from ee_scale.cli.launch import run_ranks
from ee_scale.config.compose import as_dict
from ee_scale.data.builtin import TINY, tiny_model
from ee_scale.data.dataset import build_gpt_dataset, check_tokens
from ee_scale.data.labelled import check_labels, encode, label_names, labelled_batches, read_labelled
from ee_scale.data.loader import batches
from ee_scale.data.text import prepare_text
from ee_scale.elastic.importance import measure_order
from ee_scale.elastic.order import UnitOrder
from ee_scale.elastic.stage import ElasticStage
from ee_scale.errors import UserError
from ee_scale.files import sync
from ee_scale.grid import Grid, join_grid, launch_info, pick_device, world_size_message
from ee_scale.log import configure_logging, log
from ee_scale.training.report import MetricsFile, ProgressLine, Reporter, WandbSink
from ee_scale.training.supernet import SupernetRun, begin_stage, build_stage, open_stages, start_run, train
from ee_scale.training.supernet_plan import SupernetPlan, plan_supernet, recipe_rows, task_of

ORDER = "order.safetensors"


def run(config: Any, overrides: Sequence[str]) -> int:
    """Prepare, then train in this process (one rank, or started by torchrun) or in ranks that this process starts."""
    launched = launch_info()
    leader = launched is None or launched.rank == 0
    configure_logging(0 if leader else 1, config.logging.level)
    plan = make_plan(config)
    if launched is not None and launched.world_size != plan.layout.world_size:
        raise UserError(world_size_message(plan.layout, launched.world_size))
    device = pick_device(config.parallel.device, launched.local_rank if launched else 0)
    opened = None
    if leader:
        prepare_data(plan, progress=config.logging.progress)
        identity = run_identity("supernet", config, plan.model_dir)
        identity |= {"task": plan.task, "labels": list(plan.labels), "parts": plan.parts}
        opened = open_run(Path(config.out).expanduser(), config, identity)
        if launched is None:
            show_plan(plan)
    if launched is None and opened.state.get("step", 0) >= plan.recipe.total_steps:
        log.info("%s is finished (step %d)", config.out, opened.state["step"])
        return 0
    if launched is None and plan.layout.world_size > 1:
        code = run_ranks("supernet", overrides, plan.layout.world_size, device)
    else:
        train_rank(plan, join_grid(plan.layout, device, config.parallel.timeout_minutes), opened)
        code = 0
    if launched is None and code == 0:
        log.info("done; next: ee-scale palette src=%s out=<folder>", config.out)
    return code


def make_plan(config: Any) -> SupernetPlan:
    """Find and read the model and the classes, and check the config against them. Raises `UserError`."""
    folder = tiny_model() if config.model.path == TINY else find_model(config.model.path)
    model_config, labels = read_config(folder), []
    if task_of(config, model_config) == "classify":
        labels = _labels(config)
    plan = plan_supernet(config, folder, model_config, labels)
    TensorFolder(folder)  # a missing or cut-off weight file is said now, not by a rank
    return plan


def _labels(config: Any) -> list[str]:
    (path,) = _one_file(config.data.path, "data.path")
    labels = label_names(_examples(path, config))
    if len(labels) < 2:
        raise UserError(f"data.path={path}: one class ({labels[0]}); a classifier needs two")
    if config.data.valid is not None:
        (valid,) = _one_file(config.data.valid, "data.valid")
        check_labels(labels, _examples(valid, config), valid)
    return labels


def _one_file(path: Any, name: str) -> list[str]:
    found = sources(path)
    if len(found) != 1:
        raise UserError(f"{name}={found}: labelled data is one file")
    return found


def _examples(path: str, config: Any) -> list[Any]:
    return read_labelled(path, config.data.text_key, config.data.label_key, config.data.pair_key)


def prepare_data(plan: SupernetPlan, *, progress: bool) -> None:
    """Tokenise text that is not cached and check it against the model. Raises `UserError`."""
    tokenizer, config = load_tokenizer(plan.model_dir), plan.config
    vocab_size = plan.map.config.vocab_size
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"model.path={plan.model_dir}: its tokenizer has {len(tokenizer)} tokens, but the model's vocab_size is "
            f"{vocab_size}; they do not belong together"
        )
    if plan.task == "causal_lm":
        names = sources(config.data.path)
        prefixes = prepare_text(names, tokenizer, plan.model_dir, config.data.cache_dir, config.data.text_key, progress)
        check_tokens(prefixes, vocab_size, config.data.seq_length, names=names)


def train_rank(plan: SupernetPlan, grid: Grid, opened: OpenedRun | None) -> None:
    """One rank's whole run: data, order of units, stage, resume, loop. `opened` is known on rank 0."""
    opened = grid.from_rank_0(opened)
    data = Data(plan, grid)
    stage = build_stage(plan, grid)
    order = unit_order(plan, stage, data, opened.out / ORDER)
    supernet = start_run(plan, grid, stage, order)
    if opened.checkpoint is not None:
        resume(supernet, opened)
    with Reporter(_sinks(supernet, opened) if grid.rank == 0 else []) as report:
        train(supernet, data.micro_batches, report, lambda finished: _save(finished, opened.out))


class Data:
    """The run's training data, for steps and for measuring importance."""

    def __init__(self, plan: SupernetPlan, grid: Grid):
        self.plan, self.grid, config = plan, grid, plan.config
        tokenizer = load_tokenizer(plan.model_dir)
        names = sources(config.data.path)
        if plan.task == "classify":
            self.data = encode(_examples(names[0], config), tokenizer, plan.labels, config.data.seq_length)
            return
        prefixes = prepare_text(names, tokenizer, plan.model_dir, config.data.cache_dir, config.data.text_key, False)
        self.data = build_gpt_dataset(
            prefixes,
            list(config.data.weights) if config.data.weights else None,
            config.data.seq_length,
            plan.recipe.total_steps * config.train.global_batch_size,
            config.data.seed,
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
            plan.map.config.vocab_size,
            config.data.cache_dir,
        )

    def micro_batches(self, consumed_samples: int) -> Iterator[dict[str, torch.Tensor]]:
        """This replica's micro-batches after so many samples."""
        config, grid = self.plan.config, self.grid
        common = {
            "micro_batch_size": config.train.micro_batch_size,
            "num_micro_batches": self.plan.num_micro_batches,
            "dp_rank": grid.dp_rank,
            "dp_size": grid.layout.dp,
            "consumed_samples": consumed_samples,
        }
        if self.plan.task == "classify":
            return labelled_batches(self.data, seed=config.data.seed, **common)
        return batches(self.data, num_workers=config.data.num_workers, **common)

    def sample(self) -> Iterator[dict[str, torch.Tensor]]:
        """The first sequences of the run in batches, the same on every rank."""
        importance = self.plan.config.importance
        size = min(importance.batch_size, importance.samples, len(self.data))
        one = {"micro_batch_size": size, "num_micro_batches": 1, "dp_rank": 0, "dp_size": 1}
        seed = self.plan.config.data.seed
        found = (
            labelled_batches(self.data, seed=seed, **one) if self.plan.task == "classify" else batches(self.data, **one)
        )
        return islice(found, max(1, importance.samples // size))


def unit_order(plan: SupernetPlan, stage: ElasticStage, data: Data, path: Path) -> UnitOrder:
    """The stored order of the run, or one that is measured now and stored by rank 0. All ranks call it."""
    if stage.grid.from_rank_0(path.is_file()):
        return UnitOrder.load(path, plan.map.shape)
    stage.load(TensorFolder(plan.model_dir), UnitOrder.identity(plan.map.shape))
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


def _save(supernet: SupernetRun, out: Path) -> None:
    facts = {"recipe_stage": supernet.index, "new": sorted(supernet.stage.new)}
    save_checkpoint(out / CHECKPOINTS, supernet, facts, supernet.config.train.keep)


def _sinks(supernet: SupernetRun, opened: OpenedRun) -> list[Any]:
    config, steps = supernet.config, supernet.plan.recipe.total_steps
    sinks: list[Any] = [
        MetricsFile(opened.out / METRICS),
        ProgressLine(steps, supernet.step, config.logging.every, "subnet", enabled=config.logging.progress),
    ]
    if config.logging.wandb != "disabled":
        sinks.append(WandbSink(opened.out, config.logging, as_dict(config), opened.identity["run_id"], "subnet"))
    return sinks


def show_plan(plan: SupernetPlan) -> None:
    """The recipe table."""
    title = f"{plan.map.config.model_type}, {plan.map.shape.num_layers} layers, {plan.task}"
    table = Table(title=title, title_justify="left")
    for column in ("stage", "may shrink", "steps", "rank", "trained parameters", "smallest subnet"):
        table.add_column(column, justify="left" if column in ("stage", "may shrink") else "right")
    for row in recipe_rows(plan):
        table.add_row(*row)
    console(stderr=True).print(table)
