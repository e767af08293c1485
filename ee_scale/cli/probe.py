"""`ee-scale probe`: is early exit worth it for this model on this machine, before or after training."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ee_scale.backbone.exit_layers import resolve_exit_layers
from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.backbone.proof import check_decoding_proof
from ee_scale.cli.console import console
from ee_scale.config.schema import ProbeConfig
from ee_scale.data.inputs import load_tokenizer, sources
from ee_scale.data.loader import windows
from ee_scale.errors import UserError
from ee_scale.evaluation.evaluate import read_prefixes
from ee_scale.evaluation.probe import Passage, Reading, given_text, own_text, read_exits, repeated_share
from ee_scale.evaluation.probe_report import cost_lines, outlook, outlook_table, verdict, write_probe
from ee_scale.evaluation.timing import measure_parts
from ee_scale.exits.placement import exit_spec
from ee_scale.grid import pick_device
from ee_scale.inference.model import open_model, untrained_exits
from ee_scale.log import configure_logging
from ee_scale.modeling.kinds import KINDS
from ee_scale.planning.out_of_memory import reading_advice, told_when_full
from ee_scale.progress import stages

MOST_EXITS = 11
ROWS = 4  # that are read at once


def run(config: ProbeConfig, overrides: Sequence[str]) -> int:
    """Read text, let the model write, time the parts; print the table and the verdict, write files with `out`."""
    configure_logging()
    with told_when_full(lambda: reading_advice(config)):
        return _run(config)


def _run(config: ProbeConfig) -> int:
    model, untrained = _open(config)
    folder = Path(model.config.name_or_path)
    tokenizer = load_tokenizer(folder, "model")
    batches = _text(config, model, tokenizer, folder)
    with stages() as show:
        readings, repeated = _read(config, model, tokenizer, batches, show)
        parts = measure_parts(model, config.context, config.seconds, advance=partial(show, "timing the parts"))
    rows = outlook(parts, readings)
    sentences = verdict(rows, parts, untrained, repeated, config.agreement)
    out = console()
    kind = "untrained exits" if untrained else "its exits"
    out.print(outlook_table(rows, f"{config.model}, {kind}, {parts.costs.num_layers} layers, batch 1"))
    for line in [*cost_lines(parts), "", *sentences]:
        out.print(line, highlight=False)
    if config.out:
        facts = {
            "model": str(config.model),
            "data": sources(config.data),
            "untrained": untrained,
            "temperature": config.temperature,
            "agreement_wanted": config.agreement,
            "repeated_share": repeated,
            "threads": torch.get_num_threads(),
            "verdict": sentences,
        }
        write_probe(Path(config.out).expanduser(), rows, parts, facts)
    return 0


def _open(config: ProbeConfig) -> tuple[Any, bool]:
    """The model with its exits, or with untrained ones. Raises `UserError`, before weights are read where it can."""
    folder = ModelFolder.named(config.model)
    path, model_config = folder.path, folder.decoder_config
    check_decoding_proof(model_config)
    _check_lengths(config, model_config)
    device = pick_device(config.device)
    if folder.exits is not None:
        if config.layers is not None:
            raise UserError(f"layers={config.layers}: {path} has exits already; leave layers out")
        return open_model(path).to(device).eval(), False
    count = model_config.num_hidden_layers
    if count < 2:
        raise UserError(f"model={config.model}: {count} layer leaves no room for an exit")
    spread = sorted({max(1, round(count * i / (MOST_EXITS + 1))) for i in range(1, MOST_EXITS + 1)} - {count})
    layers = spread if config.layers is None else resolve_exit_layers(config.layers, count)
    if layers[-1] == count:
        raise UserError(f"layers={config.layers}: {count} is the final layer; exits lie before it")
    head = "low_rank" if KINDS[config.kind].body else "tied"
    return untrained_exits(path, exit_spec(model_config, layers, config.kind, head, 64)).to(device), True


def _check_lengths(config: ProbeConfig, model_config: PreTrainedConfig) -> None:
    most = model_config.max_position_embeddings
    for name, length in (
        ("context", config.context + 16),
        ("prompt_tokens + new_tokens", config.prompt_tokens + config.new_tokens),
    ):
        if length > most:
            raise UserError(f"{name}: {length} positions are needed, the model has max_position_embeddings={most}")


def _text(
    config: ProbeConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Windows of the data as `data.loader.windows` has them; each is longer than a prompt. Raises `UserError`."""
    prefixes = read_prefixes(config, model, tokenizer, folder)
    length = min(config.prompt_tokens + config.new_tokens, model.config.max_position_embeddings)
    found = list(windows(prefixes, length, ROWS, max(config.max_tokens, length * config.prompts)))
    if (length := found[0][0].shape[1]) <= config.prompt_tokens:
        raise UserError(f"prompt_tokens={config.prompt_tokens}: the data has only {length} tokens")
    return found


def _read(
    config: ProbeConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: list[tuple[torch.Tensor, torch.Tensor]],
    show: Callable[[str, float], None],
) -> tuple[dict[str, list[Reading]], float]:
    """Readings on the text, on greedy and on sampled text; how much of the greedy text repeats itself."""
    read = partial(read_exits, model, temperature=config.temperature, bound=config.agreement)
    readings = {"text": read(_passing(given_text(batches), len(batches), partial(show, "reading text")))}
    prompts = torch.cat([tokens for tokens, _ in batches])[: config.prompts, : config.prompt_tokens]
    repeated = 0.0
    for name, temperature in (("greedy", None), ("sampled", config.temperature)):
        writes = partial(show, f"the model writes ({name})")
        passage = own_text(model, prompts, config.new_tokens, temperature, config.seed, tokenizer, writes)
        parts = [Passage(*part) for part in zip(passage.ids.split(ROWS), passage.kept.split(ROWS), strict=True)]
        readings[name] = read(_passing(parts, len(parts), partial(show, f"reading what it wrote ({name})")))
        if temperature is None:
            repeated = repeated_share(passage)
    return readings, repeated


def _passing(items: Iterable[Passage], total: int, advance: Callable[[float], None]) -> Iterator[Passage]:
    for index, item in enumerate(items):
        advance(index / total)
        yield item
