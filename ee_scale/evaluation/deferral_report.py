"""Tables, sentences and the plot of deferred answering."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from ee_scale.evaluation.deferral import Deferral, Group
from ee_scale.evaluation.reliability import BINS
from ee_scale.log import titled_table

SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # of records that ask the large model: lines of the table
FOUND = "found"


def curve_table(deferral: Deferral) -> Table:
    """Quality, time and price by the share of records that ask the large model; the limit that was found among them."""
    found = deferral.found.check
    nearest = [min(deferral.curve, key=lambda point: abs(point.asked - share)) for share in SHARES]
    rows = sorted({**{point.limit: point for point in nearest}, found.limit: found}.values(), key=lambda p: p.asked)
    columns = ("limit", "asks", "quality", "chance", "loss", "ms", "cost/1k")
    title = (
        f"deferred answering on {len(deferral.checked.scores):,} records that chose nothing "
        "(chance: the same share asks, drawn at random)"
    )
    table = titled_table(title, columns, left=("",))
    for point in rows:
        table.add_row(
            FOUND if point is found else "",
            _limit(point.limit),
            f"{point.asked:.1%}",
            f"{point.quality:.4f}",
            f"{_by_chance(deferral, point.asked):.4f}",
            f"{point.loss:+.4f}",
            f"{deferral.latency(point.asked):,.1f}",
            f"{1000 * point.asked * deferral.cost:,.4g}",
        )
    return table


def group_table(deferral: Deferral) -> Table:
    """Both models, the score and the limit: of all records that check, and per tag."""
    columns = ("small", "large", "AUROC", "ECE", "mapped", "limit", "asks", "loss")
    title = "quality of both models, the score before and after the map, and the limit, on the same records"
    table = titled_table(title, columns, left=("tag",))
    for name, group in {"all": deferral.found, **deferral.by_tag}.items():
        table.add_row(
            name,
            f"{group.small:.3f}",
            f"{group.large:.3f}",
            "-" if group.auroc is None else f"{group.auroc:.3f}",
            f"{group.ece_score:.3f}",
            f"{group.ece:.3f}",
            _limit(group.limit),
            f"{group.check.asked:.1%}",
            f"{group.check.loss:+.4f}",
        )
    return table


def statements(deferral: Deferral) -> list[str]:
    """What is guaranteed, what the check says of it, and what is not guaranteed."""
    rule, found = deferral.rule, deferral.found
    kept = "it is never asked" if found.limit == 0 else f"it is asked for {found.check.asked:.1%}"
    wanted = (
        f"deferred answering loses at most {rule.loss:g} of quality ({rule.quality}) against always asking the large "
        "model"
    )
    verdict = found.verdict
    assert verdict is not None  # of all records there are enough
    seen = f"loss {verdict.risk:+.4f}, p = {verdict.p_value:.2g}, on {found.tested:,} records that chose no limit"
    if found.limit is None:
        lines = [
            f"Nothing could be promised: no limit was shown to hold '{wanted}' with confidence {rule.confidence:g} "
            f"(the safest one: {seen}). The large model is always asked. More records, or a larger loss, may change "
            "that."
        ]
    else:
        lines = [
            f"Guaranteed with confidence {rule.confidence:g} on records like these: {wanted} ({seen}); {kept}. "
            f"Not guaranteed: other kinds of prompts, another large model, another number of new tokens.",
            _check(found, rule.loss, "Check"),
        ]
        expected = float(deferral.error_map(np.array([found.limit]))[0])
        lines.append(f"At the limit {found.limit:.4g} about {expected:.1%} of the small model's answers are wrong.")
    own = {tag: group for tag, group in deferral.by_tag.items() if group.own}
    shown = [(tag, group) for tag, group in own.items() if group.limit is not None]
    lines += [_check(group, rule.loss, f"Check of tag '{tag}'") for tag, group in shown]
    if own:
        lines.append("Each tag's statement holds at that confidence on its own, not all of them together.")
    if few := ", ".join(f"'{tag}' ({group.tested})" for tag, group in deferral.by_tag.items() if not group.own):
        lines.append(f"Too few records of its own to test, so the limit of all is used without a promise: {few}.")
    lines.append(
        f"An answer takes {deferral.small_ms:,.1f} ms; asking the large model {deferral.link_ms:,.1f} ms on the way "
        f"and {deferral.large_ms:,.1f} ms to answer."
    )
    return lines


def _check(group: Group, loss: float, name: str) -> str:
    """Whether the third part agrees."""
    point = group.check
    low, high = point.loss_range or (point.loss, point.loss)
    if point.loss <= loss:
        words = "within the bound" if high <= loss else "within the bound, which so few records cannot confirm"
    else:
        words = "ABOVE THE BOUND beyond chance" if low > loss else "above the bound, as chance may have it"
    return (
        f"{name} on records that chose and tested nothing: loss {point.loss:+.4f} ({low:+.4f} to {high:+.4f}) of "
        f"{loss:g} allowed, {words} (kept answers: {point.worse} worse, {point.better} better than the large model's)."
    )


def plot_deferral(path: Path, deferral: Deferral) -> None:
    """Quality against the share of calls, and chances against what was right."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _plot_curve(left, deferral)
    _plot_reliability(right, deferral)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=130)


def _plot_curve(axis: Axes, deferral: Deferral) -> None:
    found = deferral.found
    asked = [100 * point.asked for point in deferral.curve]
    axis.plot(asked, [point.quality for point in deferral.curve], "o-", markersize=3, label="by score")
    axis.plot([0, 100], [found.small, found.large], "--", color="0.6", label="by chance")
    axis.axhline(found.large - deferral.rule.loss, color="tab:red", linestyle=":", label="allowed")
    axis.plot(100 * found.check.asked, found.check.quality, "*", color="tab:green", markersize=14, label=FOUND)
    axis.set(xlabel="% of records that ask the large model", ylabel=f"quality ({deferral.rule.quality})")
    slope = deferral.latency(1) - deferral.small_ms
    if slope > 0:  # an axis that does not stand still
        axis.secondary_xaxis(
            "top",
            functions=(
                lambda share: deferral.small_ms + slope * np.asarray(share) / 100,
                lambda ms: 100 * (np.asarray(ms) - deferral.small_ms) / slope,
            ),
        ).set_xlabel("ms per answer")


def _plot_reliability(axis: Axes, deferral: Deferral) -> None:
    pairs = deferral.checked
    mapped = 1 - deferral.error_map(pairs.scores)
    axis.plot([0, 1], [0, 1], "--", color="0.6")
    for chances, name in ((pairs.scores, "score"), (mapped, "after the map")):
        bins = np.minimum((chances * BINS).astype(int), BINS - 1)
        counts = np.bincount(bins, minlength=BINS)
        there = counts > 0
        means = [np.bincount(bins, values, BINS)[there] / counts[there] for values in (chances, pairs.small)]
        axis.plot(*means, "o-", markersize=4, label=name)
    axis.set(xlabel="chance that the small model is right", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.02))


def _by_chance(deferral: Deferral, asked: float) -> float:
    """Quality if the records that ask the large model were drawn."""
    return deferral.found.small + asked * (deferral.found.large - deferral.found.small)


def _limit(limit: float | None) -> str:
    return "always" if limit is None else "never" if limit == 0 else f"{limit:.4f}"
