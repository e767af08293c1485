"""The picture of bench_palette.py."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from _palette_report import POLISHED, SEPARATE, SUPERNET, Judged, Report, Spread

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

COLOURS = {
    SUPERNET: "#1b6ca8",
    POLISHED: "#8a4fa3",
    SEPARATE: "#2a9d54",
    "sliced": "#b0b0b0",
    "whole weights": "#d98324",
}
APART = 0.006  # of the span of sizes, between two ways: bars at one size would hide each other


def plot(path: Path, reports: Sequence[Report]) -> None:
    """Quality against parameters with 95% intervals, a panel per case and file of texts."""
    panels = [(report, judged) for report in reports for judged in report.judged]
    figure, axes = plt.subplots(1, len(panels), figsize=(6.0 * len(panels), 4.4), squeeze=False, layout="constrained")
    for axis, (report, judged) in zip(axes[0], panels, strict=True):
        _panel(axis, report, judged)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(axis: Axes, report: Report, judged: Judged) -> None:
    scale = 100 if report.percent else 1
    order = sorted(range(len(report.sizes)), key=lambda i: report.params[i])
    full = report.full_params / 1e6
    shown = [way for way in report.ways if way.name.split(",")[0] in COLOURS]
    for index, way in enumerate(shown):
        shift = (index - (len(shown) - 1) / 2) * APART * full
        label = f"{way.name} ({way.seconds:.0f} s of training)" if way.seconds else way.name
        style = {
            "color": COLOURS[way.name.split(",")[0]],
            "label": label,
            "markersize": 4,
            "capsize": 2,
            "linewidth": 1,
        }
        spreads = [judged.quality[way.name][i] for i in order]
        _bars(axis, [report.params[i] / 1e6 + shift for i in order], spreads, scale, "o-", **style)
    _bars(axis, [full], [judged.teacher], scale, "*", color="black", label="teacher", markersize=10, capsize=2)
    axis.set(xlabel="parameters, millions", ylabel="accuracy, %" if report.percent else "loss, nats (lower is better)")
    axis.set_title(f"{report.case}, {judged.name}: {judged.texts:,} texts, 95% intervals", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)
    axis.legend(fontsize=7, frameon=False)


def _bars(axis: Axes, xs: list[float], spreads: list[Spread], scale: float, form: str, **style: str | float) -> None:
    below = [scale * max(0.0, spread.mean - spread.low) for spread in spreads]
    above = [scale * max(0.0, spread.high - spread.mean) for spread in spreads]
    axis.errorbar(xs, [scale * spread.mean for spread in spreads], [below, above], fmt=form, elinewidth=1, **style)
