"""Limits for leaving early that hold a bound with a known confidence, found and stored with the model."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ee_scale.artifact.hf_folder import write_calibration
from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.config.schema import CalibrateConfig
from ee_scale.data.inputs import load_tokenizer, sources
from ee_scale.errors import UserError
from ee_scale.evaluation.calibration import Calibrated, Goal, calibrate, shortlist
from ee_scale.evaluation.evaluate import check_length, read_prefixes, read_tagged
from ee_scale.evaluation.records import Records, Window, batched, collect, finite
from ee_scale.evaluation.tags import document_windows
from ee_scale.files import write_text
from ee_scale.grid import pick_device
from ee_scale.inference.model import open_model
from ee_scale.progress import tracked


@dataclass(frozen=True)
class Calibration:
    """What `generation_config.json` of the model got.

    Attributes:
        layers: of the exits, in the order of the limits; num_layers: of the model.
        found: the limits and their evidence; by_tag: own limits of groups.
        without_limits: groups with too little text of their own, with their number of units.
        stored: all of it as it is stored.
    """

    goal: Goal
    layers: tuple[int, ...]
    num_layers: int
    found: Calibrated
    by_tag: dict[str, Calibrated]
    without_limits: dict[str, int]
    stored: dict[str, Any]


def run_calibration(config: CalibrateConfig) -> Calibration:
    """Find the limits and store them in the model's folder. Raises `UserError`."""
    goal = goal_of(config)
    path = ModelFolder.named(config.model).path
    model = open_model(path).to(pick_device(config.device)).eval()
    if not hasattr(model, "exit_spec"):
        raise UserError(f"model={config.model}: it has no exits; tune some and export them first")
    windows = _windows(config, model)
    goal.check_size(np.bincount([window.unit for window in windows], [window.num_predicted for window in windows]))
    records = collect(model, tracked(batched(windows, config.batch_size), "measuring"), (goal.policy,))
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
    return Calibration(goal, tuple(records.layers), records.num_layers, found, by_tag, small, values)


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
        "loss_increase": finite(found.loss_increase),
        "exits": {
            k: {"share": share, "agreement": own} for k, share, own in zip(layers, shares, agreements, strict=True)
        },
    }


def _digest(windows: Sequence[Window]) -> str:
    """SHA-256 of the token ids that were used, in their order, and of what is learned where that is not all."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(window.tokens.numpy().astype("<i8").tobytes())
        if window.num_predicted < len(window.tokens) - 1:
            digest.update(window.learned.numpy().tobytes())
    return digest.hexdigest()
