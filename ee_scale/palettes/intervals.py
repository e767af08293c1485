"""How far a figure may be off because so many texts were looked at and no more: 95% intervals.

Shares: Wilson's score interval (Wilson 1927; Brown, Cai and DasGupta 2001). Means over tokens: of the ratio of two
sums over texts, as the tokens of a text are no independent ones (Cochran, Sampling Techniques, chapter 6). Differences
of two subnets are taken text by text, which needs far fewer texts than two intervals of their own.
"""

from dataclasses import dataclass
from math import sqrt

import torch

Z = 1.959964  # of the normal distribution, 95%

Interval = tuple[float, float]


@dataclass(frozen=True)
class Scores:
    """What each text adds to the metric that decides.

    Attributes:
        sums: [n] fp64: right answers, or nats.
        counts: [n] fp64: answers (1 of a class), or tokens.
    """

    sums: torch.Tensor
    counts: torch.Tensor

    @property
    def mean(self) -> float:
        """The metric."""
        return float(self.sums.sum() / self.counts.sum())

    def minus(self, other: "Scores") -> "Scores":
        """The difference on the same texts."""
        return Scores(self.sums - other.sums, self.counts)


def wilson(share: float, count: int) -> Interval:
    """Of a share of `count` independent answers that are right."""
    z2 = Z * Z / count
    middle, half = share + z2 / 2, Z * sqrt(share * (1 - share) / count + z2 / (4 * count))
    return (middle - half) / (1 + z2), (middle + half) / (1 + z2)


def interval(scores: Scores) -> Interval | None:
    """Of a mean, by how much its texts differ; None: one text says nothing of that."""
    if len(scores.sums) < 2:
        return None
    half = Z * standard_error(scores)
    return scores.mean - half, scores.mean + half


def standard_error(scores: Scores) -> float:
    """Of a mean over two texts or more, of different lengths."""
    count = len(scores.sums)
    spread = (scores.sums - scores.mean * scores.counts).pow(2).sum() * count / (count - 1)
    return float(spread.sqrt() / scores.counts.sum())


def is_seen(low: float, high: float) -> bool:
    """Whether a difference with this interval is one."""
    return not low <= 0 <= high
