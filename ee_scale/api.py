"""The commands as functions: a config in, an object out. `ee_scale.tune` and the others are these.

    config = TuneConfig(model=ModelConfig("path/to/llama"), data=DataConfig("corpus.txt"), out="runs/a")
    run = ee_scale.tune(config)

Configs are the dataclasses of `ee_scale.config`, with the defaults, types and rules of the command line. Nothing is
printed and no process ends; progress is shown on a terminal and in a notebook. Every function raises `UserError` (a
ValueError, one line) for a setting or a file that cannot be meant. They work in any thread, but a grid of ranks is
started from the main one: Python tells no other of the signals that the ranks get.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ee_scale.config.compose import checked, to_yaml
from ee_scale.config.convert import ConvertConfig
from ee_scale.config.defer import DeferConfig
from ee_scale.config.schema import (
    CalibrateConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    TrainingConfig,
)
from ee_scale.config.supernet import PaletteConfig, SupernetConfig
from ee_scale.config.tune import TuneConfig
from ee_scale.errors import REQUEUE, Requeue, RunError
from ee_scale.libraries import kept_environment, prepare_libraries

if TYPE_CHECKING:  # rooms are imported when they are used: after `prepare_libraries`, and only those that are needed
    from ee_scale.artifact.gguf_export import GGUFReport
    from ee_scale.artifact.onnx import OnnxReport
    from ee_scale.conversion.convert import Converted
    from ee_scale.evaluation.calibrate import Calibration
    from ee_scale.evaluation.deferral import Deferral
    from ee_scale.evaluation.evaluate import Evaluation
    from ee_scale.palettes.drafts import DraftPair
    from ee_scale.palettes.manifest import Manifest

C = TypeVar("C")


@dataclass(frozen=True)
class TrainedRun:
    """A run that has ended: its folder, its last step, and that step's losses (nats) by exit layer or subnet."""

    folder: Path
    step: int
    losses: dict[str, float]


@dataclass(frozen=True)
class Exported:
    """A folder or file that was written, and what an ONNX file, a GGUF file or a measured drafter is worth."""

    folder: Path
    onnx: "OnnxReport | None" = None
    gguf: "GGUFReport | None" = None
    drafter: "DraftPair | None" = None


@dataclass(frozen=True)
class Generated:
    """The continuation of one prompt.

    Attributes:
        tokens: how many are new; layers: the layer each of them came from, None with policy `off`.
    """

    prompt: str
    text: str
    tokens: int
    layers: list[int] | None


def tune(config: TuneConfig) -> TrainedRun:
    """Train early exits on a frozen model, or together with it (EE-Tuning, arXiv 2402.00518; EE-LLM, 2312.04916).

    One rank trains in this process; a grid of several is started on this machine, as `ee-scale tune` does. A finished
    or stopped run in `config.out` goes on from its last checkpoint.

    Args:
        config: model, data, exits, grid (tp x pp x dp), optimizer; needs `model.path` and `data.path`.

    Returns:
        The run, whose folder `export` takes.

    Raises:
        RunError: the run cannot go on (losses are non-finite, a rank died).
        Requeue: a signal asked it to leave; its state is saved.
    """
    return _train("tune", config)


def supernet(config: SupernetConfig) -> TrainedRun:
    """Train one weight-sharing supernet in low-rank stages (MLFS, arXiv 2404.01353).

    Args:
        config: model, data, space of sizes, stages; `data.valid` is what `palette` judges on. Errors as of `tune`.

    Returns:
        The run, whose folder `palette` takes.
    """
    return _train("supernet", config)


def palette(config: PaletteConfig) -> "Manifest":
    """Search a supernet for sizes that keep limits, cut them out as stock models and measure them.

    Args:
        config: `src` (a supernet run), `out` (a new folder), limits: parameters, FLOPs, milliseconds, megabytes.

    Returns:
        What lies in `out`: every member with its sizes, cost and quality; with `drafts` the pairs that may draft.
    """
    config = _ready(config)
    from ee_scale.palettes.make import make_palette

    with _left_grid(), kept_environment():
        return make_palette(config)


def export(config: ExportConfig) -> Exported:
    """Turn a tuned run into a model with exits, its exits alone or one of them as a stock model; a model into a file.

    Args:
        config: `src` (a tune run; with another format than `hf` a stock model folder), `out` (new), kind, format.
    """
    config = _ready(config)
    from ee_scale.artifact.exports import run_export, run_gguf, run_onnx

    out = Path(config.out).expanduser()
    if config.format == "onnx":
        return Exported(out, onnx=run_onnx(config))
    if config.format == "gguf":
        return Exported(out, gguf=run_gguf(config))
    if config.kind == "drafter":
        from ee_scale.palettes.drafter import run_drafter

        return Exported(out, drafter=run_drafter(config))
    run_export(config)
    return Exported(out)


def convert(config: ConvertConfig, tell: Callable[[str], None] = lambda line: None) -> "Converted":
    """Turn a checkpoint of Hugging Face, Megatron-Core, Megatron-LM, EE-LLM or DeepSpeed into another layout.

    Args:
        config: `src` (never changed), `out` (a new folder), `to`; with `plan` nothing is written.
        tell: gets each line that a person should know as soon as it is known.
    """
    config = _ready(config)
    from ee_scale.conversion.convert import convert as carry_out

    return carry_out(config, tell)


def evaluate(config: EvaluateConfig) -> "Evaluation":
    """Loss (nats per token), perplexity and agreement with the final layer of every exit, on a text.

    Args:
        config: `model` (a folder), `data`; `sweep` adds quality against speed, `tag_key` figures per group.
    """
    config = _ready(config)
    from ee_scale.evaluation.evaluate import run_evaluation
    from ee_scale.planning.out_of_memory import reading_advice, told_when_full

    with told_when_full(lambda: reading_advice(config)):
        return run_evaluation(config)


def calibrate(config: CalibrateConfig) -> "Calibration":
    """Find limits for leaving early that hold a bound with a known confidence (Learn then Test, arXiv 2110.01052).

    They are stored in the model's `generation_config.json`, where `generate` finds them.

    Args:
        config: `model` (with exits), held-out `data`, the bound: a share of tokens, or nats per token.
    """
    config = _ready(config)
    from ee_scale.evaluation.calibrate import run_calibration
    from ee_scale.planning.out_of_memory import reading_advice, told_when_full

    with told_when_full(lambda: reading_advice(config)):
        return run_calibration(config)


def defer(config: DeferConfig) -> "Deferral":
    """Find when a small model's answer may stand, so that little is lost against always asking a larger one.

    The rule and a plot are written to `out`; the bound holds with a known confidence (Learn then Test).

    Args:
        config: `small`, `large` (folders), `data` (prompts with references), the `loss` allowed, the `link`'s time.
    """
    config = _ready(config)
    from ee_scale.evaluation.defer import run_deferral

    return run_deferral(config)


def generate(config: GenerateConfig) -> list[Generated]:
    """Continue prompts, with early exits by a policy or losslessly; in prompt order.

    `EarlyExitForCausalLM.generate` does the same with token ids, for a model that is kept. A grid of stages and tensor
    ranks is started on this machine.

    Args:
        config: `model`, and `prompt` or `prompts`; with `out` the answers are also written there, as JSON lines.
    """
    config = _ready(config)
    from ee_scale.files import write_text
    from ee_scale.grid import pick_device
    from ee_scale.inference.request import checked_request
    from ee_scale.inference.run import answer_lines, answer_rows, decode_here
    from ee_scale.launching.ranks import run_ranks
    from ee_scale.planning.out_of_memory import decoding_advice, told_when_full

    request = checked_request(config)
    size, device = config.parallel.tp * config.parallel.pp, pick_device(config.device)
    if size == 1:
        with told_when_full(lambda: decoding_advice(config, request.folder, max(map(len, request.prompts)))):
            answers = decode_here(request, device)
        rows = answer_rows(request, answers)
        if config.out is not None:
            write_text(Path(config.out).expanduser(), answer_lines(rows))
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(config.out or Path(folder, "answers.jsonl")).expanduser()
            with _stored(replace(config, out=str(path))) as words:
                _ended(run_ranks("generate", words, size, device), "generate")
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [Generated(row["prompt"], row["text"], row["tokens"], row.get("exit_layers")) for row in rows]


def _ready(config: C) -> C:
    config = checked(config)
    prepare_libraries(config)
    return config


def _train(verb: str, config: TrainingConfig) -> TrainedRun:
    config = _ready(config)
    from ee_scale.launching.job import run_job
    from ee_scale.launching.multirun import last_losses
    from ee_scale.training.recipe import recipe_of

    with _left_grid(), kept_environment(), _stored(config) as words:
        _ended(run_job(recipe_of(verb).of(config), words), f"out={config.out}")
    losses = last_losses(folder := Path(config.out).expanduser())
    return TrainedRun(folder, losses.pop("step", 0), losses)


@contextmanager
def _left_grid() -> Iterator[None]:
    """Behind the block no grid is joined any more: another call may want another one."""
    from ee_scale.grid import abandon_grid, leave_grid

    try:
        yield
    except BaseException:
        abandon_grid()
        raise
    leave_grid()


@contextmanager
def _stored(config: object) -> Iterator[list[str]]:
    """The words that give a config to the ranks of its command."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(to_yaml(config), encoding="utf-8")
        yield ["--config", str(path)]


def _ended(code: int, what: str) -> None:
    """Raises what an exit code of ranks means; they have said why."""
    if code == REQUEUE:
        raise Requeue(f"{what}: stopped by a signal; the same call goes on")
    if code:
        raise RunError(f"{what}: the ranks ended with code {code}; their own words are above")
