"""Tables, JSON, CSV and plots of what was measured."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from ee_scale.evaluation.calibration import Calibrated
from ee_scale.evaluation.per_exit import ExitQuality, agreement_gap
from ee_scale.evaluation.sweep import PLAIN, SweepPoint, match_gap
from ee_scale.files import write_text
from ee_scale.log import titled_table


def quality_table(rows: Sequence[ExitQuality], title: str, before: Sequence[ExitQuality] | None = None) -> Table:
    """One line per exit; `before` adds loss and agreement of the untrained exits."""
    some = any(row.covered is not None for row in rows)  # a shortlist: its loss is over the tokens in it
    loss = "loss of scored tokens" if some else "loss"
    losses = ("loss at copy-init", f"{loss} after tuning") if before else (loss,)
    agreements = ("agreement at copy-init", "after tuning") if before else ("agreement with final",)
    columns = ("exit after layer", *losses, "perplexity", *agreements, *["tokens scored"] * some)
    table = titled_table(title, columns)
    for index, row in enumerate(rows):
        first = ("-" if row.final else f"{before[index].loss:.3f}",) if before else ()
        agreed = ("-" if row.final else f"{before[index].agreement:.1%}",) if before else ()
        name = f"{row.layer} (final)" if row.final else str(row.layer)
        covered = [] if row.covered is None else [f"{row.covered:.1%}"]
        figures = (*first, f"{row.loss:.3f}", f"{row.perplexity:,.2f}", *agreed, f"{row.agreement:.1%}", *covered)
        table.add_row(name, *figures)
    return table


def tag_table(by_tag: Mapping[str, Sequence[ExitQuality]], tokens: Mapping[str, int], title: str) -> Table:
    """One line per tag; loss and agreement of each exit side by side."""
    exits = next(iter(by_tag.values()))
    columns = [f"{row.layer} (final)\nloss" if row.final else f"{row.layer}\nloss / agreement" for row in exits]
    table = titled_table(title, ("tokens", *columns), left=("tag",))
    for tag, rows in by_tag.items():
        cells = [f"{row.loss:.3f}" if row.final else f"{row.loss:.3f} / {row.agreement:.1%}" for row in rows]
        table.add_row(tag, f"{tokens[tag]:,}", *cells)
    return table


def agreement_gap_sentence(by_tag: Mapping[str, list[ExitQuality]]) -> str:
    """The exit and the two tags that are furthest apart, or that there is nothing to compare."""
    found = agreement_gap(by_tag)
    if found is None:
        return f"One tag only ({', '.join(by_tag)}): no groups to compare."
    k, gap = found
    return (
        f"Largest gap between groups: the exit after layer {k} says what the whole model says for {gap.high_value:.1%} "
        f"of the tokens of '{gap.high}' and {gap.low_value:.1%} of '{gap.low}' ({100 * gap.size:.1f} points)."
    )


def match_gap_sentence(points: Sequence[SweepPoint]) -> str:
    """The point and the two tags whose match rates are furthest apart ('' without two tags)."""
    found = match_gap(points)
    if found is None:
        return ""
    point, gap = found
    depths = [point.tags[tag]["mean_depth"] for tag in (gap.high, gap.low)]
    return (
        f"Largest gap between groups in use, at {_name(point)}: match rate {gap.high_value:.1%} for '{gap.high}' "
        f"(mean depth {depths[0]:.2f}) and {gap.low_value:.1%} for '{gap.low}' ({depths[1]:.2f}), "
        f"{100 * gap.size:.1f} points."
    )


def sweep_table(points: Sequence[SweepPoint], title: str) -> Table:
    """One line per way to decode; speeds where they were measured."""
    sizes = list(points[-1].speed)
    timed = [text for size in sizes for text in (f"tokens/s\nbatch {size}", f"speed\nbatch {size}")]
    table = titled_table(title, ("match rate", "loss", "mean depth", *timed), left=("exits",))
    for point in points:
        times = [
            text for size in sizes for text in (f"{point.tokens_per_second[size]:,.0f}", f"{point.speed[size]:.2f}x")
        ]
        depth = "-" if point.mean_depth is None else f"{point.mean_depth:.2f}"
        table.add_row(_name(point), f"{point.match_rate:.2%}", f"{point.loss:.4f}", depth, *times)
    return table


def tag_sweep_table(points: Sequence[SweepPoint], title: str) -> Table:
    """Match rate and mean depth of every tag."""
    table = titled_table(title, [f"{tag}\nmatch / depth" for tag in points[0].tags], left=("exits",))
    for point in points:
        if point.mean_depth is not None:
            cells = [f"{figures['match_rate']:.1%} / {figures['mean_depth']:.2f}" for figures in point.tags.values()]
            table.add_row(_name(point), *cells)
    return table


def calibration_table(layers: Sequence[int], found: Calibrated, title: str) -> Table:
    """One line per exit."""
    columns = ("exit after layer", "limit", "tokens leaving here", "of those like the whole model")
    table = titled_table(title, columns)
    for k, limit, share, agreement in zip(layers, found.limits, found.shares, found.agreements, strict=True):
        shown = "never" if limit is None else f"{limit:.6g}"
        table.add_row(str(k), shown, f"{share:.1%}", "-" if agreement is None else f"{agreement:.2%}")
    return table


def tag_calibration_table(layers: Sequence[int], by_tag: Mapping[str, Calibrated], title: str) -> Table:
    """One line per tag with limits of its own."""
    columns = ("units", *(f"limit at {k}" for k in layers), "match rate", "mean depth", "p")
    table = titled_table(title, columns, left=("tag",))
    for tag, found in by_tag.items():
        limits = ["never" if limit is None else f"{limit:.6g}" for limit in found.limits]
        figures = (f"{found.match_rate:.2%}", f"{found.mean_depth:.2f}", f"{found.p_value:.3g}")
        table.add_row(tag, f"{found.units:,}", *limits, *figures)
    return table


def write_report(
    folder: Path, rows: Sequence[ExitQuality], facts: dict[str, object], points: Sequence[SweepPoint] = ()
) -> None:
    """evaluate.json, evaluate.csv and evaluate.png; of a sweep also sweep.csv and sweep.png."""
    folder.mkdir(parents=True, exist_ok=True)
    values = [row.to_json() for row in rows]
    report: dict[str, Any] = {**facts, "exits": values}
    if points:
        report["sweep"] = [point.to_json() for point in points]
        _write_csv(folder / "sweep.csv", [_flat(value) for value in report["sweep"]])
        plot_sweep(folder / "sweep.png", points)
    write_text(folder / "evaluate.json", json.dumps(report, indent=1) + "\n")
    _write_csv(folder / "evaluate.csv", values)
    plot_quality(folder / "evaluate.png", rows)


def plot_quality(path: Path, rows: Sequence[ExitQuality], before: Sequence[ExitQuality] | None = None) -> None:
    """Loss and agreement over the depth of the exit."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for series, label, style in ((before, "copy-init", "o--"), (rows, "after tuning" if before else None, "o-")):
        if series:
            layers = [row.layer for row in series]
            left.plot(layers, [row.loss for row in series], style, label=label)
            right.plot(layers, [100 * row.agreement for row in series], style, label=label)
    left.set(xlabel="exit after layer", ylabel="loss (nats per token)", title="Next-token loss")
    right.set(xlabel="exit after layer", ylabel="%", title="Same token as the final layer", ylim=(0, 102))
    for axis in (left, right):
        axis.set_xticks([row.layer for row in rows])
        axis.grid(alpha=0.3)
        if before:
            axis.legend()
    figure.savefig(path, dpi=130)


def plot_sweep(path: Path, points: Sequence[SweepPoint]) -> None:
    """Match rate over speed, a curve per batch size; over mean depth where nothing was timed."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axis = figure.subplots()
    swept = [point for point in points if point.limit is not None]
    single = [point for point in points if point.limit is None and point.name != PLAIN]
    sizes = list(points[-1].speed)
    for index, size in enumerate(sizes or [0]):
        where = (lambda point, size=size: point.speed[size]) if sizes else (lambda point: point.mean_depth)
        label, colour = (f"batch {size}" if sizes else None), f"C{index}"
        axis.plot(
            [where(point) for point in swept], [100 * p.match_rate for p in swept], "o-", label=label, color=colour
        )
        for point, marker in zip(single, "*D", strict=False):
            if where(point) is not None:
                label = " ".join([point.name, *([f"batch {size}"] if sizes else [])])
                spot = (where(point), 100 * point.match_rate)
                axis.plot(
                    *spot, marker, markersize=11, label=label, color=colour, markeredgecolor="black", linestyle=""
                )
    if sizes:
        axis.axvline(1, color="grey", linewidth=1)
    else:
        axis.invert_xaxis()
    axis.set(
        xlabel="speed (tokens/s, ratio to decoding without exits)" if sizes else "mean depth (layers per token)",
        ylabel="tokens like the whole model's (%)",
        title="Quality against speed" if sizes else "Quality against depth",
    )
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend()
    figure.savefig(path, dpi=130)


def _name(point: SweepPoint) -> str:
    return point.name if point.limit is None else f"{point.name} {point.limit:.3g}"


def _flat(value: dict[str, Any]) -> dict[str, Any]:
    """Figures per tag as columns of their own."""
    tags = value.get("tags", {})
    own = {f"{key}[{tag}]": figure for tag, figures in tags.items() for key, figure in figures.items()}
    return {key: item for key, item in value.items() if key != "tags"} | own


def _write_csv(path: Path, values: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(values[0]), restval="")
    writer.writeheader()
    writer.writerows(values)
    write_text(path, text.getvalue())
