"""Limits for leaving early whose risk is bounded with a known confidence: Learn-then-Test, as in CALM.

CALM (arXiv 2207.07061) tests one global threshold per candidate, from the safest on, and stops at the first that cannot
be shown to hold the bound (fixed-sequence testing; Learn then Test, arXiv 2110.01052): all before it hold it together
with the wanted confidence. Here a candidate is a row of limits, one per exit, and the candidates are chosen on units of
text that the test never sees. The p-values are 1 / (the largest wealth of a bet against the null hypothesis)
(Waudby-Smith and Ramdas, arXiv 2010.09686): valid for any number of units and any distribution of a risk that is at
most 1. The tokens of a unit may depend on one another in any way; units are taken as drawn independently.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil, log, log1p
from typing import NamedTuple

import numpy as np
import torch

from ee_scale.errors import UserError
from ee_scale.evaluation.records import Outcome, Records, outcome, simulate
from ee_scale.modeling.policies import NEVER, SCORES, ExitPolicy

PATH_POINTS = 100
LEARN_SHARE = 0.25  # of the units choose the candidates, the others test them
MIN_SHARE = 0.01  # an exit that fewer tokens take costs more (its head runs on every token) than it saves
MAX_BET = 0.95  # of the bet at which one unit of risk 1 would end all
LOSS_CAP = 1.0  # nats per token: a unit whose mean loss grows by more counts as this much
SHORTLIST_SIZE = 16_384

Limits = tuple[float | None, ...]  # per exit; None: never leave there


@dataclass(frozen=True)
class Goal:
    """What must hold. Exactly one of the bounds is given.

    Attributes:
        policy: `threshold`, `entropy` or `margin`.
        agreement: smallest share of tokens that are the whole model's choice.
        loss_increase: largest mean increase of the loss, nats per token.
        confidence: chance, over the choice of the units, that the statement is true.
        unit_tokens: tokens of a full unit: smaller ones weigh less, so that every token weighs the same; 0: every unit
            weighs the same.
    """

    policy: str = "threshold"
    agreement: float | None = None
    loss_increase: float | None = None
    confidence: float = 0.95
    unit_tokens: int = 0

    def __post_init__(self) -> None:
        """Raises `UserError` for numbers that make no statement."""
        if self.policy not in NEVER:
            raise UserError(f"policy={self.policy}: choose one of {', '.join(NEVER)}")
        if (self.agreement is None) == (self.loss_increase is None):
            given = f"agreement={self.agreement} and loss_increase={self.loss_increase}"
            raise UserError(f"{given}: give exactly one of them")
        if self.agreement is not None and not 0 < self.agreement < 1:
            raise UserError(f"agreement={self.agreement}: must be above 0 and below 1")
        if self.loss_increase is not None and not 0 < self.loss_increase < LOSS_CAP:
            raise UserError(
                f"loss_increase={self.loss_increase}: must be above 0 and below {LOSS_CAP:g} nats per token"
            )
        if not 0 < self.confidence < 1:
            raise UserError(f"confidence={self.confidence}: must be above 0 and below 1")

    @property
    def bound(self) -> float:
        """The largest mean risk; risks are at most 1."""
        return 1 - self.agreement if self.agreement is not None else self.loss_increase / LOSS_CAP

    def harm(self, result: Outcome, final_losses: torch.Tensor) -> torch.Tensor:
        """What leaving early did to each token, fp64 [N]: its mean over a unit is (up to the cap) the unit's risk."""
        if self.agreement is not None:
            return (~result.match).double()
        return (result.losses.double() - final_losses.double()) / LOSS_CAP

    def unit_risks(self, harm: torch.Tensor, units: torch.Tensor, num_units: int) -> np.ndarray:
        """harm [N] -> fp64 [U], at most 1, whose expectation is within the bound exactly if the statement holds.

        A unit of weight w and risk r counts as w r + (1 - w) bound: the mean of w (r - bound) then decides, which is
        the risk of the average token.
        """
        sizes = np.bincount(units, minlength=num_units)
        risks = np.minimum(1, np.bincount(units, harm, minlength=num_units) / sizes)
        return self._weighted(risks, sizes)

    def check_size(self, sizes: np.ndarray) -> None:
        """Raise `UserError` if nothing could be shown with units of these sizes [U] (tokens) and exits never wrong."""
        tested = sizes[round(LEARN_SHARE * len(sizes)) :]
        best = self._weighted(np.zeros(len(tested)), tested)
        if len(sizes) < 2 or betting_p_value(best, self.bound, prior=np.zeros(1)) > 1 - self.confidence:
            wanted = f"loss_increase={self.loss_increase}" if self.agreement is None else f"agreement={self.agreement}"
            kind = f"windows of {self.unit_tokens} tokens" if self.unit_tokens else "documents"
            raise UserError(
                f"data: {wanted} at confidence={self.confidence} needs at least {self._units_needed()} {kind}, even if "
                f"exits are never wrong; here are {int(sizes.sum())} tokens in {len(sizes)}: give more text, or a "
                "smaller seq_length"
            )

    def _weighted(self, risks: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        weights = np.minimum(1, sizes / self.unit_tokens) if self.unit_tokens else np.ones(len(sizes))
        return weights * risks + (1 - weights) * self.bound

    def _units_needed(self) -> int:
        return ceil(units_needed(self.bound, self.confidence) / (1 - LEARN_SHARE))


@dataclass(frozen=True)
class Calibrated:
    """What was found.

    Attributes:
        limits: per exit of the model, None is never; all None: nothing could be shown to hold.
        risk: the mean risk seen on the testing units (in units of the bound); p_value: of the null hypothesis that the
            limits break the bound; both of the first candidate that failed if nothing was shown.
        match_rate, loss_increase, mean_depth: seen on the testing units, per token, with these limits.
        shares, agreements: per exit, the share of the testing tokens that leave there, and the share of those that are
            the whole model's choice (None where no token leaves).
        units, tokens: of the testing part and the learning part together; tested_units: of the testing part.
    """

    limits: Limits
    risk: float
    p_value: float
    match_rate: float
    loss_increase: float
    mean_depth: float
    shares: tuple[float, ...]
    agreements: tuple[float | None, ...]
    units: int
    tested_units: int
    tokens: int

    @property
    def certified(self) -> bool:
        """Whether some exit may be taken."""
        return any(limit is not None for limit in self.limits)


def calibrate(records: Records, goal: Goal, seed: int = 0) -> Calibrated:
    """The limits with the smallest mean depth among those that are shown to hold `goal`.

    Raises `UserError` if there are too few units to show anything.
    """
    goal.check_size(np.bincount(records.units))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(records.tags)))
    cut = max(1, round(LEARN_SHARE * len(order)))
    learn, test = records.take(order[:cut]), records.take(order[cut:])
    best: Limits = (None,) * len(records.layers)
    best_depth, shown = float(records.num_layers), Verdict(0.0, 0.0, holds=True)
    path = threshold_path(learn, goal)
    risks = ((_risks(learn, goal, limits), _risks(test, goal, limits)) for limits in path)
    for limits, tested in zip(path, fixed_sequence(risks, goal.bound, goal.confidence), strict=False):
        if not tested.holds:
            shown = tested if best_depth == records.num_layers else shown
        elif (depth := float(_leave(test, goal, limits).layers.double().mean())) < best_depth:
            best, best_depth, shown = limits, depth, tested
    return _described(records, test, goal, best, shown.risk, shown.p_value)


class Verdict(NamedTuple):
    """What the testing units say of a candidate: their mean risk, the p-value, and whether it is shown to hold."""

    risk: float
    p_value: float
    holds: bool


def fixed_sequence(
    risks: Iterable[tuple[np.ndarray, np.ndarray]], bound: float, confidence: float
) -> Iterator[Verdict]:
    """Test candidates from the safest on; the first that cannot be shown to hold the bound comes last.

    risks: of each candidate, those of units that chose it [p] and those of the units that test it [n]. All that hold
    do so together with the confidence.
    """
    for prior, own in risks:
        p_value = betting_p_value(own, bound, prior)
        yield Verdict(float(own.mean()), p_value, p_value <= 1 - confidence)
        if p_value > 1 - confidence:
            return


def units_needed(bound: float, confidence: float) -> int:
    """Testing units without which nothing can be shown, even if every risk is 0."""
    gain = log1p(MAX_BET * bound / (1 - bound))
    return ceil(-log(1 - confidence) / gain) + 1


def threshold_path(records: Records, goal: Goal, points: int = PATH_POINTS) -> list[Limits]:
    """Candidates from the safest to the one that leaves at the first exit always.

    Candidate i values the whole model's work on a token at a price that grows with (i / points)^2. Each exit, taken
    alone, gets the limit at which the layers that it saves are worth most more than the harm that it does, or never: so
    an early exit may be wrong more often than a late one, which saves less.
    """
    dearest = records.num_layers / max(1, records.num_layers - records.layers[0])
    curves = []
    for at in range(len(records.layers)):
        result = Outcome(records.matches[at], records.losses[at], records.units)
        harm = goal.harm(result, records.final_losses)
        scores = records.scores[goal.policy][at].double()
        order = torch.argsort(scores if SCORES[goal.policy].low else -scores)
        scores, counts = scores[order], torch.arange(1, len(order) + 1)
        ends = counts >= MIN_SHARE * len(order)
        ends[:-1] &= scores[1:] != scores[:-1]  # tokens with the same score pass together
        curves.append((scores[ends].numpy(), counts[ends].numpy(), harm[order].cumsum(0)[ends].numpy()))
    path: list[Limits] = []
    for i in range(1, points + 1):
        price = dearest * (i / points) ** 2
        saved = [price * (1 - k / records.num_layers) for k in records.layers]
        limits = tuple(_best_limit(*curve, value) for curve, value in zip(curves, saved, strict=True))
        if any(limit is not None for limit in limits) and limits not in path[-1:]:
            path.append(limits)
    return path


def betting_p_value(risks: np.ndarray, bound: float, prior: np.ndarray) -> float:
    """p-value of the null hypothesis E[risk] > bound, for independent risks [n], each at most 1.

    Wealth_t = prod_{i <= t} (1 + bet_i (bound - risk_i)) is a supermartingale under the null hypothesis if bet_i looks
    at nothing but what came before i, so 1 / max_t Wealth_t is a p-value (Ville). The bets are arXiv 2010.09686's
    approximate GRAPA, its running mean and variance started from `prior` [p], risks that are not tested.
    """
    seen = np.concatenate([prior, risks])
    counts = np.arange(1, len(seen) + 1)
    # One made-up value at the bound keeps the variance above 0.
    means = (bound + seen.cumsum()) / (counts + 1)
    variances = (bound**2 + ((seen - means) ** 2).cumsum()) / (counts + 1)
    before = slice(len(prior) - 1, -1)
    gain = bound - means[before]
    bets = np.clip(gain / (variances[before] + gain**2), 0, MAX_BET / (1 - bound))
    wealth = np.log1p(bets * (bound - risks)).cumsum()
    return float(np.exp(-max(0.0, wealth.max())))


def shortlist(records: Records, size: int = SHORTLIST_SIZE) -> list[int]:
    """Token ids by how often the whole model chooses them, most often first (ties: smaller id first)."""
    ids, counts = records.final_tokens.long().unique(return_counts=True)
    return ids[torch.argsort(counts, descending=True, stable=True)][:size].tolist()


def calibrated_layers(records: Records, policy: str, tables: dict[str | None, Limits]) -> torch.Tensor:
    """The layer at which each token leaves, int64 [N], under the limits of its tag (None: of all others)."""
    chosen = simulate(records, limit_policy(records, policy, tables[None]))
    for tag in set(records.tag_names) & set(tables):
        own = simulate(records, limit_policy(records, policy, tables[tag]))
        chosen = torch.where(records.tagged(tag), own, chosen)
    return chosen


def limit_policy(records: Records, name: str, limits: Limits) -> ExitPolicy:
    """The policy with one limit per exit of the records."""
    row = tuple(NEVER[name] if limit is None else limit for limit in limits)
    return ExitPolicy(name, records.layers, (row,))


def _leave(records: Records, goal: Goal, limits: Limits) -> Outcome:
    return outcome(records, simulate(records, limit_policy(records, goal.policy, limits)))


def _risks(records: Records, goal: Goal, limits: Limits) -> np.ndarray:
    harm = goal.harm(_leave(records, goal, limits), records.final_losses)
    return goal.unit_risks(harm, records.units, len(records.tags))


def _best_limit(scores: np.ndarray, counts: np.ndarray, harm: np.ndarray, value: float) -> float | None:
    """The score up to which `value` per token minus the harm done is largest, if that is above 0."""
    gains = counts * value - harm
    best = int(gains.argmax())
    return float(scores[best]) if gains[best] > 0 else None


def _described(records: Records, test: Records, goal: Goal, limits: Limits, risk: float, p_value: float) -> Calibrated:
    result = _leave(test, goal, limits)
    here = [result.layers == k for k in records.layers]
    facts = result.summary()
    increase = float((result.losses.double() - test.final_losses.double()).mean())
    return Calibrated(
        limits,
        risk,
        p_value,
        facts["match_rate"],
        increase,
        facts["mean_depth"],
        tuple(float(mask.double().mean()) for mask in here),
        tuple(float(result.match[mask].double().mean()) if mask.any() else None for mask in here),
        units=len(records.tags),
        tested_units=len(test.tags),
        tokens=len(records.units),
    )
