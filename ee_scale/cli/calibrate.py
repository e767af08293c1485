"""`ee-scale calibrate`: limits for leaving early that hold a bound with a known confidence, stored with the model."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ee_scale.artifact.hf_folder import write_calibration
from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.cli.console import console, with_progress
from ee_scale.cli.evaluate import check_length, read_prefixes, read_tagged
from ee_scale.config.schema import CalibrateConfig
from ee_scale.data.inputs import load_tokenizer, sources
from ee_scale.errors import UserError
from ee_scale.evaluation.calibration import LOSS_CAP, Calibrated, Goal, calibrate, shortlist
from ee_scale.evaluation.records import Records, Window, batched, collect
from ee_scale.evaluation.report import calibration_table, tag_calibration_table
from ee_scale.evaluation.tags import document_windows
from ee_scale.files import write_text
from ee_scale.grid import pick_device
from ee_scale.inference.model import open_model
from ee_scale.log import configure_logging


def run(config: CalibrateConfig, overrides: Sequence[str]) -> int:
    """Find the limits, store them in the model's folder, print what they do and what is guaranteed."""
    configure_logging()
    goal = goal_of(config)
    path = ModelFolder.named(config.model).path
    model = open_model(path).to(pick_device(config.device)).eval()
    if not hasattr(model, "exit_spec"):
        raise UserError(f"model={config.model}: it has no exits; tune some and export them first")
    windows = _windows(config, model)
    goal.check_size(np.bincount([window.unit for window in windows], [len(window.tokens) - 1 for window in windows]))
    records = collect(model, with_progress(batched(windows, config.batch_size), "measuring"), (goal.policy,))
    found, (by_tag, small) = calibrate(records, goal, config.seed), _by_tag(records, goal, config.seed)
    values = {
        **_stored(found, goal, records),
        "tags": {tag: _stored(own, goal, records) for tag, own in by_tag.items()},
        "tags_without_limits": small,
        "unit": config.unit,
        "seq_length": config.seq_length,
        "num_layers": records.num_layers,
        "data": sources(config.data),
        "data_sha256": _digest(windows),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "ee_scale": version("ee-scale"),
        "shortlist": shortlist(records),
    }
    write_calibration(path, values)
    if config.out:
        out = Path(config.out).expanduser()
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "calibrate.json", json.dumps(values, indent=1) + "\n")
    _show(config, goal, records, found, by_tag, small)
    return 0


def goal_of(config: CalibrateConfig) -> Goal:
    """What a calibrate config asks for. Raises `UserError`."""
    agreement = 0.98 if config.agreement is None and config.loss_increase is None else config.agreement
    unit_tokens = config.seq_length if config.unit == "window" else 0
    return Goal(config.policy, agreement, config.loss_increase, config.confidence, unit_tokens)


def _windows(config: CalibrateConfig, model: PreTrainedModel) -> list[Window]:
    """Windows of the data that do not cross documents, in random order. Raises `UserError`."""
    check_length(config, model)
    folder = Path(model.config.name_or_path)
    tokenizer = load_tokenizer(folder, "model")
    if config.tag_key is not None:
        return read_tagged(config, model, tokenizer, config.unit)
    prefixes = read_prefixes(config, model, tokenizer, folder)
    eos_id = -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    return document_windows(prefixes, eos_id, config.seq_length, config.max_tokens, config.unit)


def _by_tag(records: Records, goal: Goal, seed: int) -> tuple[dict[str, Calibrated], dict[str, int]]:
    """Limits per tag, each from its own units; and the tags with too few units for that, with their number."""
    found, small = {}, {}
    for tag, own in records.by_tag().items():
        try:
            goal.check_size(np.bincount(own.units))
        except UserError:
            small[tag] = len(own.tags)
            continue
        found[tag] = calibrate(own, goal, seed)
    return found, small


def _stored(found: Calibrated, goal: Goal, records: Records) -> dict[str, Any]:
    """Limits and their evidence, as JSON."""
    facts = asdict(found)
    limits, shares, agreements = (facts.pop(key) for key in ("limits", "shares", "agreements"))
    layers = [str(k) for k in records.layers]
    return {
        "policy": goal.policy,
        "thresholds": dict(zip(layers, limits, strict=True)),
        "agreement": goal.agreement,
        "loss_increase_bound": goal.loss_increase,
        "confidence": goal.confidence,
        "certified": found.certified,
        **facts,
        "exits": {
            k: {"share": share, "agreement": own} for k, share, own in zip(layers, shares, agreements, strict=True)
        },
    }


def _digest(windows: Sequence[Window]) -> str:
    """SHA-256 of the token ids that were used, in their order."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(window.tokens.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _show(
    config: CalibrateConfig,
    goal: Goal,
    records: Records,
    found: Calibrated,
    by_tag: dict[str, Calibrated],
    small: dict[str, int],
) -> None:
    out = console()
    title = f"{config.model}, policy {goal.policy}, {found.tokens:,} tokens in {found.units:,} {config.unit}s"
    out.print(calibration_table(records.layers, found, title))
    out.print(_statement(config, goal, records, found), highlight=False)
    if by_tag:
        out.print(tag_calibration_table(records.layers, by_tag, "limits per tag"))
        out.print(
            "Each tag's statement holds at that confidence on its own, not all of them together.", highlight=False
        )
    if small:
        names = ", ".join(f"'{tag}' ({units} {config.unit}s)" for tag, units in small.items())
        out.print(
            f"Too little text of its own, so the limits above are used without a promise: {names}", highlight=False
        )
    console(stderr=True).print(f"wrote {Path(config.model) / 'generation_config.json'}", highlight=False)


def _statement(config: CalibrateConfig, goal: Goal, records: Records, found: Calibrated) -> str:
    """What is guaranteed, and what is not."""
    wanted = (
        f"at least {goal.agreement:.4g} of all tokens are the whole model's own choice"
        if goal.agreement is not None
        else f"the mean loss grows by at most {goal.loss_increase:g} nats per token (one {config.unit} counts as at "
        f"most {LOSS_CAP:g})"
    )
    seen = f"{found.match_rate:.2%} agreement, {found.loss_increase:+.4f} nats"
    tested = f"{found.tested_units:,} {config.unit}s that did not choose the limits"
    if not found.certified:
        return (
            f"Nothing could be promised: no limits were shown to hold '{wanted}' at confidence {goal.confidence:g} "
            f"(the safest ones tried: mean risk {found.risk:.4f} of {goal.bound:.4g} allowed, p = {found.p_value:.3g} "
            f"on {tested}). Every exit is set to never. More text, or a looser bound, may change that."
        )
    average, taken = ", averaged over documents", ""
    if config.unit == "window":
        average, taken = "", " Windows of one document are taken as independent; unit=document does without that."
    return (
        f"Guaranteed with confidence {goal.confidence:g} on text like this: {wanted}{average}, when exit and whole "
        f"model read the same true text (seen on {tested}: {seen}, p = {found.p_value:.3g}; mean depth "
        f"{found.mean_depth:.2f} of {records.num_layers}). Not guaranteed: other kinds of text, and whole generated "
        f"texts, which may go on differently after the first token that differs.{taken}"
    )
