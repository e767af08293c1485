"""`ee-scale demo`: early exits on a real language model (SmolLM2-135M), or on one that is trained on the spot."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from ee_scale import api
from ee_scale.artifact.export import export_early_exit
from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.cli import train
from ee_scale.cli.console import console
from ee_scale.config.compose import compose_config
from ee_scale.config.convert import ConvertConfig
from ee_scale.config.schema import DemoConfig, GenerateConfig
from ee_scale.data.builtin import made_of
from ee_scale.data.inputs import load_tokenizer
from ee_scale.data.smollm2 import MISSING, find_smollm2
from ee_scale.errors import UserError
from ee_scale.evaluation.colours import coloured_text, exit_choices, first_agreeing, legend
from ee_scale.evaluation.evaluate import measure, open_for_measuring
from ee_scale.evaluation.per_exit import ExitQuality
from ee_scale.evaluation.quality_report import plot_quality, quality_table
from ee_scale.evaluation.turns import decode_by_turns, decoding_table, prediction
from ee_scale.files import cache_folder, file_digest, remove_folder, write_text
from ee_scale.inference.model import EarlyExitForCausalLM
from ee_scale.inference.prompts import encode_prompts
from ee_scale.log import Terminal, configure_logging
from ee_scale.progress import shares
from ee_scale.reading import read_object
from ee_scale.training.pretrain import SEQ_LENGTH, trained_llama

RESULTS = "demo.json"
CLEARLY_FASTER = 1.05  # two timings of one way to decode may lie so far apart


@dataclass(frozen=True)
class Subject:
    """What is shown on which model.

    Attributes:
        layers, kind: of the exits, which are measured before, too; training: more settings of the run.
        tokens: held-out tokens that are measured; prompt: what is continued, as a chat message with `chat`.
    """

    name: str
    model: str
    layers: tuple[int, ...]
    kind: str
    training: tuple[str, ...]
    tokens: int
    prompt: str
    chat: bool


def run(config: DemoConfig, overrides: Sequence[str]) -> int:
    """Exits measured as copies, tuned on two processes, exported, measured again, seen in a text, timed."""
    configure_logging()
    started, terminal, out = time.perf_counter(), console(), Path(config.out).expanduser()
    lock = FileLock(out / ".lock", timeout=0)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"out={config.out}: another demo writes there; give another folder") from None
    except OSError as error:
        raise UserError(f"out={config.out}: cannot write there ({error.strerror})") from error
    try:
        _show(config, out, terminal)
    finally:
        lock.release()
    terminal.print(
        f"\nplot {out / 'exits.png'}   model {out / 'model'}   {time.perf_counter() - started:.0f} s", highlight=False
    )
    return 0


def _show(config: DemoConfig, out: Path, terminal: Terminal) -> None:
    subject = _subject(config, terminal)
    before, after, tokens = _tuned(subject, config, out, terminal)
    title = f"exits of {subject.name}, {after[-1].layer} layers, on {tokens:,} held-out tokens"
    terminal.print(quality_table(after, title, before))
    plot_quality(out / "exits.png", after, before)
    _show_text(out / "model", subject, config, terminal)


def _subject(config: DemoConfig, terminal: Terminal) -> Subject:
    """SmolLM2 where its package is installed, else a small Llama trained on Python's library (once, then cached)."""
    training = ("train.micro_batch_size=4", "train.global_batch_size=8")
    found = find_smollm2() if config.model == "smollm2" else None
    if found is not None:
        folder = _in_bf16(found, _cache(config) / "models")
        depth, words = (getattr(ModelFolder(folder).config, name) for name in ("num_hidden_layers", "vocab_size"))
        # The heads of a whole vocabulary would be most of the work.
        head = ("exits.head=shortlist", f"exits.shortlist={min(4096, words // 4)}")
        return Subject(
            name="SmolLM2-135M-Instruct",
            model=str(folder),
            layers=tuple(depth * n // 6 for n in (3, 4, 5)),
            kind="layer",
            training=(*training, *head, "optim.lr=1e-3", f"train.steps={config.steps or 60}"),
            tokens=10_000,
            prompt=config.prompt or "Why do programmers like Python? Answer in a few sentences.",
            chat=True,
        )
    if config.model == "smollm2":
        terminal.print(f"{MISSING}; the demo takes a small model that it trains itself", highlight=False)
    return Subject(
        name="a small Llama",
        model=str(demo_backbone(config)),
        layers=(3, 6, 9),
        kind="mlp",
        training=(*training, "optim.lr=1e-3", f"train.steps={config.steps or 150}"),
        tokens=40_000,
        prompt=config.prompt or "    def __init__(self, ",
        chat=False,
    )


def _in_bf16(file: Path, models: Path) -> Path:
    """A GGUF file as a plain folder in the number type that CPUs and GPUs multiply fastest; made once."""
    folder = models / f"{file.stem}-bf16-{made_of(file_digest(file))}"
    models.mkdir(parents=True, exist_ok=True)
    with FileLock(models / f"{folder.name}.lock"):  # another demo may be making it
        if not folder.is_dir():
            api.convert(ConvertConfig(src=str(file), to="hf", dtype="bf16", out=str(folder)))
    return folder


def demo_backbone(config: DemoConfig) -> Path:
    """Folder of the small Llama."""
    with shares("training a backbone") as show:
        return trained_llama(_cache(config), config.pretrain_minutes, show)


def _tuned(
    subject: Subject, config: DemoConfig, out: Path, terminal: Terminal
) -> tuple[list[ExitQuality], list[ExitQuality], int]:
    """Exits before and after tuning, and the tokens measured; `out`/model has them. Done once for these settings."""
    made_with = json.loads(json.dumps(asdict(replace(subject, prompt=""))))
    if (found := _stored(out, made_with)) is not None:
        terminal.print(f"exits of an earlier demo: {out / 'model'}", highlight=False)
        return found
    (out / RESULTS).unlink(missing_ok=True)
    exits = f"[{','.join(map(str, subject.layers))}]"
    before, _ = _measure(subject.model, subject, config, exits=exits, kind=subject.kind)
    overrides = [
        f"model={subject.model}",
        "data=python",
        f"data.cache_dir={_cache(config) / 'data'}",
        f"data.seq_length={SEQ_LENGTH}",
        f"exits.layers={exits}",
        f"exits.kind={subject.kind}",
        "parallel.pp=2",
        *subject.training,
        f"out={out / 'run'}",
    ]
    remove_folder(out / "run")
    train.run("tune", compose_config("tune", overrides), overrides)
    remove_folder(out / "model")
    export_early_exit(out / "run", out / "model", None)
    after, tokens = _measure(str(out / "model"), subject, config)
    rows = {name: [row.to_json() for row in rows] for name, rows in (("before", before), ("after", after))}
    write_text(out / RESULTS, json.dumps({"made_with": made_with, "tokens": tokens, **rows}, indent=1))
    return before, after, tokens


def _stored(out: Path, made_with: dict[str, object]) -> tuple[list[ExitQuality], list[ExitQuality], int] | None:
    """The numbers of an earlier demo with these settings, if its model is still there."""
    if not (out / RESULTS).is_file() or not (out / "model").is_dir():
        return None
    values = read_object(out / RESULTS)
    if values.get("made_with") != made_with:
        return None
    before, after = ([ExitQuality(**row) for row in values[name]] for name in ("before", "after"))
    return before, after, values["tokens"]


def _measure(model: str, subject: Subject, config: DemoConfig, **settings: str) -> tuple[list[ExitQuality], int]:
    """The numbers of `ee-scale evaluate` on text that no exit saw."""
    given = {"model": model, "data": "python:valid", "seq_length": SEQ_LENGTH, "max_tokens": subject.tokens}
    given |= {"cache_dir": _cache(config) / "data", **settings}
    plan = compose_config("evaluate", [f"{key}={value}" for key, value in given.items()])
    opened = open_for_measuring(plan)
    folder = Path(opened.config.name_or_path)
    return measure(plan, opened, load_tokenizer(folder, "model"), folder)


def _show_text(folder: Path, subject: Subject, config: DemoConfig, terminal: Terminal) -> None:
    """An answer coloured by the first exit that would have said each token, then three ways to decode it."""
    # Not in bf16: where two tokens are as likely there, passes of one and of several rows choose differently.
    model, tokenizer = EarlyExitForCausalLM.from_pretrained(folder, dtype=torch.float32), load_tokenizer(folder)
    request = GenerateConfig(model=str(folder), chat=subject.chat, max_new_tokens=config.new_tokens)
    prompt = torch.tensor(encode_prompts([subject.prompt], tokenizer, model.config, request))
    ids, choices = exit_choices(model, prompt, config.new_tokens)
    exits, layers = first_agreeing(ids, choices), list(model.exit_spec.layers)
    terminal.print(legend(exits, layers, model.config.num_hidden_layers))
    terminal.print(coloured_text(tokenizer, subject.prompt + ("\n" if subject.chat else ""), ids, exits, layers))
    ways = decode_by_turns(model, prompt, config.new_tokens)
    terminal.print(decoding_table(ways))
    if (ratio := ways["lossless"].ratio) < CLEARLY_FASTER:
        agreement = {k: sum(a == b for a, b in zip(said, ids, strict=True)) / len(ids) for k, said in choices.items()}
        terminal.print(prediction(model, agreement, ratio), highlight=False)


def _cache(config: DemoConfig) -> Path:
    return cache_folder() if config.cache_dir is None else Path(config.cache_dir).expanduser()
