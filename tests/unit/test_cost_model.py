"""The cost model against tables worked out independently, and against a simulation of decoding token by token."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from ee_scale.evaluation.cost_model import (
    acceptance_of,
    flat_costs,
    ideal_stop_speedup,
    needed_acceptance,
    threshold_speedup,
    upper_bound,
)
from ee_scale.modeling.costs import Costs, best_draft_length, expected_tokens, lossless_speedup

ACCEPTANCES = (0.6, 0.7, 0.8, 0.9, 0.95)
# Speed @ best draft length by share of the depth; one row per exit at 1/8, 1/4, 3/8, 1/2 of the layers.
TABLES = {
    "free heads": (
        flat_costs(8, 0, 0),
        "1.58@3 1.85@4 2.27@5 3.07@9 3.90@13",
        "1.31@2 1.46@2 1.69@3 2.09@6 2.47@9",
        "1.16@1 1.25@2 1.39@2 1.64@4 1.86@7",
        "1.07@1 1.13@1 1.22@2 1.38@3 1.51@5",
    ),
    "8B, full head": (
        flat_costs(32, 2.41, 2.41),
        "1.43@2 1.62@3 1.93@4 2.47@7 3.01@11",
        "1.23@1 1.36@2 1.55@3 1.86@5 2.16@8",
        "1.13@1 1.20@1 1.33@2 1.53@4 1.72@6",
        "1.04@1 1.11@1 1.18@2 1.32@3 1.44@5",
    ),
    "0.5B, full head": (
        flat_costs(24, 9.1, 9.1),
        "1.17@1 1.27@2 1.41@2 1.66@4 1.89@7",
        "1.10@1 1.17@1 1.28@2 1.45@3 1.61@5",
        "1.03@1 1.10@1 1.17@2 1.30@3 1.42@4",
        "1.00@0 1.04@1 1.10@1 1.19@2 1.27@4",
    ),
    "0.5B on a CPU, full head": (
        flat_costs(24, 6.4, 6.4, more_rows=1.6),
        "1.00@0 1.03@3 1.21@4 1.54@7 1.86@10",
        "1.00@0 1.00@0 1.09@3 1.33@5 1.56@8",
        "1.00@0 1.00@0 1.00@3 1.19@4 1.35@7",
        "1.00@0 1.00@0 1.00@0 1.08@4 1.21@6",
    ),
    "0.5B on a CPU, shortlist": (
        flat_costs(24, 6.4, 0.6, more_rows=1.6),
        "1.15@3 1.38@5 1.76@7 2.52@11 3.39@17",
        "1.02@2 1.19@3 1.44@5 1.90@8 2.38@12",
        "1.00@0 1.07@3 1.25@4 1.57@6 1.88@10",
        "1.00@0 1.00@0 1.13@3 1.36@5 1.58@8",
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_speed_at_the_best_draft_length(name: str):
    costs, *rows = TABLES[name]
    for eighths, row in enumerate(rows, start=1):
        best = [best_draft_length(costs, costs.num_layers * eighths // 8, a, longest=24) for a in ACCEPTANCES]
        assert " ".join(f"{speed:.2f}@{gamma}" for gamma, speed in best) == row


@pytest.mark.parametrize(
    ("speed", "needed"),
    [
        (1.5, [0.525, 0.561, 0.595, 0.662, 0.723, 0.777, 0.850, 0.873, 0.946]),
        (2.0, [0.705, 0.741, 0.775, 0.834, 0.883, 0.925, 0.970, 0.981, None]),
        (2.33, [0.777, 0.811, 0.842, 0.894, 0.935, 0.966, 0.994, 0.998, None]),
    ],
)
def test_smallest_acceptance_for_a_speed(speed: float, needed: list[float | None]):
    costs = flat_costs(200, 0, 0)
    for c, expected in zip((0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.375, 0.4, 0.5), needed, strict=True):
        found = needed_acceptance(costs, round(200 * c), speed)
        assert found is None if expected is None else found == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(
    ("acceptance", "k", "speed"), [(0.8, 1, 2.57), (0.8, 2, 1.90), (0.9, 2, 2.41), (0.7, 2, 1.61), (0.761, 1, 2.33)]
)
def test_ideal_stop_rule(acceptance: float, k: int, speed: float):
    costs = flat_costs(8, 0, 0)
    found = ideal_stop_speedup(costs, k, acceptance, longest=32)
    assert found == pytest.approx(speed, abs=0.015)
    assert best_draft_length(costs, k, acceptance)[1] < found < upper_bound(costs, k)


def test_stop_rule_never_loses():
    costs = flat_costs(24, 6.4, 6.4, more_rows=1.6)
    assert ideal_stop_speedup(costs, 12, 0.3) == 1.0
    for acceptance in (0.0, 1.0):
        assert ideal_stop_speedup(costs, 3, acceptance) == best_draft_length(costs, 3, acceptance)[1]


def test_a_cycle_by_hand():
    costs = Costs(num_layers=4, layer={1: 2.0, 3: 5.0}, head={1: 1.0, 2: 1.5}, checks={1: 0.5, 2: 0.75})
    assert costs.step == 4 * 2 + 1
    assert costs.head_layers == 0.5
    assert costs.draft_cost(2) == (2 * 2 + 0.75) / 9
    # Three early passes, two exits, two deep layers on three rows, the final head on three rows (extrapolated).
    assert costs.cycle(2, 2) == 3 * 2 * 2 + 2 * 0.75 + 2 * 5 + 2.0
    assert costs.layers(1, 2) == 3.5
    assert costs.layers(1, 5) == 8.0
    assert lossless_speedup(costs, 2, 0.5, 2) == pytest.approx(1.75 * 9 / 25.5)
    assert expected_tokens(1.0, 3) == 4
    assert lossless_speedup(costs, 2, 0.5, 0) == 1.0


def test_no_acceptance_passes_the_bound():
    costs = flat_costs(12, 1.0, 2.0)
    for k in (1, 3, 6, 9):
        assert lossless_speedup(costs, k, 1.0, 2000) == pytest.approx(upper_bound(costs, k), rel=2e-3)


@pytest.mark.parametrize("max_pending", [0, 1, 8])
@pytest.mark.parametrize("shares", [{3: 0.6}, {3: 0.3, 6: 0.4}, {3: 0.0, 9: 1.0}, {}])
def test_threshold_speed_is_that_of_a_simulation(shares: dict[int, float], max_pending: int):
    """Tokens draw their depth; each stretch of layers runs when a token passes it or its own block is full."""
    costs = Costs(12, {1: 1.0, 2: 1.5, 16: 3.0}, {1: 2.0}, {3: 0.4, 6: 0.3, 9: 0.2})
    costs = replace(costs, checks={k: costs.checks[k] for k in shares})
    bounds, tokens = [0, *shares, 12], 20_000
    chances = [*shares.values(), 1 - sum(shares.values())]
    depths = np.random.default_rng(1).choice([*shares, 12], size=tokens, p=chances)
    waiting, time = [0] * (len(bounds) - 1), 0.0
    for depth in depths:
        time += sum(check for k, check in costs.checks.items() if k <= depth) + (2.0 if depth == 12 else 0.0)
        for i, (start, stop) in enumerate(pairwise(bounds)):
            waiting[i] += 1
            if depth > start or waiting[i] > max_pending:
                time += (stop - start) * costs.layers(1, waiting[i])
                waiting[i] = 0
    assert threshold_speedup(costs, shares, max_pending) == pytest.approx(costs.step * tokens / time, rel=0.01)


def test_acceptance_from_tokens_per_cycle():
    """Drafts accepted one after the other until the first rejection, counted as decoding counts them."""
    kept = np.random.default_rng(2).random((50_000, 4)) < 0.7
    tokens = 1 + np.cumprod(kept, axis=1).sum(axis=1).mean()
    assert acceptance_of(tokens, 4) == pytest.approx(0.7, abs=0.005)
    assert acceptance_of(1.0, 3) == pytest.approx(0.0, abs=1e-9)
    assert acceptance_of(4.0, 3) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="give 1 to 4"):
        acceptance_of(4.5, 3)
