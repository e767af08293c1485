"""What early exits can gain on a machine whose layer and head times are known. Pure arithmetic, no torch.

Notation: L layers, an exit after k of them, a draft of `gamma` tokens, `acceptance` the chance that one drafted token
is accepted. Speed is relative to ordinary decoding, one token per pass through L layers and the final head.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

MAX_DRAFT = 12  # of a decoding cycle, as in ExitPolicy


@dataclass(frozen=True)
class Costs:
    """Times in one unit, whichever it is (seconds, or layers).

    Attributes:
        layer: rows -> time of one decoder layer on that many positions of one sequence; 1 must be among them. Between
            the rows given, time is taken as linear; past the last one it grows as between the last two.
        head: the same for the final norm and head.
        checks: exit -> time of reading that exit on one position: its modules, its head, the decision.
    """

    num_layers: int
    layer: Mapping[int, float]
    head: Mapping[int, float]
    checks: Mapping[int, float]

    def layers(self, count: int, rows: float = 1) -> float:
        """Time of `count` layers on `rows` positions."""
        return count * _interpolated(self.layer, rows)

    def final_head(self, rows: float = 1) -> float:
        """Time of the final head on `rows` positions."""
        return _interpolated(self.head, rows)

    @property
    def step(self) -> float:
        """Time of one ordinary token: every layer and the final head."""
        return self.layers(self.num_layers) + self.final_head()

    @property
    def head_layers(self) -> float:
        """The final head's time in layers."""
        return self.final_head() / self.layers(1)

    def draft_cost(self, k: int) -> float:
        """c: one draft token at exit k, as a share of an ordinary token."""
        return (self.layers(k) + self.checks[k]) / self.step

    def cycle(self, k: int, gamma: int) -> float:
        """Time of drafting `gamma` tokens at exit k and verifying them.

        Early layers run once more than drafts are read (on the last draft), and verification goes on from there:
        (gamma + 1) k layers on one row, (L - k) layers and the final head on gamma + 1 rows.
        """
        rows = gamma + 1
        draft = self.layers(k * rows) + gamma * self.checks[k]
        return draft + self.layers(self.num_layers - k, rows) + self.final_head(rows)


def expected_tokens(acceptance: float, gamma: int) -> float:
    """Tokens per cycle, 1 + a + ... + a^gamma, when each draft is accepted independently (arXiv 2211.17192)."""
    return sum(acceptance**i for i in range(gamma + 1))


def acceptance_of(tokens_per_cycle: float, gamma: int) -> float:
    """The acceptance that gives this many tokens per cycle. Accepted / drafted is lower: it counts drafts that come
    after a rejected one. Raises ValueError if no acceptance gives it.
    """
    if gamma < 1 or not 1 <= tokens_per_cycle <= gamma + 1:
        raise ValueError(f"{tokens_per_cycle} tokens per cycle: drafts of {gamma} give 1 to {gamma + 1}")
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, gamma) < tokens_per_cycle else (low, middle)
    return high


def lossless_speedup(costs: Costs, k: int, acceptance: float, gamma: int) -> float:
    """Speed of self-speculation with a fixed draft length; gamma = 0 is ordinary decoding."""
    return expected_tokens(acceptance, gamma) * costs.step / costs.cycle(k, gamma)


def best_draft_length(costs: Costs, k: int, acceptance: float, longest: int = MAX_DRAFT) -> tuple[int, float]:
    """The draft length with the highest speed, and that speed (at least 1: gamma = 0 never loses)."""
    speeds = [lossless_speedup(costs, k, acceptance, gamma) for gamma in range(longest + 1)]
    gamma = max(range(longest + 1), key=lambda g: (round(speeds[g], 12), -g))
    return gamma, speeds[gamma]


def ideal_stop_speedup(
    costs: Costs, k: int, acceptance: float, longest: int = MAX_DRAFT, samples: int = 20_000
) -> float:
    """Speed if drafting stopped exactly when it no longer pays: what a stop rule on confidence can reach at most.

    Each draft's own chance of acceptance, Beta(a, 1 - a), is taken as known once it is drafted. Drafting goes on while
    (chance that all drafts so far hold) x (mean acceptance) exceeds the next draft's time at the speed reached.
    """
    if not 0 < acceptance < 1:
        return best_draft_length(costs, k, acceptance, longest)[1]
    chances = np.random.default_rng(0).beta(acceptance, 1 - acceptance, size=(samples, longest))
    held = np.concatenate([np.ones((samples, 1)), np.cumprod(chances, axis=1)], axis=1)
    tokens = np.cumsum(held, axis=1)  # tokens[:, g]: expected tokens of a cycle with g drafts
    times = np.array([costs.cycle(k, gamma) for gamma in range(longest + 1)]) / costs.step
    speed = best_draft_length(costs, k, acceptance, longest)[1]
    for _ in range(50):
        # The first draft is free of the rule: a cycle's fixed extra cost may exceed what one draft can bring.
        pays = held[:, 1:longest] * acceptance > np.diff(times)[1:] * speed
        lengths = 1 + np.cumprod(pays, axis=1).sum(axis=1)
        better = np.take_along_axis(tokens, lengths[:, None], axis=1).mean() / times[lengths].mean()
        if better <= speed * (1 + 1e-6):
            break
        speed = float(better)
    return speed


def upper_bound(costs: Costs, k: int) -> float:
    """1 / c: no acceptance makes self-speculation at exit k faster (with verification for free)."""
    return 1 / costs.draft_cost(k)


def needed_acceptance(costs: Costs, k: int, speed: float, longest: int = 64) -> float | None:
    """The smallest acceptance that reaches `speed` at the best draft length; None: no acceptance below 1 does."""
    low, high = 0.0, 1.0 - 1e-4
    if best_draft_length(costs, k, high, longest)[1] < speed:
        return None
    while high - low > 1e-5:
        middle = (low + high) / 2
        if best_draft_length(costs, k, middle, longest)[1] < speed:
            low = middle
        else:
            high = middle
    return high


def threshold_speedup(costs: Costs, shares: Mapping[int, float], max_pending: int = 8) -> float:
    """Speed of leaving at exits when a threshold is met, one sequence at a time.

    shares: exit looked at -> share of the tokens that leave there; the others go through all layers.
    A token that reaches an exit pays its check. Layers between two exits run only when a token goes deeper; they then
    also get the positions that left before (at most `max_pending`), whose keys and values they still need.
    """
    exits = sorted(shares)
    bounds, going = [0, *exits, costs.num_layers], 1.0
    time = 0.0
    for start, stop in pairwise(bounds):
        time += (stop - start) * _time_per_token(costs, going, max_pending)
        if stop in shares:
            time += going * costs.checks[stop]
            going -= shares[stop]
    # The last term: a pass that a full block forces to the end needs no final head of its own.
    return costs.step / (time + max(going, 0.0) * costs.final_head())


def _time_per_token(costs: Costs, going: float, max_pending: int) -> float:
    """Layer time per token where a share `going` of them runs: gaps between runs are geometric, cut by the cap."""
    going = min(max(going, 0.0), 1.0)
    time = rows = 0.0
    waiting = 1.0  # chance that a run has not come before this many tokens
    for gap in range(1, max_pending + 2):
        chance = waiting if gap == max_pending + 1 else waiting * going
        time, rows = time + chance * costs.layers(1, gap), rows + chance * gap
        waiting -= chance
    return time / rows


def _interpolated(times: Mapping[int, float], rows: float) -> float:
    known = sorted(times)
    if rows in times or len(known) == 1:
        return times[rows] if rows in times else times[known[0]]
    right = min(max(bisect_left(known, rows), 1), len(known) - 1)
    a, b = known[right - 1], known[right]
    slope = (times[b] - times[a]) / (b - a)
    # Noise must not make more rows cheaper past the last measurement.
    return times[b] + max(slope, 0.0) * (rows - b) if rows > b else times[a] + slope * (rows - a)


def flat_costs(num_layers: int, head: float, check: float, more_rows: float = 1.0) -> Costs:
    """Costs in layers of a machine where a pass over any 2 or more rows takes `more_rows` times a pass over one."""
    rows = {1: 1.0, 2: more_rows, 3: more_rows}
    return Costs(num_layers, rows, {n: head * t for n, t in rows.items()}, dict.fromkeys(range(1, num_layers), check))
