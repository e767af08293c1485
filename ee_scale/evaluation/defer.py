"""Ask a small and a large model the same things, and find when the small one's answer may stand."""

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np

from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.config.defer import AGREEMENT, DeferConfig
from ee_scale.errors import UserError
from ee_scale.evaluation.answering import Answered, Case, answer, qualities, read_cases
from ee_scale.evaluation.deferral import Deferral, Group, Pairs, Point, check_size, find_groups, limit_path
from ee_scale.evaluation.deferral_report import plot_deferral
from ee_scale.evaluation.reliability import ErrorMap
from ee_scale.files import file_digest, new_folder
from ee_scale.inference.deferral import VERSION, DeferralRule, fingerprint_of

RULE_FILE, PLOT_FILE = "deferral.json", "deferral.png"


def run_deferral(config: DeferConfig) -> Deferral:
    """Write the folder `out`. Raises `UserError`."""
    small = _checked(config)
    cases = read_cases(config)
    check_size(len(cases), config.loss, config.confidence)
    with new_folder(Path(config.out).expanduser()) as folder:
        deferral = _asked(config, small, cases)
        deferral.rule.write(folder / RULE_FILE)
        plot_deferral(folder / PLOT_FILE, deferral)
    return deferral


def _asked(config: DeferConfig, small: ModelFolder, cases: Sequence[Case]) -> Deferral:
    """What both models answer, and what follows from it."""
    first = answer(config, "small", cases, scored=True)
    large = Answered([case.large for case in cases]) if config.large is None else answer(config, "large", cases)
    own, other = (qualities(config.quality, cases, found.texts, large.texts) for found in (first, large))
    pairs = Pairs(np.array(first.scores), own, other, [case.tag for case in cases])
    error_map, found, by_tag, checked = find_groups(pairs, config.loss, config.confidence, config.seed)
    return Deferral(
        _rule(config, small, error_map, found, by_tag, first.dtype),
        error_map,
        len(cases),
        found,
        by_tag,
        [Point.of(checked, limit) for limit in (None, *limit_path(pairs.parts(config.seed)[0].scores))],
        checked,
        first.ms if config.small_ms is None else config.small_ms,
        large.ms if config.large_ms is None else config.large_ms,
        config.link.ms,
        config.link.cost,
    )


def _checked(config: DeferConfig) -> ModelFolder:
    """The small model, if all settings fit it and one another. Raises `UserError`."""
    if Path(config.out).expanduser().exists():
        raise UserError(f"out={config.out}: exists already; choose another folder")
    if (config.large is None) == (config.large_key is None):
        raise UserError(f"large={config.large} and large_key={config.large_key}: give exactly one of them")
    if config.task == "generate" and config.pair_key is not None:
        raise UserError(f"pair_key={config.pair_key}: goes with task=classify")
    if config.task == "classify" and config.chat:
        raise UserError("chat=true: goes with task=generate")
    small = ModelFolder.named(config.small, "small")
    if config.large is not None:
        ModelFolder.named(config.large, "large")
    if config.score == AGREEMENT and (config.task == "classify" or small.exits is None):
        raise UserError(f"score={AGREEMENT}: small={config.small} has no exits; choose another score")
    return small


def _rule(
    config: DeferConfig, small: ModelFolder, error_map: ErrorMap, found: Group, by_tag: dict[str, Group], dtype: str
) -> DeferralRule:
    check, verdict = found.check, found.verdict
    assert verdict is not None  # of all records there are enough
    return DeferralRule(
        version=VERSION,
        task=config.task,
        score=config.score,
        limit=found.limit,
        tags={tag: group.limit for tag, group in by_tag.items() if group.own},
        map_scores=error_map.scores.tolist(),
        map_errors=error_map.errors.tolist(),
        small=fingerprint_of(small, config.score),
        quality=config.quality,
        loss=config.loss,
        confidence=config.confidence,
        evidence={
            "tested": found.tested,
            "tested_loss": verdict.risk,
            "p_value": verdict.p_value,
            **{name: value for name, value in asdict(check).items() if isinstance(value, int | float)},
            "small_quality": found.small,
            "large_quality": found.large,
            "auroc": found.auroc,
            "dtype": dtype,
            "data_sha256": file_digest(Path(config.data).expanduser()),
            "ee_scale": version("ee-scale"),
        },
    )
