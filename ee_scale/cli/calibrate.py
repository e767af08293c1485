"""`ee-scale calibrate`: limits for leaving early that hold a bound with a known confidence, stored with the model."""

from collections.abc import Sequence
from pathlib import Path

from ee_scale import api
from ee_scale.cli.console import console
from ee_scale.config.schema import CalibrateConfig
from ee_scale.evaluation.calibrate import Calibration
from ee_scale.evaluation.calibration import LOSS_CAP
from ee_scale.evaluation.quality_report import calibration_table, tag_calibration_table
from ee_scale.log import configure_logging


def run(config: CalibrateConfig, overrides: Sequence[str]) -> int:
    """Find the limits, store them in the model's folder, print what they do and what is guaranteed."""
    configure_logging()
    calibration, out = api.calibrate(config), console()
    found = calibration.found
    title = (
        f"{config.model}, policy {calibration.goal.policy}, {found.tokens:,} tokens in {found.units:,} {config.unit}s"
    )
    out.print(calibration_table(calibration.layers, found, title))
    out.print(_statement(config, calibration), highlight=False)
    if calibration.by_tag:
        out.print(tag_calibration_table(calibration.layers, calibration.by_tag, "limits per tag"))
        out.print(
            "Each tag's statement holds at that confidence on its own, not all of them together.", highlight=False
        )
    if calibration.without_limits:
        names = ", ".join(f"'{tag}' ({units} {config.unit}s)" for tag, units in calibration.without_limits.items())
        out.print(
            f"Too little text of its own, so the limits above are used without a promise: {names}", highlight=False
        )
    console(stderr=True).print(f"wrote {Path(config.model) / 'generation_config.json'}", highlight=False)
    return 0


def _statement(config: CalibrateConfig, calibration: Calibration) -> str:
    """What is guaranteed, and what is not."""
    goal, found, layers = calibration.goal, calibration.found, calibration.num_layers
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
        f"{found.mean_depth:.2f} of {layers}). Not guaranteed: other kinds of text, and whole generated "
        f"texts, which may go on differently after the first token that differs.{taken}"
    )
