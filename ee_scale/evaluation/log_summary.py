"""Sum decision logs over time and per tag. Files are streamed: they may be larger than memory."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob
from math import sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Any

from ee_scale.errors import UserError
from ee_scale.reading import parse_json

NO_TAG = "-"
LONGEST_LINE = 1 << 20  # bytes; what is longer is no decision
MOST_LAYERS, LARGEST_SCORE = 1 << 20, 1e6
LAST_TIME = 1 << 36  # seconds; the calendar of a plot goes no further


@dataclass
class Summary:
    """Counts of some decisions.

    Attributes:
        depth: sum of the layers that tokens left at.
        sources: tokens that were drafted and accepted, by what drafted them.
        audited, agreed: tokens that left at an exit and were compared with the full model; those that were the same.
    """

    tokens: int = 0
    depth: int = 0
    layers: Counter[int] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    confidence: float = 0.0
    scored: int = 0
    exited: int = 0
    audited: int = 0
    agreed: int = 0

    def add(self, record: dict[str, Any], num_layers: int | None) -> None:
        """Count one decision; without `num_layers` every layer is taken for an exit."""
        layer = record["layer"]
        self.tokens += 1
        self.depth += layer
        self.layers[layer] += 1
        if record.get("source") is not None:
            self.sources[record["source"]] += 1
        if record.get("confidence") is not None:
            self.confidence += record["confidence"]
            self.scored += 1
        if layer != num_layers:
            self.exited += 1
            if record.get("agrees") is not None:
                self.audited += 1
                self.agreed += record["agrees"]

    def agreement(self, confidence: float) -> tuple[float, float, float] | None:
        """Share of all tokens that are the full model's, with bounds at this confidence; None: nothing was compared.

        Tokens of the final layer agree by definition; exited ones as often as those that were compared, for which
        the bounds are Wilson's (1927).
        """
        if not self.audited:
            return None
        share = self.exited / self.tokens
        rates = (self.agreed / self.audited, *wilson(self.agreed, self.audited, confidence))
        return tuple(1 - share * (1 - rate) for rate in rates)

    def to_json(self, confidence: float) -> dict[str, Any]:
        """Plain values; shares by layer."""
        found = self.agreement(confidence)
        return {
            "tokens": self.tokens,
            "mean_depth": self.depth / self.tokens,
            "shares": {str(k): self.layers[k] / self.tokens for k in sorted(self.layers)},
            "sources": {name: count / self.tokens for name, count in sorted(self.sources.items())},
            "mean_confidence": self.confidence / self.scored if self.scored else None,
            "exited": self.exited,
            "audited": self.audited,
            "agreed": self.agreed,
            "agreement": found and found[0],
            "agreement_low": found and found[1],
            "agreement_high": found and found[2],
        }


@dataclass
class LogSummary:
    """Everything a report shows.

    Attributes:
        cells: (start of the time bucket in epoch seconds, tag) -> counts; tag NO_TAG where lines have none.
        skipped: lines that are not whole records (torn by a killed process).
        num_layers: depth of the models named in headers.
    """

    cells: dict[tuple[float, str], Summary] = field(default_factory=dict)
    skipped: int = 0
    num_layers: set[int] = field(default_factory=set)

    def by(self, axis: int | None) -> dict[Any, Summary]:
        """Cells summed over everything but the time (0) or the tag (1); None: over all, under the key None."""
        totals: dict[Any, Summary] = {}
        for key, cell in self.cells.items():
            total = totals.setdefault(None if axis is None else key[axis], Summary())
            total.layers.update(cell.layers)
            total.sources.update(cell.sources)
            for name in ("tokens", "depth", "confidence", "scored", "exited", "audited", "agreed"):
                setattr(total, name, getattr(total, name) + getattr(cell, name))
        return totals if axis is None else dict(sorted(totals.items()))


def wilson(hits: int, trials: int, confidence: float) -> tuple[float, float]:
    """Bounds of a binomial share; each is passed with probability (1 - confidence) / 2."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, extra = hits / trials, z * z / trials
    centre, width = share + extra / 2, z * sqrt((share * (1 - share) + extra / 4) / trials)
    return max(0.0, (centre - width) / (1 + extra)), min(1.0, (centre + width) / (1 + extra))


def log_files(wanted: Sequence[str]) -> list[Path]:
    """The files behind names and patterns. Raises `UserError` where there is none."""
    found = []
    for name in wanted:
        pattern = str(Path(name).expanduser())
        matches = [pattern] if Path(pattern).is_file() else sorted(glob(pattern, recursive=True))
        files = [Path(path) for path in matches if Path(path).is_file()]
        if not files:
            raise UserError(f"log={name}: no such file")
        found += files
    return list(dict.fromkeys(found))


def bucket_seconds(every: str | float) -> float:
    """'hour', 'day', 'minute' or a number of minutes -> seconds. Raises `UserError`."""
    named = {"minute": 60.0, "hour": 3600.0, "day": 86400.0}
    if str(every) in named:
        return named[str(every)]
    try:
        minutes = float(every)
    except (TypeError, ValueError):
        minutes = 0.0
    if not 0 < minutes < 1e9:
        raise UserError(f"every={every}: give hour, day, minute, or a number of minutes above 0")
    return 60 * minutes


def summarise(files: Iterable[Path], every: float, tag: str | None = None) -> LogSummary:
    """Sum files line by line; with `tag`, only its decisions. Headers hold for the lines after them.

    Raises `UserError` if no decision is left.
    """
    result = LogSummary()
    for path in files:
        depth = None
        for record in _records(path, result):
            if "num_layers" in record:
                depth = record["num_layers"]
                result.num_layers.add(depth)
                continue
            name = record["tag"]
            if tag is None or name == tag:
                key = (record["time"] // every * every, name)
                result.cells.setdefault(key, Summary()).add(record, depth)
    if not result.cells:
        of_tag = f" with tag={tag}" if tag is not None else ""
        raise UserError(f"log: no decision{of_tag} in it ({result.skipped} unreadable lines)")
    return result


def _records(path: Path, result: LogSummary) -> Iterator[dict[str, Any]]:
    """Headers and decisions of a file; lines that are neither are counted."""
    try:
        with path.open("rb") as file:
            while line := file.readline(LONGEST_LINE):
                record = _record(line)
                if record is None:
                    result.skipped += 1
                elif "deferred" not in record:  # else of a whole answer, not of a token
                    yield record
    except OSError as error:
        raise UserError(f"log={path}: cannot read ({error.strerror})") from error


def _record(line: bytes) -> dict[str, Any] | None:
    """A line as `DecisionLog` writes it; None for anything else."""
    try:
        record = parse_json(line.decode())
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    if isinstance(record.get("deferred"), bool):
        return record
    if "num_layers" in record:
        return record if _is_number(record["num_layers"], int, 1, MOST_LAYERS) else None
    tag, agrees, score = record.get("tag"), record.get("agrees"), record.get("confidence")
    whole = (
        _is_number(record.get("layer"), int, 0, MOST_LAYERS)
        and _is_number(record.get("time"), int | float, 0, LAST_TIME)
        and isinstance(tag, str | int | float | None)
        and isinstance(agrees, bool | None)
        and isinstance(record.get("source"), str | None)
        and (score is None or _is_number(score, int | float, -LARGEST_SCORE, LARGEST_SCORE))
    )
    if not whole:
        return None
    return {**record, "tag": NO_TAG if tag is None else _tag(tag, line)}


def _tag(tag: object, line: bytes) -> str:
    """A tag as text; a number as it was written."""
    if isinstance(tag, float):
        tag = json.loads(line, parse_float=str)["tag"]
    text = tag if isinstance(tag, str) else json.dumps(tag)
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair can be logged, and not written


def _is_number(value: object, kind: type, least: float, most: float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and least <= value <= most
