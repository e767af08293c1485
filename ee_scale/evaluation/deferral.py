"""Keep a small model's answer or ask a larger one: a limit on its score whose loss of quality is bounded.

Records are parted by chance into three. The first fit the map from score to error and choose the candidates; the second
test them by fixed-sequence testing, as `calibrate` does; the third only check what was found. The map keeps the order
of scores (but for ties), so the limit is on the score itself: the map's steps would make it coarser.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch

from ee_scale.errors import UserError
from ee_scale.evaluation.calibration import Verdict, fixed_sequence, units_needed
from ee_scale.evaluation.reliability import ErrorMap, auroc, calibration_error
from ee_scale.inference.deferral import DeferralRule
from ee_scale.palettes.intervals import Scores, interval

FIT_SHARE, TEST_SHARE = 0.25, 0.5  # the rest checks
PATH_POINTS = 100


@dataclass(frozen=True)
class Pairs:
    """What both models made of n records.

    Attributes:
        scores: [n] fp64, 0 to 1: how sure the small model is.
        small, large: [n] fp64: quality of their answers, 0 or 1.
        tags: [n], the group of each; None: it has none.
    """

    scores: np.ndarray
    small: np.ndarray
    large: np.ndarray
    tags: Sequence[str | None]

    def take(self, index: np.ndarray) -> "Pairs":
        """Some of them."""
        return Pairs(self.scores[index], self.small[index], self.large[index], [self.tags[i] for i in index])

    def of(self, tag: str) -> "Pairs":
        """Those of a group."""
        return self.take(np.array([i for i, own in enumerate(self.tags) if own == tag], dtype=int))

    def harm(self, limit: float | None) -> np.ndarray:
        """[n]: quality that is lost, against the large model's answer, where scores of at least `limit` are kept."""
        kept = np.zeros(len(self.scores), bool) if limit is None else self.scores >= limit
        return np.where(kept, self.large - self.small, 0.0)

    def parts(self, seed: int) -> tuple["Pairs", "Pairs", "Pairs"]:
        """Those that fit, test and check."""
        order = np.random.default_rng(seed).permutation(len(self.scores))
        first, second = round(FIT_SHARE * len(order)), round((FIT_SHARE + TEST_SHARE) * len(order))
        return self.take(order[:first]), self.take(order[first:second]), self.take(order[second:])


@dataclass(frozen=True)
class Point:
    """Deferred answering with one limit, on some records.

    Attributes:
        asked: share of the records for which the large model is asked.
        quality: of all answers; loss: by how much the large model's are better, with bounds of 95% (None: one record).
        worse, better: records whose answer is kept and worse, or better, than the large model's.
    """

    limit: float | None
    asked: float
    quality: float
    loss: float
    loss_range: tuple[float, float] | None
    worse: int
    better: int

    @classmethod
    def of(cls, pairs: Pairs, limit: float | None) -> "Point":
        """Measured; there is at least one record."""
        harm = pairs.harm(limit)
        asked = 1.0 if limit is None else float((pairs.scores < limit).mean())
        spread = interval(Scores(torch.from_numpy(harm), torch.ones(len(harm), dtype=torch.float64)))
        quality = float((pairs.large - harm).mean())
        return cls(limit, asked, quality, float(harm.mean()), spread, int((harm > 0).sum()), int((harm < 0).sum()))


@dataclass(frozen=True)
class Group:
    """What was found for all records, or those of one tag.

    Attributes:
        limit: scores from there on are kept; None: the large model is always asked. own: shown on its own records.
        verdict: of the testing records, on that limit or the first that failed; None: they are too few to say anything.
        tested: their number. check: on the third part, like all that follows.
        small, large: quality of either alone.
        auroc: None: the small model is always right, or never. ece_score: of the score as it is; ece: after the map.
    """

    limit: float | None
    own: bool
    verdict: Verdict | None
    tested: int
    check: Point
    small: float
    large: float
    auroc: float | None
    ece_score: float
    ece: float


@dataclass(frozen=True)
class Deferral:
    """What `ee-scale defer` found.

    Attributes:
        rule: as it is stored. found: for all records; by_tag: for those of each tag.
        curve: every candidate on the records that check, from always to never asking the large model; checked: those.
        small_ms, large_ms: time of an answer; link_ms, cost: of a call of the large model, on the way and in money.
    """

    rule: DeferralRule
    error_map: ErrorMap
    records: int
    found: Group
    by_tag: dict[str, Group]
    curve: list[Point]
    checked: Pairs
    small_ms: float
    large_ms: float
    link_ms: float
    cost: float

    def latency(self, asked: float) -> float:
        """Mean milliseconds of an answer where the large model is asked for this share."""
        return self.small_ms + asked * (self.link_ms + self.large_ms)


def records_needed(loss: float, confidence: float) -> int:
    """Records without which no limit can be shown to lose at most so much."""
    return ceil(units_needed(loss, confidence) / TEST_SHARE)


def check_size(records: int, loss: float, confidence: float) -> None:
    """Raise `UserError` if nothing could be shown with so many records."""
    if records < (needed := records_needed(loss, confidence)):
        raise UserError(
            f"data: loss={loss:g} at confidence={confidence:g} needs at least {needed} records, even if the small "
            f"model is never worse; here are {records}, so no limit can be named: give more records, or a larger loss"
        )


def find_limit(fit: Pairs, test: Pairs, loss: float, confidence: float) -> tuple[float | None, Verdict]:
    """The limit that keeps most among those shown to lose at most `loss`, and what the testing records say of it.

    None if nothing could be shown: then of the safest candidate.
    """
    path = limit_path(fit.scores)
    limit, shown = None, None
    verdicts = fixed_sequence(((fit.harm(own), test.harm(own)) for own in path), loss, confidence)
    for own, verdict in zip(path, verdicts, strict=False):
        if verdict.holds:
            limit, shown = own, verdict
    return limit, shown or verdict


def limit_path(scores: np.ndarray) -> list[float]:
    """Candidates from the one that keeps least, of scores [n], to the one that keeps all: 0."""
    shares = np.arange(1, PATH_POINTS) / PATH_POINTS
    limits = np.unique(np.quantile(scores, 1 - shares, method="higher"))
    return [*limits[limits > 0][::-1].tolist(), 0.0]


def find_groups(
    pairs: Pairs, loss: float, confidence: float, seed: int
) -> tuple[ErrorMap, Group, dict[str, Group], Pairs]:
    """The map, what was found for all and per tag, and the records that check. Raises `UserError` for too few records.

    A tag with too few records of its own to show anything gets the limit of all.
    """
    check_size(len(pairs.scores), loss, confidence)
    fit, test, check = pairs.parts(seed)
    error_map = ErrorMap.fitted(fit.scores, 1 - fit.small)
    limit, verdict = find_limit(fit, test, loss, confidence)
    groups, needed = {}, units_needed(loss, confidence)
    for tag in sorted({tag for tag in check.tags if tag is not None}):
        own_fit, own_test, own_check = (part.of(tag) for part in (fit, test, check))
        if len(own_test.scores) < needed or not len(own_fit.scores):
            groups[tag] = _group(limit, None, own_test, own_check, error_map)
        else:
            groups[tag] = _group(*find_limit(own_fit, own_test, loss, confidence), own_test, own_check, error_map)
    return error_map, _group(limit, verdict, test, check, error_map), groups, check


def _group(limit: float | None, verdict: Verdict | None, test: Pairs, check: Pairs, error_map: ErrorMap) -> Group:
    return Group(
        limit,
        verdict is not None,
        verdict,
        len(test.scores),
        Point.of(check, limit),
        float(check.small.mean()),
        float(check.large.mean()),
        auroc(check.scores, check.small),
        calibration_error(check.scores, check.small),
        calibration_error(1 - error_map(check.scores), check.small),
    )
