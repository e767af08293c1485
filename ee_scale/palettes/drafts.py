"""Small sizes as draft models of large ones: what drafting brings. Plain arithmetic on texts and measured times.

In a cycle the drafter writes g tokens, one after another, and the target reads them in one forward of g + 1 rows. It
keeps those up to the first that it rejects, and writes one token itself. Its output stays what it was, token by token
(greedy) or in distribution: Leviathan, Kalman and Matias, Fast Inference from Transformers via Speculative Decoding,
arXiv 2211.17192. With N tokens per cycle, t the drafter's time of a token and T(n) the target's of n rows,

    speed-up(g) = N(g) T(1) / (g t + T(g + 1)).

The paper has N(g) = (1 - a^(g + 1)) / (1 - a), for drafts that are accepted with chance a whatever came before. Here N
is counted on texts that the target wrote, as easy and hard passages come in stretches. It takes one forward of each
model: behind such a text's prefix a draft is accepted with chance 1 or 0 (greedy: it is the text's token or not), or
min(1, q / p) of the text's token (sampling: text and acceptance then have the joint law of the algorithm).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch

from ee_scale.modeling.costs import MAX_DRAFT, Costs, DraftCost
from ee_scale.palettes.intervals import Interval, Scores, interval
from ee_scale.reading import whole

VERIFIED = (2, 4, 8, MAX_DRAFT + 1)  # rows of the forwards that are timed; between them time is taken as linear


@whole
@dataclass(frozen=True)
class Drafting:
    """A drafter under greedy decoding or sampling. Intervals: 95%, by how much texts differ; None: of one text.

    Attributes:
        acceptance: mean chance that a draft is accepted, over all positions of the texts.
        drafts: per cycle, at the highest speed; tokens: that a cycle then brings, the target's own included.
        speedup: of the target with the drafter over the target alone; below 1: the drafter makes it slower.
    """

    acceptance: float
    acceptance_interval: Interval | None
    drafts: int
    tokens: float
    speedup: float
    speedup_interval: Interval | None

    @property
    def pays(self) -> bool:
        """Whether it is faster for sure, as far as the texts can tell."""
        return (self.speedup if self.speedup_interval is None else self.speedup_interval[0]) > 1


@whole
@dataclass(frozen=True)
class DraftPair:
    """A size and a smaller one that drafts for it.

    Attributes:
        target, drafter: their folders.
        cost: time of one draft over that of one token of the target.
    """

    target: str
    drafter: str
    cost: float
    greedy: Drafting
    sampled: Drafting


@whole
@dataclass(frozen=True)
class Drafts:
    """All pairs, the fastest (greedy) first.

    Attributes:
        texts: that each target wrote, greedily, and again sampled; tokens: of each at most.
        full: folder of the full model.
    """

    texts: int
    tokens: int
    full: str
    pairs: list[DraftPair]


@dataclass(frozen=True)
class DraftedText:
    """A text that the target wrote, seen by a drafter.

    Attributes:
        chances: of each of its tokens, to be accepted as a draft.
        expected: the same before the token is known: sum_x min(p(x), q(x)).
        ended: by an end token, and not because it was long enough.
    """

    chances: list[float]
    expected: list[float]
    ended: bool


def cycles(text: DraftedText, drafts: int) -> tuple[float, float]:
    """(tokens, cycles) that are expected of a text. A cycle counts if its last row lies in the text, or the text ended:
    what a longer text would have brought is not known."""
    length, tokens, count = len(text.chances), 0.0, 0.0
    begins = [1.0] + [0.0] * (length + drafts)  # chance that a cycle begins at a token
    for start in range(length if text.ended else length - drafts):
        kept, brought = begins[start], 0.0
        for place in range(start, min(start + drafts, length - 1) + 1):
            accepted = text.chances[place] if place < start + drafts else 0.0  # the last token is the target's own
            brought += kept
            begins[place + 1] += kept * (1 - accepted)
            kept *= accepted
        tokens, count = tokens + brought, count + begins[start]
    return tokens, count


def foretold(texts: Sequence[DraftedText], costs: Costs, token_ms: float) -> Drafting:
    """The number of drafts with the highest speed. costs: of the target (as one layer), in ms; token_ms: the drafter's.

    One text at least must be longer than a draft, or have ended.
    """
    expected = [(sum(text.expected), float(len(text.expected))) for text in texts]
    acceptance, found = _scores(expected), list[Drafting]()
    for drafts in range(1, MAX_DRAFT + 1):
        scores = _scores([cycles(text, drafts) for text in texts])
        if not scores.counts.sum():
            break
        gain, span = costs.step / costs.drafting(DraftCost(token_ms), drafts), _within(scores, 1, drafts + 1)
        speed_span = None if span is None else (gain * span[0], gain * span[1])
        told = acceptance.mean, _within(acceptance, 0, 1), drafts, scores.mean, gain * scores.mean, speed_span
        found.append(Drafting(*told))
    return max(found, key=lambda drafting: drafting.speedup)  # the first of equals: fewer drafts


def whole_costs(token_ms: float, verify_ms: Sequence[tuple[int, float]]) -> Costs:
    """A whole model as one layer: rows -> ms. No number of rows takes longer than more of them: that is noise."""
    least, times = inf, dict[int, float]()
    for rows, ms in sorted([(1, token_ms), *verify_ms], reverse=True):
        times[rows] = least = min(least, ms)
    return Costs(1, times, {1: 0.0}, {})


def _within(scores: Scores, least: float, most: float) -> Interval | None:
    """The interval, without values that there cannot be."""
    span = interval(scores)
    return None if span is None else (max(span[0], least), min(span[1], most))


def _scores(pairs: Sequence[tuple[float, float]]) -> Scores:
    sums, counts = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    return Scores(sums, counts)
