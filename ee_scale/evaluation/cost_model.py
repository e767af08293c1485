"""What early exits can gain on a machine whose layer and head times are known: bounds, needs, leaving early. No torch.

The notation is that of `modeling.costs`.
"""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from ee_scale.modeling.costs import MAX_DRAFT, Costs, best_draft_length, expected_tokens


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


def flat_costs(num_layers: int, head: float, check: float, more_rows: float = 1.0) -> Costs:
    """Costs in layers of a machine where a pass over any 2 or more rows takes `more_rows` times a pass over one."""
    rows = {1: 1.0, 2: more_rows, 3: more_rows}
    return Costs(num_layers, rows, {n: head * t for n, t in rows.items()}, dict.fromkeys(range(1, num_layers), check))
