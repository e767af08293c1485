"""Loss, perplexity and agreement per exit; with `sweep`, quality against speed; per group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ee_scale.backbone.exit_layers import resolve_exit_layers
from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.config.schema import CalibrateConfig, EvaluateConfig, ProbeConfig
from ee_scale.data.dataset import check_tokens
from ee_scale.data.encode import without_row
from ee_scale.data.inputs import load_tokenizer, sources
from ee_scale.data.text import prepare_text
from ee_scale.errors import UserError
from ee_scale.evaluation.per_exit import ExitQuality, exit_qualities
from ee_scale.evaluation.quality_report import write_report
from ee_scale.evaluation.records import Records, Window, batched, collect
from ee_scale.evaluation.sweep import SweepPoint, calibrated_point, sweep, time_points
from ee_scale.evaluation.tags import stream_windows, tagged_windows
from ee_scale.exits.placement import exit_spec
from ee_scale.grid import pick_device
from ee_scale.inference.model import open_model, untrained_exits
from ee_scale.modeling.calibration import CALIBRATION_KEY
from ee_scale.modeling.kinds import KINDS
from ee_scale.progress import tracked


@dataclass(frozen=True)
class Evaluation:
    """What a model's exits are worth on a text.

    Attributes:
        exits: in order of depth, the final layer last; tokens: that they were measured on.
        tags: the same per group, (exits, tokens), where the data names groups.
        points: of the sweep, or what the stored limits do; empty without either.
    """

    exits: list[ExitQuality]
    tokens: int
    tags: dict[str, tuple[list[ExitQuality], int]] = field(default_factory=dict)
    points: list[SweepPoint] = field(default_factory=list)


def run_evaluation(config: EvaluateConfig) -> Evaluation:
    """Measure; with `out`, write JSON, CSV and plots too. Raises `UserError`."""
    model = open_for_measuring(config)
    if config.sweep and not hasattr(model, "exit_spec"):
        raise UserError(f"sweep=true: {config.model} has no exits; export a tuned run, or try copies with exits=[..]")
    if config.sweep and config.prompts:
        _check_context(config, model)
    folder = Path(model.config.name_or_path)
    windows = read_windows(config, model, load_tokenizer(folder, "model"), folder)
    prompts = _prompts(config, windows) if config.sweep and config.prompts else None
    calibration = getattr(model.generation_config, CALIBRATION_KEY, None)
    policies = {config.policy} if config.sweep else set()
    policies |= {calibration["policy"]} if calibration else set()
    records = collect(model, tracked(batched(windows, config.batch_size), "measuring"), sorted(policies))
    rows, tokens = exit_qualities(records), len(records.units)
    tags = {tag: (exit_qualities(own), len(own.units)) for tag, own in records.by_tag().items()}
    found = Evaluation(rows, tokens, tags, _points(config, model, records, calibration, prompts))
    if config.out:
        facts = {"model": str(config.model), "data": sources(config.data), "tokens": tokens}
        if tags:
            facts["tags"] = {t: {"tokens": n, "exits": [row.to_json() for row in own]} for t, (own, n) in tags.items()}
        write_report(Path(config.out).expanduser(), rows, facts, found.points)
    return found


def open_for_measuring(config: EvaluateConfig) -> Any:
    """The model of an evaluate config, on its device. Raises `UserError`."""
    folder, device = ModelFolder.named(config.model), pick_device(config.device)
    if config.exits is None:
        return open_model(folder.path).to(device).eval()
    model_config = folder.decoder_config
    if folder.exits is not None:
        raise UserError(f"exits={config.exits}: {folder.path} has exits already; leave exits out")
    layers = resolve_exit_layers(config.exits, model_config.num_hidden_layers)
    head = "tied" if KINDS[config.kind].trains else "full"
    return untrained_exits(folder.path, exit_spec(model_config, layers, config.kind, head, 1)).to(device)


def measure(
    config: EvaluateConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokenizer_dir: Path
) -> tuple[list[ExitQuality], int]:
    """Tokenise the data of an evaluate config and run the model over it: exits, and tokens. Raises `UserError`."""
    windows = read_windows(config, model, tokenizer, tokenizer_dir)
    records = collect(model, tracked(batched(windows, config.batch_size), "measuring"), ())
    return exit_qualities(records), len(records.units)


def read_windows(
    config: EvaluateConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokenizer_dir: Path
) -> list[Window]:
    """The windows of an evaluate config: with tags, whole documents; else the text as one stream."""
    check_length(config, model)
    if config.tag_key is not None:
        return read_tagged(config, model, tokenizer)
    prefixes = read_prefixes(config, model, tokenizer, tokenizer_dir)
    return stream_windows(prefixes, config.seq_length, config.max_tokens)


def check_length(config: EvaluateConfig | CalibrateConfig, model: PreTrainedModel) -> None:
    """Refuse windows that are longer than the model's context. Raises `UserError`."""
    if config.seq_length > model.config.max_position_embeddings:
        raise UserError(
            f"seq_length={config.seq_length} is above the model's max_position_embeddings="
            f"{model.config.max_position_embeddings}"
        )


def read_prefixes(
    config: EvaluateConfig | CalibrateConfig | ProbeConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_dir: Path,
) -> list[str]:
    """The data of a config as Megatron prefixes whose ids the model knows. Raises `UserError`."""
    names = sources(config.data)
    given = (tokenizer, tokenizer_dir, config.cache_dir, config.text_key, True)
    prefixes = prepare_text(names, *given, fields="", errors=config.errors)
    check_tokens(prefixes, model.config.vocab_size, 1, names=names, fields="", tokenizer=tokenizer)
    return prefixes


def read_tagged(
    config: EvaluateConfig | CalibrateConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    unit: str = "window",
) -> list[Window]:
    """The tagged documents of a config as windows whose ids the model knows. Raises `UserError`."""
    keys = (config.text_key, config.tag_key, config.seq_length, config.max_tokens, unit)
    windows = tagged_windows(sources(config.data), tokenizer, *keys, errors=config.errors)
    largest = max(int(window.tokens.max()) for window in windows)
    if largest >= model.config.vocab_size:
        raise UserError(f"data: {without_row(tokenizer, largest, model.config.vocab_size)}")
    return windows


def _points(
    config: EvaluateConfig,
    model: PreTrainedModel,
    records: Records,
    calibration: Mapping[str, Any] | None,
    prompts: list[Window] | None,
) -> list[SweepPoint]:
    """The sweep, timed if there are prompts; without a sweep, what the stored limits do (if there are any)."""
    if not config.sweep:
        return [calibrated_point(records, calibration)] if calibration and records.layers else []
    points = sweep(records, config.policy, calibration)
    if prompts is not None:
        ids = torch.stack([window.tokens[: config.prompt_tokens] for window in prompts]).to(model.device)
        tags = [window.tag for window in prompts] if records.tag_names else None
        track = partial(tracked, text="timing")
        time_points(points, model.generate, ids, config.new_tokens, config.rounds, tags=tags, track=track)
    return points


def _prompts(config: EvaluateConfig, windows: Sequence[Window]) -> list[Window]:
    """Windows, spread over the text, whose first tokens are prompts. Raises `UserError`."""
    long = [window for window in windows if len(window.tokens) >= config.prompt_tokens]
    if len(long) < config.prompts:
        raise UserError(
            f"prompts={config.prompts}: {len(long)} windows of the data have prompt_tokens={config.prompt_tokens} "
            "tokens; give more text or shorter prompts"
        )
    return [long[i * len(long) // config.prompts] for i in range(config.prompts)]


def _check_context(config: EvaluateConfig, model: PreTrainedModel) -> None:
    """Refuse prompts whose continuation does not fit the model. Raises `UserError`."""
    total, room = config.prompt_tokens + config.new_tokens, model.config.max_position_embeddings
    if total > room:
        given = f"prompt_tokens={config.prompt_tokens} + new_tokens={config.new_tokens}"
        raise UserError(f"{given} is above the model's max_position_embeddings={room}")
