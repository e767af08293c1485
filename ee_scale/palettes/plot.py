"""The plot of a palette: quality against parameters and against latency, with every member named beside its point."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import cos, pi, sin
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from ee_scale.palettes.manifest import Manifest

PERCENT = ("accuracy", "f1")  # metrics that are shown in %
LATENCY_LABELS = {"prefill_ms": "ms per forward pass", "token_ms": "ms per token"}
LOGARITHMIC = 3.0  # ratio of the largest to the smallest value from which an axis is logarithmic
RADII = (9, 13, 18, 26, 36, 50)  # pixels (at DPI) from a marker to its label, nearest first
DIRECTIONS = 16
MARKER = 7  # pixels around a point that labels keep free
DPI = 130
# What a label had better not cover, in the order of how bad that is.
OUTSIDE, COVERED, ON_LINE, ON_DOT = 1000.0, 100.0, 3.0, 1.0


@dataclass(frozen=True)
class Panel:
    """One cost, as the x axis: of the full model and the members, of what the search tried (estimates), its limit."""

    title: str
    label: str
    costs: list[float]
    tried: list[float | None]
    limit: float | None


@dataclass(frozen=True)
class Heights:
    """The y axis, in the order of a panel's costs; in % where the metric is a share."""

    label: str
    higher_is_better: bool
    values: list[float]
    tried: list[float | None]


def plot_palette(path: Path, manifest: Manifest) -> None:
    """Write a PNG: the full model as a star, the members as points (a line through those that none beats), what the
    search tried as light dots.

    The frame holds the members and the full model; worse subnets that were tried lie below it.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained", dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    heights, panels = _heights(manifest), _panels(manifest)
    for axis, panel in zip(axes, panels, strict=True):
        _draw(axis, panel, heights)
    axes[0].set(ylabel=heights.label, ylim=_frame(heights.values, 0.15))
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize="small")
    figure.draw_without_rendering()  # places in pixels are known from here on
    figure.set_layout_engine("none")
    names = [member.folder for member in manifest.members]
    for axis, panel in zip(axes, panels, strict=True):
        _name_points(canvas, axis, names, panel, heights)
    figure.savefig(path)


def _panels(manifest: Manifest) -> list[Panel]:
    everyone = [manifest.full, *manifest.members]
    return [
        Panel(
            "Quality against size",
            "parameters",
            [member.params for member in everyone],
            [entry.estimates.get("params") for entry in manifest.tried],
            manifest.limits.get("params"),
        ),
        Panel(
            "Quality against latency",
            LATENCY_LABELS[manifest.latency],
            [manifest.latency_of(member) for member in everyone],
            [entry.estimates.get("latency_ms") for entry in manifest.tried],
            manifest.limits.get("latency_ms"),
        ),
    ]


def _heights(manifest: Manifest) -> Heights:
    scale = 100 if manifest.metric in PERCENT else 1
    better = "higher" if manifest.higher_is_better else "lower"
    tried = [entry.quality.get(manifest.metric) for entry in manifest.tried]
    return Heights(
        f"{manifest.metric} ({'%, ' if scale == 100 else ''}{better} is better)",
        manifest.higher_is_better,
        [scale * manifest.quality_of(member) for member in (manifest.full, *manifest.members)],
        [None if value is None else scale * value for value in tried],
    )


def _draw(axis: Axes, panel: Panel, heights: Heights) -> None:
    known = [spot for spot in zip(panel.tried, heights.tried, strict=True) if None not in spot]
    if known:
        axis.plot(*zip(*known, strict=True), ".", color="0.8", markersize=5, zorder=1, label="tried (estimated cost)")
    axis.axhline(heights.values[0], color="grey", linewidth=0.8, zorder=1)
    axis.plot(*zip(*_front(panel, heights), strict=True), "-", color="C0", linewidth=1.2, zorder=3)
    axis.plot(panel.costs[1:], heights.values[1:], "o", color="C0", markersize=6, zorder=3, label="palette")
    axis.plot(
        panel.costs[0], heights.values[0], "*", color="C1", markersize=14, zorder=4, mec="black", label="full model"
    )
    _scale(axis, panel)
    if panel.limit and axis.get_xlim()[0] < panel.limit < axis.get_xlim()[1]:
        axis.axvline(panel.limit, color="tab:red", linestyle="--", linewidth=1, zorder=2, label="limit")
    axis.set(xlabel=panel.label, title=panel.title)
    axis.grid(alpha=0.3)


def _front(panel: Panel, heights: Heights) -> list[tuple[float, float]]:
    """The members that none other beats at this panel's cost, cheapest first."""
    sign = -1 if heights.higher_is_better else 1
    front: list[tuple[float, float]] = []
    for cost, height in sorted(
        zip(panel.costs[1:], heights.values[1:], strict=True), key=lambda p: (p[0], sign * p[1])
    ):
        if not front or sign * height < sign * front[-1][1]:
            front.append((cost, height))
    return front


def _scale(axis: Axes, panel: Panel) -> None:
    """Frame and ticks of the x axis; a limit that is near counts."""
    costs = panel.costs + [panel.limit] * bool(panel.limit and panel.limit < 1.3 * max(panel.costs))
    if max(costs) < LOGARITHMIC * min(costs):
        axis.set_xlim(_frame(costs, 0.12))
    else:
        axis.set_xscale("log")
        low, high = _frame(np.log(costs), 0.12)
        axis.set_xlim(np.exp(low), np.exp(high))
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if high - low < 4 else (1,)))
        axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _frame(values: Sequence[float], room: float) -> tuple[float, float]:
    """From the least to the largest value, with a share of their distance as room on both sides."""
    low, high = min(values), max(values)
    edge = room * (high - low) or 0.05 * abs(high) or 1.0
    return low - edge, high + edge


def _name_points(
    canvas: FigureCanvasAgg, axis: Axes, names: Sequence[str], panel: Panel, heights: Heights
) -> list[Bbox]:
    """Write each name where it covers least: beside its point, or farther away with a line to it.

    Returns the places in pixels.
    """
    points, lines, dots = _drawn(axis, panel, heights)
    taken = [Bbox.from_extents(x - MARKER, y - MARKER, x + MARKER, y + MARKER) for x, y in points]
    placed = []
    for name, point in zip(names, points[1:], strict=True):
        size = _size(canvas, axis, name)
        best = min(_places(point, size), key=lambda place: _badness(place, point, axis.bbox, taken, lines, dots))
        taken.append(best.padded(2))
        placed.append(best)
        middle = ((best.x0 + best.x1) / 2, (best.y0 + best.y1) / 2)
        axis.annotate(
            name,
            point,
            middle,
            xycoords="figure pixels",
            textcoords="figure pixels",
            ha="center",
            va="center",
            fontsize="small",
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.7, "shrinkB": 4}
            if _distance(best, point) > RADII[2]
            else None,
            zorder=5,
        )
    return placed


def _drawn(axis: Axes, panel: Panel, heights: Heights) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a label could cover, in pixels [N, 2]: points (the full model's first), places on lines, light dots."""
    points = axis.transData.transform(list(zip(panel.costs, heights.values, strict=True)))
    known = [spot for spot in zip(panel.tried, heights.tried, strict=True) if None not in spot]
    dots = axis.transData.transform(known) if known else np.empty((0, 2))
    frame, full = axis.bbox, points[0][1]
    lines = [_along(axis.transData.transform(_front(panel, heights)))]
    lines.append(_along(np.array([[frame.x0, full], [frame.x1, full]])))
    if panel.limit:
        x = axis.transData.transform((panel.limit, heights.values[0]))[0]
        lines.append(_along(np.array([[x, frame.y0], [x, frame.y1]])))
    return points, np.concatenate(lines), dots


def _size(canvas: FigureCanvasAgg, axis: Axes, name: str) -> tuple[float, float]:
    text = axis.text(0, 0, name, fontsize="small")
    box = text.get_window_extent(canvas.get_renderer())
    text.remove()
    return box.width, box.height


def _places(point: np.ndarray, size: tuple[float, float]) -> list[Bbox]:
    """Boxes of a label around a point: for each radius and direction the one that touches that place from outside."""
    width, height = size
    boxes = []
    for radius in RADII:
        for index in range(DIRECTIONS):
            across, up = cos(2 * pi * index / DIRECTIONS), sin(2 * pi * index / DIRECTIONS)
            x = point[0] + radius * across + width / 2 * (round(across, 6) > 0) - width / 2 * (round(across, 6) < 0)
            y = point[1] + radius * up + height / 2 * up
            boxes.append(Bbox.from_bounds(x - width / 2, y - height / 2, width, height))
    return boxes


def _badness(
    box: Bbox, point: np.ndarray, frame: Bbox, taken: Sequence[Bbox], lines: np.ndarray, dots: np.ndarray
) -> float:
    inside = frame.x0 + 2 <= box.x0 and box.x1 <= frame.x1 - 2 and frame.y0 + 2 <= box.y0 and box.y1 <= frame.y1 - 2
    return (
        OUTSIDE * (not inside)
        + COVERED * box.count_overlaps(taken)
        + ON_LINE * box.count_contains(lines)
        + ON_DOT * box.count_contains(dots)
        + 0.1 * _distance(box, point)
    )


def _distance(box: Bbox, point: np.ndarray) -> float:
    """Pixels from a point to the nearest place of a box."""
    return float(np.hypot(max(box.x0 - point[0], 0, point[0] - box.x1), max(box.y0 - point[1], 0, point[1] - box.y1)))


def _along(points: np.ndarray) -> np.ndarray:
    """Places every few pixels along a line through points [N, 2]."""
    parts = [np.linspace(a, b, max(2, int(np.hypot(*(b - a)) / 4))) for a, b in pairwise(points)]
    return np.concatenate([points, *parts])


def _short(value: float) -> str:
    """'300k', '5M', '2.5'."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
