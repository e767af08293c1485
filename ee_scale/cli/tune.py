"""`ee-scale tune`: everything is checked and prepared by one process; then the ranks start, train and save."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch.utils.data import Dataset
from transformers import AutoTokenizer

from ee_scale.artifact.checkpoint import load_checkpoint, save_checkpoint
from ee_scale.artifact.run_folder import CHECKPOINTS, METRICS, open_run
from ee_scale.backbone.loading import find_model, load_config
from ee_scale.cli.launch import run_ranks
from ee_scale.config.compose import as_dict
from ee_scale.data.builtin import TINY, tiny_model
from ee_scale.data.dataset import build_gpt_dataset, check_tokens
from ee_scale.data.text import prepare_text
from ee_scale.errors import UserError
from ee_scale.grid import Grid, join_grid, launch_info, pick_device, world_size_message
from ee_scale.log import configure_logging, log
from ee_scale.training.plan import TunePlan, plan_tune, stage_rows
from ee_scale.training.report import MetricsFile, ProgressLine, Reporter, WandbSink
from ee_scale.training.tune import TuneRun, start_run, train


def run(config: Any, overrides: Sequence[str]) -> int:
    """Prepare, then train in this process (one rank, or started by torchrun) or in ranks that this process starts."""
    launched = launch_info()
    leader = launched is None or launched.rank == 0
    configure_logging(0 if leader else 1, config.logging.level)
    plan = make_plan(config)
    out = Path(config.out).expanduser()
    if launched is not None and launched.world_size != plan.layout.world_size:
        raise UserError(world_size_message(plan.layout, launched.world_size))
    device = pick_device(config.parallel.device, launched.local_rank if launched else 0)
    if leader:
        # Under torchrun the other ranks wait for rank 0 in join_grid; bad input ends the job before they train.
        prepare_data(config, plan, progress=config.logging.progress)
        _, _, state = open_run(out, config, plan)
        if state.get("step", 0) >= config.train.steps:
            log.info("%s is finished: step %d of %d; raise train.steps to go on", out, state["step"], config.train.steps)
            if launched is None:
                return 0
        if launched is None:
            show_plan(plan)
    if launched is None and plan.layout.world_size > 1:
        return run_ranks("tune", overrides, plan.layout.world_size, device)
    grid = join_grid(plan.layout, device, config.parallel.timeout_minutes)
    train_rank(config, plan, grid, out)
    return 0


def make_plan(config: Any) -> TunePlan:
    """Find and read the model, and check the config against it. Raises `UserError`."""
    folder = tiny_model() if config.model.path == TINY else find_model(config.model.path)
    return plan_tune(config, folder, load_config(folder))


def sources(path: Any) -> list[str]:
    """`data.path` as a list."""
    return [str(path)] if isinstance(path, str) else [str(item) for item in path]


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer. Raises `UserError`."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise UserError(f"model.path={folder}: no tokenizer in it ({str(error).splitlines()[0]})") from error


def prepare_data(config: Any, plan: TunePlan, *, progress: bool) -> tuple[Any, list[str]]:
    """Tokenise what is not cached and check it against the model. Returns (tokenizer, Megatron prefixes)."""
    tokenizer, names = load_tokenizer(plan.model_dir), sources(config.data.path)
    if len(tokenizer) > plan.shape.vocab_size:
        raise UserError(
            f"model.path={plan.model_dir}: its tokenizer has {len(tokenizer)} tokens, but the model's vocab_size is "
            f"{plan.shape.vocab_size}; they do not belong together"
        )
    prefixes = prepare_text(
        names, tokenizer, plan.model_dir, config.data.cache_dir, config.data.text_key, progress
    )
    check_tokens(prefixes, plan.shape.vocab_size, config.data.seq_length, names=names)
    return tokenizer, prefixes


def train_rank(config: Any, plan: TunePlan, grid: Grid, out: Path) -> None:
    """One rank's whole run: data, stage, resume, loop."""
    tokenizer = load_tokenizer(plan.model_dir)
    prefixes = prepare_text(
        sources(config.data.path), tokenizer, plan.model_dir, config.data.cache_dir, config.data.text_key, False
    )
    dataset = build_dataset(config, plan, tokenizer, prefixes)
    tune_run = start_run(config, plan, grid)
    _resume(tune_run, out)
    with Reporter(_sinks(config, tune_run, out) if grid.rank == 0 else []) as report:
        train(tune_run, dataset, report, lambda r: _save(r, out))


def build_dataset(config: Any, plan: TunePlan, tokenizer: Any, prefixes: list[str]) -> Dataset:
    """Megatron's GPT dataset with one sample for every sequence of the run."""
    return build_gpt_dataset(
        prefixes,
        list(config.data.weights) if config.data.weights else None,
        config.data.seq_length,
        config.train.steps * config.train.global_batch_size,
        config.data.seed,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        plan.shape.vocab_size,
        config.data.cache_dir,
    )


def _resume(tune_run: TuneRun, out: Path) -> None:
    # Every rank opens the same folder: rank 0 prepared it, and nothing is written between.
    _, folder, state = open_run(out, tune_run.config, tune_run.plan) if tune_run.grid.rank == 0 else (None, None, None)
    folder, state = tune_run.grid.from_rank_0((folder, state))
    if folder is not None:
        load_checkpoint(folder, tune_run, state)
        log.info("continuing from %s", folder)
        if state["steps"] != tune_run.config.train.steps:
            log.warning("train.steps was %d: the learning rate and the order of the data follow the new value", state["steps"])


def _save(tune_run: TuneRun, out: Path) -> None:
    facts = {"steps": tune_run.config.train.steps, "early_exit": tune_run.plan.spec.to_dict()}
    save_checkpoint(out / CHECKPOINTS, tune_run, facts, tune_run.config.train.keep)


def _sinks(config: Any, tune_run: TuneRun, out: Path) -> list[Any]:
    every = config.logging.every
    sinks: list[Any] = [
        MetricsFile(out / METRICS),
        ProgressLine(config.train.steps, tune_run.step, every, enabled=config.logging.progress),
    ]
    if config.logging.wandb != "disabled":
        sinks.append(WandbSink(out, config.logging, as_dict(config), out.resolve().name))
    return sinks


def show_plan(plan: TunePlan) -> None:
    """The stage table."""
    table = Table(title=f"{plan.model_config.model_type}, {plan.shape.num_layers} layers", title_justify="left")
    for column in ("stage", "layers", "exits after layer", "trained parameters"):
        table.add_column(column, justify="right")
    for row in stage_rows(plan):
        table.add_row(*row)
    Console(stderr=True).print(table)
