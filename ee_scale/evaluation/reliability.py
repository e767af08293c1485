"""From a score to the chance of an error: the map, and how far it and the score can be trusted."""

from dataclasses import dataclass

import numpy as np

BINS = 15  # of the calibration error, as in Guo et al. (arXiv 1706.04599)


@dataclass(frozen=True)
class ErrorMap:
    """Score -> share of wrong answers, which never grows with the score (isotonic regression; UCCI, arXiv 2605.18796).

    Attributes:
        scores: [k], increasing; errors: [k] there, straight lines between them, constant outside.
    """

    scores: np.ndarray
    errors: np.ndarray

    @classmethod
    def fitted(cls, scores: np.ndarray, wrong: np.ndarray) -> "ErrorMap":
        """Least squares over scores [n] and what was wrong [n] (0 to 1), by pooling adjacent violators."""
        values, first = np.unique(scores, return_inverse=True)
        counts = np.bincount(first).astype(float)
        means = np.bincount(first, wrong) / counts
        blocks: list[list[float]] = []  # mean, weight, number of values
        for mean, weight in zip(means.tolist(), counts.tolist(), strict=True):
            blocks.append([mean, weight, 1])
            while len(blocks) > 1 and blocks[-2][0] <= blocks[-1][0]:
                last, before = blocks.pop(), blocks[-1]
                total = before[1] + last[1]
                before[0] = (before[0] * before[1] + last[0] * last[1]) / total
                before[1], before[2] = total, before[2] + last[2]
        sizes = np.array([int(size) for *_, size in blocks])
        ends = np.cumsum(sizes) - 1
        knots = np.unique(np.concatenate([ends - sizes + 1, ends]))
        return cls(values[knots], np.repeat([mean for mean, *_ in blocks], sizes)[knots])

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Expected share of errors at scores [n]."""
        return np.interp(scores, self.scores, self.errors)


def calibration_error(chances: np.ndarray, right: np.ndarray) -> float:
    """ECE: mean distance, over BINS bins of chances [n], between the mean chance and the share that is right [n]."""
    bins = np.minimum((chances * BINS).astype(int), BINS - 1)
    return float(np.abs(np.bincount(bins, chances - right, BINS)).sum() / len(chances))


def auroc(scores: np.ndarray, right: np.ndarray) -> float | None:
    """Chance that a right answer scores higher than a wrong one (a tie counts half); None: there is one kind only."""
    _, at, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[at]  # mean rank, from 1, of those with the same score
    good = int(right.sum())
    bad = len(right) - good
    if not good or not bad:
        return None
    return float((ranks[right.astype(bool)].sum() - good * (good + 1) / 2) / (good * bad))
