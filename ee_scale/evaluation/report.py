"""Tables, JSON, CSV and plots of what was measured."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from ee_scale.evaluation.per_exit import ExitQuality
from ee_scale.files import write_text


def quality_table(rows: Sequence[ExitQuality], title: str, before: Sequence[ExitQuality] | None = None) -> Table:
    """One line per exit; `before` adds the loss of the untrained exits."""
    table = Table(title=title, title_justify="left")
    columns = ["exit after layer", *(["loss at copy-init", "loss after tuning"] if before else ["loss"])]
    for name in (*columns, "perplexity", "agreement with final"):
        table.add_column(name, justify="right")
    for index, row in enumerate(rows):
        first = ("-" if row.final else f"{before[index].loss:.3f}",) if before else ()
        name = f"{row.layer} (final)" if row.final else str(row.layer)
        table.add_row(name, *first, f"{row.loss:.3f}", f"{row.perplexity:,.2f}", f"{row.agreement:.1%}")
    return table


def write_report(folder: Path, rows: Sequence[ExitQuality], facts: dict[str, object]) -> None:
    """evaluate.json, evaluate.csv and evaluate.png."""
    folder.mkdir(parents=True, exist_ok=True)
    values = [row.to_json() for row in rows]
    write_text(folder / "evaluate.json", json.dumps({**facts, "exits": values}, indent=1) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(values[0]))
    writer.writeheader()
    writer.writerows(values)
    write_text(folder / "evaluate.csv", text.getvalue())
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
