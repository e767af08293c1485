"""What bench_palette.py measured: records, tables and the sentence that sums them up."""

import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from math import sqrt
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ee_scale.palettes.intervals import Scores, Z, interval, is_seen, standard_error, wilson

SUPERNET, POLISHED, SEPARATE = "supernet", "polished", "separate"
TOLD = {
    "accuracy": (0.25, "layer_params"),
    "loss": (2 / 3, "params"),
}  # share of which parameters the sentence is about


@dataclass
class Result:
    """One way to make the sizes.

    Attributes:
        teacher: seconds of the training of the teacher that it starts from.
        seconds: of the sizes' own training, of each seed.
        runs: of each seed and size, by file of texts, what was answered.
    """

    name: str
    trained: int
    teacher: float
    seconds: list[float] = field(default_factory=list)
    runs: list[list[dict[str, Scores]]] = field(default_factory=list)

    @property
    def apart(self) -> float:
        """Seconds of one seed, the teacher's left out."""
        return sum(self.seconds) / max(1, len(self.seconds))

    def sizes(self, texts: str) -> list[list[Scores]]:
        """Of each size, what every seed answered."""
        return [[scores[texts] for scores in size] for size in zip(*self.runs, strict=True)]


@dataclass
class Spread:
    """A figure and its 95% interval."""

    mean: float
    low: float
    high: float

    @property
    def seen(self) -> bool:
        """Of a difference: whether it is one."""
        return is_seen(self.low, self.high)


@dataclass
class Way:
    """One way to make the sizes: seconds of training of one seed, and those without the teacher's."""

    name: str
    seconds: float
    apart: float
    trained: int


@dataclass
class Judged:
    """One file of texts.

    Attributes:
        quality: by way, of each size over seeds; the interval is that of the texts.
        seeds: by way, of each seed and size.
        minus_separate: by way, of each size, on the same texts; the interval is that of texts and seeds.
        of_teacher: by way, of each size: share of the teacher's accuracy, or nats above the teacher's loss.
    """

    name: str
    texts: int
    teacher: Spread
    quality: dict[str, list[Spread]]
    seeds: dict[str, list[list[float]]]
    minus_separate: dict[str, list[Spread]]
    of_teacher: dict[str, list[Spread]]


@dataclass
class Latency:
    """Median milliseconds of a forward of `tokens` tokens, batch 1, by runtime; sizes of a runtime took turns."""

    tokens: int
    full: dict[str, float]
    sizes: dict[str, list[float]]

    def ratios(self, runtime: str) -> list[float]:
        """Of each size, to the full model."""
        return [ms / self.full[runtime] for ms in self.sizes[runtime]]


@dataclass
class Report:
    """A case; parameters of each size and of the full model: all, and those in layers."""

    case: str
    metric: str
    steps: dict[str, int]
    sizes: list[str]
    params: list[int]
    layer_params: list[int]
    full_params: int
    full_layer_params: int
    teacher_seconds: float
    ways: list[Way]
    judged: list[Judged]
    latency: Latency | None = None

    @property
    def percent(self) -> bool:
        """Whether quality is a share."""
        return self.metric == "accuracy"

    def way(self, name: str) -> Way:
        """By its name."""
        return next(way for way in self.ways if way.name == name)


def over_seeds(runs: Sequence[Scores], metric: str) -> Spread:
    """Quality: the mean over seeds, and how far it may be off because so many texts were read and no more."""
    mean = Scores(sum(scores.sums for scores in runs) / len(runs), runs[0].counts)
    span = wilson(mean.mean, len(mean.sums)) if metric == "accuracy" else interval(mean)
    return Spread(mean.mean, *(span or (mean.mean, mean.mean)))


def with_seeds(runs: Sequence[Scores]) -> Spread:
    """A figure that was taken text by text from every seed: the interval adds what texts and what seeds let vary."""
    mean = Scores(sum(scores.sums for scores in runs) / len(runs), runs[0].counts)
    means = torch.tensor([scores.mean for scores in runs], dtype=torch.float64)
    seeds = float(means.var()) / len(means) if len(means) > 1 else 0.0
    half = Z * sqrt(standard_error(mean) ** 2 + seeds)
    return Spread(mean.mean, mean.mean - half, mean.mean + half)


def compared(one: Sequence[Scores], other: Sequence[Scores]) -> Spread:
    """Two ways at one size, seed by seed on the same texts: the mean difference."""
    return with_seeds([mine.minus(theirs) for mine, theirs in zip(one, other, strict=True)])


def to_teacher(runs: Sequence[Scores], taught: Scores, metric: str) -> Spread:
    """A size beside the teacher, on the same texts: share of its accuracy, or nats above its loss."""
    if metric == "accuracy":  # a ratio of two sums over texts, as a mean over tokens is
        return with_seeds([Scores(scores.sums, taught.sums) for scores in runs])
    return with_seeds([scores.minus(taught) for scores in runs])


def summed_up(texts: str, taught: Scores, results: Iterable[Result], metric: str) -> Judged:
    """What every way answered on one file of texts."""
    found = {result.name: result.sizes(texts) for result in results}
    headline = {name: sizes for name, sizes in found.items() if name.startswith((SUPERNET, POLISHED, SEPARATE))}
    return Judged(
        texts,
        len(taught.sums),
        over_seeds([taught], metric),
        {name: [over_seeds(size, metric) for size in sizes] for name, sizes in found.items()},
        {
            name: [[scores.mean for scores in seed] for seed in zip(*sizes, strict=True)]
            for name, sizes in found.items()
        },
        {
            name: [compared(*pair) for pair in zip(sizes, found[SEPARATE], strict=True)]
            for name, sizes in headline.items()
            if name != SEPARATE
        },
        {name: [to_teacher(size, taught, metric) for size in sizes] for name, sizes in headline.items()},
    )


# -- tables ------------------------------------------------------------------------------------------------------------


def print_tables(out: Console, report: Report) -> None:
    """A table per file of texts, and what to take from them."""
    for judged in report.judged:
        out.print(quality_table(report, judged, costs=judged is report.judged[0]))
        note = f"{judged.texts:,} texts; below each figure its 95% interval; differences are taken on the same texts"
        out.print(f"{note}; those marked * are no accident of texts or seeds", highlight=False)
    for line in headlines(report):
        out.print(line, highlight=False)


def quality_table(report: Report, judged: Judged, *, costs: bool) -> Table:
    """Quality by way and size, differences and shares; `costs`: time of training and latency too."""
    full, layers = report.full_params, report.full_layer_params
    unit = "accuracy, %" if report.percent else "loss, nats"
    whole = f"{full:,} parameters, {layers:,} in layers"
    title = f"{report.case}, {judged.name}: {unit}; teacher {_quality(report, judged.teacher, ', ')} ({whole})"
    table = Table(title=title, title_justify="left")
    table.add_column("way")
    for name, size, inner in zip(report.sizes, report.params, report.layer_params, strict=True):
        share = f"{size / 1e6:.2f}M, {100 * size / full:.0f}%"
        table.add_column(f"{name}\n{share}\n{100 * inner / layers:.0f}% of layers", justify="right")
    for name in ("training\nCPU s", "of (b)", "of (b),\nteacher\napart", "trained") if costs else ():
        table.add_column(name, justify="right")
    for way in report.ways:
        cells = [_quality(report, spread) for spread in judged.quality[way.name]]
        table.add_row(way.name, *cells, *(_costs(report, way) if costs else ()))
    table.add_section()
    for name, spreads in judged.minus_separate.items():
        table.add_row(f"{name} - separate", *(_difference(report, spread) for spread in spreads))
    table.add_section()
    for name, spreads in judged.of_teacher.items():
        label = "% of the teacher's" if report.percent else "nats above the teacher"
        cells = [_quality(report, s) if report.percent else _difference(report, s) for s in spreads]
        table.add_row(f"{name}, {label}", *cells)
    if costs and report.latency:
        table.add_section()
        for runtime, ms in report.latency.full.items():
            cells = [f"{ratio:.2f}" for ratio in report.latency.ratios(runtime)]
            table.add_row(f"latency, {runtime}\nof {ms:.1f} ms at {report.latency.tokens} tokens", *cells)
    return table


def _quality(report: Report, spread: Spread, between: str = "\n") -> str:
    """'79.3' over its interval."""
    scale, digits = (100, 1) if report.percent else (1, 3)
    mean, low, high = (f"{scale * value:.{digits}f}" for value in (spread.mean, spread.low, spread.high))
    return f"{mean}{between}{low} to {high}"


def _difference(report: Report, spread: Spread, between: str = "\n") -> str:
    """'-1.2*' over its interval."""
    scale, digits = (100, 1) if report.percent else (1, 3)
    mean, low, high = (f"{scale * value:+.{digits}f}" for value in (spread.mean, spread.low, spread.high))
    return f"{mean}{'*' if spread.seen else ''}{between}{low} to {high}"


def _costs(report: Report, way: Way) -> tuple[str, str, str, str]:
    """Seconds, with and without the teacher's as shares of the separate runs, trained parameters."""
    separate = report.way(SEPARATE)
    shares = [f"{mine / theirs:.2f}" if mine else "-" for mine, theirs in _pairs(way, separate)]
    return f"{way.seconds:.0f}", *shares, f"{way.trained:,}"


def _pairs(way: Way, separate: Way) -> tuple[tuple[float, float], tuple[float, float]]:
    return (way.seconds, separate.seconds), (way.apart, separate.apart)


def headlines(report: Report) -> list[str]:
    """Time, distance to separate runs, share of the teacher and latency: a sentence per way, from its numbers."""
    judged = report.judged[0]
    wanted, which = TOLD[report.metric]
    whole = report.full_layer_params if which == "layer_params" else report.full_params
    shares = [size / whole for size in getattr(report, which)]
    told = min(range(len(shares)), key=lambda i: abs(shares[i] - wanted))
    of = "the layers' parameters" if which == "layer_params" else "the parameters"
    size = f"{report.sizes[told]} ({100 * shares[told]:.0f}% of {of})"
    lines = []
    for name, differences in judged.minus_separate.items():
        with_teacher, apart = (a / b for a, b in _pairs(report.way(name), report.way(SEPARATE)))
        time = f"{with_teacher:.2f} of the time of separate runs"
        if report.teacher_seconds:
            time += f" ({apart:.2f} with the teacher apart)"
        own = judged.of_teacher[name][told]
        kept = f"{_quality(report, own, '% of the teacher (')})" if report.percent else _nats(report, own)
        lines.append(f"{name}: {time}; {_behind(report, differences)}; {size} is at {kept}")
    if report.latency:
        found = ", ".join(f"{report.latency.ratios(name)[told]:.2f} ({name})" for name in report.latency.full)
        lines.append(f"latency of {size} as a share of the full model's: {found}")
    return lines


def _nats(report: Report, spread: Spread) -> str:
    return f"{_difference(report, spread, ' nats of the teacher (')})"


def _behind(report: Report, differences: Sequence[Spread]) -> str:
    """The size that loses most against separate runs."""
    sign = 1 if report.percent else -1
    worst = min(range(len(differences)), key=lambda i: sign * differences[i].mean)
    spread = differences[worst]
    lost = -sign * spread.mean
    figure = f"{100 * abs(lost):.1f} points" if report.percent else f"{abs(lost):.3f} nats"
    said = f"behind them by at most {figure}" if lost >= 0 else f"ahead of them by at least {figure}"
    return f"{said} (difference at {report.sizes[worst]}: {_difference(report, spread, ', ')})"


def write(path: Path, threads: int, seconds: float, reports: Sequence[Report]) -> None:
    """The cases so far as JSON."""
    record = {
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": threads},
        "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed", "ee-scale")},
        "seconds": seconds,
        "reports": [asdict(report) for report in reports],
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
