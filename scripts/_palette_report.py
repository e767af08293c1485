"""Results, tables and plot of bench_palette.py."""

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from math import sqrt
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.table import Table

from ee_scale.palettes.intervals import Scores, Z, interval, is_seen, standard_error, wilson

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"supernet": "#1b6ca8", "separate": "#2a9d54", "sliced": "#b0b0b0", "whole weights": "#d98324"}


@dataclass
class Result:
    """One way to make the sizes.

    Attributes:
        seconds: of training, of each seed.
        runs: of each seed, what every size answered.
    """

    name: str
    trained: int
    seconds: list[float] = field(default_factory=list)
    runs: list[list[Scores]] = field(default_factory=list)

    @property
    def quality(self) -> list[float]:
        """Of each size, over seeds."""
        return [sum(scores.mean for scores in size) / len(size) for size in zip(*self.runs, strict=True)]

    @property
    def cost(self) -> float:
        """Seconds of one seed."""
        return sum(self.seconds) / max(1, len(self.seconds))

    def to_dict(self, metric: str) -> dict[str, Any]:
        """For JSON."""
        spans = [
            wilson(value, len(first.sums)) if metric == "accuracy" else interval(first)
            for value, first in zip(self.quality, self.runs[0], strict=True)
        ]
        seeds = [[scores.mean for scores in run] for run in self.runs]
        found = {"quality": self.quality, "interval": spans, "seeds": seeds}
        return {"name": self.name, "seconds": self.cost, "trained": self.trained, **found}


def compared(one: Sequence[Scores], other: Sequence[Scores]) -> dict[str, Any]:
    """Two ways at one size, seed by seed on the same texts: the mean difference, and whether it means anything."""
    differences = [mine.minus(theirs) for mine, theirs in zip(one, other, strict=True)]
    over_seeds = Scores(sum(d.sums for d in differences) / len(differences), differences[0].counts)
    means = torch.tensor([d.mean for d in differences])
    seeds = float(means.var()) / len(means) if len(means) > 1 else 0.0
    half = Z * sqrt(standard_error(over_seeds) ** 2 + seeds)
    low, high = over_seeds.mean - half, over_seeds.mean + half
    return {"mean": over_seeds.mean, "interval": [low, high], "seen": is_seen(low, high)}


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
    table.add_section()
    cells = [_difference(found, percent) for found in report["supernet minus separate"]]
    table.add_row("supernet - separate", *cells, "", "", "")
    out.print(table)
    note = f"{report['texts']:,} texts; differences on the same texts, 95%"
    out.print(f"{note}; those marked * are no accident of texts or seeds", highlight=False)


def _difference(found: dict[str, Any], percent: bool) -> str:
    """'-1.2*' over its interval."""
    scale, digits = (100, 1) if percent else (1, 3)
    mean, low, high = (f"{scale * value:+.{digits}f}" for value in (found["mean"], *found["interval"]))
    return f"{mean}{'*' if found['seen'] else ''}\n{low} to {high}"


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


def write(path: Path, threads: int, seconds: float, reports: list[dict[str, Any]]) -> None:
    """The cases so far as JSON."""
    record = {
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": threads},
        "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed", "ee-scale")},
        "seconds": seconds,
        "reports": reports,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
