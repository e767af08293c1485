"""Tables and plot of bench_palette.py."""

from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"supernet": "#1b6ca8", "separate": "#2a9d54", "sliced": "#b0b0b0", "whole weights": "#d98324"}


def print_tables(out: Console, report: dict[str, Any]) -> None:
    """Quality by size and way, with training time and trained parameters."""
    percent = report["metric"] == "accuracy"
    shown = (lambda value: f"{100 * value:.1f}") if percent else (lambda value: f"{value:.3f}")
    full, layers = report["full_params"]
    unit = "accuracy, %" if percent else "loss, nats"
    teacher = report["teacher"]
    title = f"{report['case']}: {unit}; teacher {shown(teacher['quality'])} ({full:,} parameters, {layers:,} in layers)"
    table = Table(title=title, title_justify="left")
    table.add_column("way")
    for name, size, inner in zip(report["sizes"], report["params"], report["layer_params"], strict=True):
        table.add_column(f"{name}\n{size / 1e6:.2f}M, {100 * inner / layers:.0f}% of layers", justify="right")
    for name in ("training s", "of (b)", "trained"):
        table.add_column(name, justify="right")
    separate = next(result["seconds"] for result in report["results"] if result["name"] == "separate")
    for result in report["results"]:
        share = f"{result['seconds'] / separate:.2f}" if result["seconds"] else "-"
        cells = [shown(value) for value in result["quality"]]
        table.add_row(result["name"], *cells, f"{result['seconds']:.0f}", share, f"{result['trained']:,}")
    out.print(table)


def plot(path: Path, reports: list[dict[str, Any]]) -> None:
    """Quality against parameters, a panel per case."""
    figure, axes = plt.subplots(1, len(reports), figsize=(5.2 * len(reports), 3.8), squeeze=False)
    for axis, report in zip(axes[0], reports, strict=True):
        percent = report["metric"] == "accuracy"
        scale = 100 if percent else 1
        sizes = [size / 1e6 for size in report["params"]]
        for result in report["results"]:
            if result["name"] in COLOURS:
                points = sorted(zip(sizes, result["quality"], strict=True))
                label = result["name"]
                if result["seconds"]:
                    label += f" ({result['seconds']:.0f} s of training)"
                xs, ys = [x for x, _ in points], [scale * y for _, y in points]
                axis.plot(xs, ys, "o-", color=COLOURS[result["name"]], label=label, markersize=4)
        full = report["full_params"][0] / 1e6
        axis.plot([full], [scale * report["teacher"]["quality"]], "*", color="black", markersize=11, label="teacher")
        axis.set(xlabel="parameters, millions", ylabel="accuracy, %" if percent else "loss, nats (lower is better)")
        axis.set_title(report["case"], fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
