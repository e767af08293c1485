"""Tables, files and warnings of summed decision logs: where tokens leave, and whether exits still agree."""

import csv
import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from ee_scale.evaluation.log_summary import NO_TAG, LogSummary
from ee_scale.files import write_text
from ee_scale.log import titled_table


def warnings(summary: LogSummary, bound: float, confidence: float) -> list[str]:
    """One sentence for each time bucket and tag whose agreement is below `bound` beyond chance.

    The confidence is that no sentence of the whole report is there by chance (Bonferroni's correction).
    """
    tests = {f"since {moment(start)}": cell for start, cell in summary.by(0).items()}
    tests |= {f"tag {name}": cell for name, cell in summary.by(1).items() if name != NO_TAG}
    compared = {name: cell for name, cell in tests.items() if cell.audited}
    # Only the upper bound is used: twice the error may lie outside a two-sided interval.
    level = 1 - 2 * (1 - confidence) / max(1, len(compared))
    sentences = []
    for name, cell in compared.items():
        agreement, _, high = cell.agreement(level)
        if high < bound:
            sentences.append(
                f"{name}: {agreement:.2%} of the tokens are the full model's, below the wanted {bound:.2%} "
                f"({cell.audited - cell.agreed} of {cell.audited} compared tokens differ): calibrate again"
            )
    return sentences


def moment(start: float) -> str:
    """UTC, to the minute."""
    return datetime.fromtimestamp(start, UTC).strftime("%Y-%m-%d %H:%M")


def report_table(summary: LogSummary, axis: int | None, title: str, confidence: float) -> Table:
    """One line per time bucket (0), per tag (1), or one for all (None)."""
    total = summary.by(None)[None]
    layers, sources = sorted(total.layers), sorted(total.sources)
    first = {0: "from (UTC)", 1: "tag", None: ""}[axis]
    columns = (
        "tokens",
        "mean layer",
        *(f"at {k}" for k in layers),
        *(f"by {name}" for name in sources),
        "confidence",
        "compared",
        "agreement",
    )
    table = titled_table(title, columns, left=(first,))
    for key, cell in summary.by(axis).items():
        found = cell.agreement(confidence)
        table.add_row(
            {0: lambda k: moment(k), 1: str, None: lambda _: "all"}[axis](key),
            f"{cell.tokens:,}",
            f"{cell.depth / cell.tokens:.2f}",
            *(f"{cell.layers[k] / cell.tokens:.1%}" for k in layers),
            *(f"{cell.sources[name] / cell.tokens:.1%}" for name in sources),
            f"{cell.confidence / cell.scored:.3f}" if cell.scored else "-",
            f"{cell.audited:,}",
            "-" if found is None else f"{found[0]:.2%} ({found[1]:.2%} to {found[2]:.2%})",
        )
    return table


def write_log_report(folder: Path, summary: LogSummary, facts: dict[str, Any], bound: float, confidence: float) -> None:
    """report.json, report.csv (a line per time bucket and tag) and report.png."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        **facts,
        "skipped_lines": summary.skipped,
        "num_layers": sorted(summary.num_layers),
        "warnings": warnings(summary, bound, confidence),
        "total": summary.by(None)[None].to_json(confidence),
        "times": [{"time": start, **cell.to_json(confidence)} for start, cell in summary.by(0).items()],
        "tags": [{"tag": name, **cell.to_json(confidence)} for name, cell in summary.by(1).items()],
    }
    write_text(folder / "report.json", json.dumps(values, indent=1) + "\n")
    layers = sorted(summary.by(None)[None].layers)
    text = io.StringIO()
    writer = csv.writer(text)
    columns = ["tokens", "mean_depth", "mean_confidence", "exited", "audited", "agreed", "agreement"]
    writer.writerow(["time", "tag", *columns, *(f"share_{k}" for k in layers)])
    for (start, name), cell in sorted(summary.cells.items()):
        row = cell.to_json(confidence)
        shares = [row["shares"].get(str(k), 0.0) for k in layers]
        writer.writerow([moment(start), name, *(row[column] for column in columns), *shares])
    write_text(folder / "report.csv", text.getvalue())
    plot_log(folder / "report.png", summary, bound, confidence)


def plot_log(path: Path, summary: LogSummary, bound: float, confidence: float) -> None:
    """Shares per layer and agreement over time."""
    times, totals = summary.by(0), summary.by(None)[None]
    days = [datetime.fromtimestamp(start, UTC) for start in times]
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for k in sorted(totals.layers):
        name = f"layer {k} (final)" if k in summary.num_layers else f"layer {k}"
        top.plot(days, [100 * cell.layers[k] / cell.tokens for cell in times.values()], "o-", label=name)
    top.set(ylabel="% of tokens", title="Where tokens left", ylim=(0, 102))
    top.legend()
    known = [(day, cell.agreement(confidence)) for day, cell in zip(days, times.values(), strict=True) if cell.audited]
    if known:
        middles = [100 * found[0] for _, found in known]
        errors = [[100 * (f[0] - f[1]) for _, f in known], [100 * (f[2] - f[0]) for _, f in known]]
        bottom.errorbar([day for day, _ in known], middles, yerr=errors, fmt="o-", capsize=3)
    bottom.axhline(100 * bound, color="tab:red", linestyle="--", linewidth=1)
    bottom.set(ylabel="% of tokens", title=f"Same token as the full model (dashed: wanted, {bound:.2%})")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    figure.autofmt_xdate()
    figure.savefig(path, dpi=130)
