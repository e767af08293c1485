"""`ee-scale demo`: the whole path on a model trained on the spot, with nothing to download."""

import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import LlamaForCausalLM

from ee_scale.artifact.export import export_early_exit
from ee_scale.cli import train
from ee_scale.cli.console import console
from ee_scale.config.compose import compose_config
from ee_scale.config.schema import DemoConfig
from ee_scale.data.builtin import llama_config, made_of, train_tokenizer
from ee_scale.data.corpora import open_source, python_documents
from ee_scale.data.dataset import build_gpt_dataset
from ee_scale.data.inputs import load_tokenizer
from ee_scale.data.loader import batches
from ee_scale.data.text import prepare_text
from ee_scale.evaluation.colours import coloured_text, first_agreeing_exits, legend
from ee_scale.evaluation.evaluate import measure, open_for_measuring
from ee_scale.evaluation.per_exit import ExitQuality
from ee_scale.evaluation.quality_report import plot_quality, quality_table
from ee_scale.files import published, remove_folder
from ee_scale.inference.model import EarlyExitForCausalLM
from ee_scale.log import configure_logging
from ee_scale.training.pretrain import pretrain

LAYERS, HIDDEN, VOCAB, SEQ_LENGTH, BATCH = 12, 128, 1024, 256, 4
EXIT_LAYERS = [3, 6, 9]


def run(config: DemoConfig, overrides: Sequence[str]) -> int:
    """Backbone (cached), copy-init exits measured, exits tuned on 2 processes, exported, measured, shown."""
    configure_logging()
    started, terminal, out = time.perf_counter(), console(), Path(config.out).expanduser()
    backbone = demo_backbone(config, terminal)
    before, _ = _measure(backbone, config, exits=f"[{','.join(map(str, EXIT_LAYERS))}]")
    _tune(backbone, out / "run", config)
    exported = out / "model"
    remove_folder(exported)
    export_early_exit(out / "run", exported, None)
    after, tokens = _measure(exported, config)
    terminal.print(quality_table(after, f"exits of a {LAYERS}-layer model on {tokens:,} held-out tokens", before))
    plot_quality(out / "exits.png", after, before)
    _show_text(exported, config, terminal)
    terminal.print(
        f"\nplot {out / 'exits.png'}   model {exported}   {time.perf_counter() - started:.0f} s", highlight=False
    )
    return 0


def demo_backbone(config: DemoConfig, terminal: Console) -> Path:
    """Folder of a small Llama trained on Python's documentation and library; trained once, then cached."""
    cache = _cache(config)
    text = open_source("python", "text").identity
    name = made_of(VOCAB, SEQ_LENGTH, BATCH, text)
    folder = cache / "models" / f"demo-{LAYERS}x{HIDDEN}-{config.pretrain_minutes:g}min-{name}"
    if folder.is_dir():
        terminal.print(f"backbone from the cache: {folder}", highlight=False)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer((text for _, text in islice(python_documents(), 300)), VOCAB)
    prefixes = prepare_text(["python"], tokenizer, folder, cache / "data", "text", True)
    ids = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    dataset = build_gpt_dataset(prefixes, None, SEQ_LENGTH, 20_000, 0, *ids, len(tokenizer), cache / "data")
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(tokenizer, layers=LAYERS, hidden=HIDDEN, max_positions=2 * SEQ_LENGTH))
    data = batches(dataset, micro_batch_size=BATCH, num_micro_batches=1, dp_rank=0, dp_size=1)
    columns = (TextColumn("training a backbone"), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True)) as bar:
        task = bar.add_task("", total=1.0)

        def show(share: float, loss: float) -> None:
            bar.update(task, completed=share, description=f"loss {loss:.2f}")

        pretrain(model, data, 60 * config.pretrain_minutes, show)
    with published(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def _tune(backbone: Path, out: Path, config: DemoConfig) -> None:
    """`ee-scale tune` on a 1x2x1 grid: two pipeline stages, two processes."""
    overrides = [
        f"model={backbone}",
        "data=python",
        f"data.cache_dir={_cache(config) / 'data'}",
        f"exits.layers=[{','.join(map(str, EXIT_LAYERS))}]",
        "parallel.pp=2",
        f"train.steps={config.steps}",
        f"train.micro_batch_size={BATCH}",
        f"train.global_batch_size={2 * BATCH}",
        "optim.lr=1e-3",
        f"out={out}",
    ]
    remove_folder(out)
    train.run("tune", compose_config("tune", overrides), overrides)


def _measure(model: Path, config: DemoConfig, **settings: str) -> tuple[list[ExitQuality], int]:
    """The numbers of `ee-scale evaluate` on text that neither backbone nor exits saw."""
    given = {"model": model, "data": "python:valid", "seq_length": SEQ_LENGTH, "max_tokens": 40_000, **settings}
    given["cache_dir"] = _cache(config) / "data"
    plan = compose_config("evaluate", [f"{key}={value}" for key, value in given.items()])
    opened = open_for_measuring(plan)
    return measure(plan, opened, load_tokenizer(model, "model"), model)


def _show_text(folder: Path, config: DemoConfig, terminal: Console) -> None:
    model, tokenizer = EarlyExitForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    prompt = tokenizer(config.prompt, return_tensors="pt").input_ids
    ids, exits = first_agreeing_exits(model, prompt, config.new_tokens)
    layers = list(model.exit_spec.layers)
    terminal.print(legend(exits, layers, model.config.num_hidden_layers))
    terminal.print(coloured_text(tokenizer, config.prompt, ids, exits, layers))


def _cache(config: DemoConfig) -> Path:
    return Path(config.cache_dir or "~/.cache/ee_scale").expanduser()
