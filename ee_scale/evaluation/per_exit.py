"""Loss, perplexity and agreement with the final layer, for every exit, overall and per group."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import exp
from typing import Any

from ee_scale.evaluation.records import Records


@dataclass(frozen=True)
class ExitQuality:
    """One exit (or the final layer) on a text.

    Attributes:
        loss: mean next-token cross entropy, nats; of an exit that scores a shortlist, over the tokens in it.
        agreement: share of positions whose most likely token is that of the final layer.
        covered: share of positions whose next token the exit scores; None where every exit scores every token.
    """

    layer: int
    final: bool
    loss: float
    perplexity: float
    agreement: float
    covered: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {name: value for name, value in asdict(self).items() if name != "covered" or value is not None}


@dataclass(frozen=True)
class Gap:
    """The two groups that differ most in a figure: `low` has the value `low_value`, `high` has `high_value`."""

    low: str
    low_value: float
    high: str
    high_value: float

    @property
    def size(self) -> float:
        """The difference."""
        return self.high_value - self.low_value


def exit_qualities(records: Records) -> list[ExitQuality]:
    """Exits in order of depth, the final layer last."""
    agreements, scored = records.matches.double().mean(-1), ~records.losses.isposinf()
    covered = scored.double().mean(-1) if records.layers and not scored.all() else None
    rows = [
        _quality(
            k,
            False,
            float(records.losses[i][scored[i]].double().mean()),
            float(agreements[i]),
            None if covered is None else float(covered[i]),
        )
        for i, k in enumerate(records.layers)
    ]
    final = float(records.final_losses.double().mean())
    return [*rows, _quality(records.num_layers, True, final, 1.0, None if covered is None else 1.0)]


def largest_gap(values: Mapping[str, float]) -> Gap | None:
    """The groups with the smallest and the largest value; None if there are fewer than two groups."""
    if len(values) < 2:
        return None
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    return Gap(low, values[low], high, values[high])


def agreement_gap(by_tag: Mapping[str, list[ExitQuality]]) -> tuple[int, Gap] | None:
    """(exit layer, gap) of the exit whose agreement with the final layer differs most between groups."""
    names = list(by_tag)
    if not names:
        return None
    gaps = []
    for index, row in enumerate(by_tag[names[0]]):
        gap = None if row.final else largest_gap({name: by_tag[name][index].agreement for name in names})
        if gap is not None:
            gaps.append((row.layer, gap))
    return max(gaps, key=lambda item: item[1].size, default=None)


def _quality(layer: int, final: bool, loss: float, agreement: float, covered: float | None) -> ExitQuality:
    return ExitQuality(layer, final, loss, exp(min(loss, 700)), agreement, covered)
