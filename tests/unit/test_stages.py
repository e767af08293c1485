"""Which layers and exits live on which stage."""

from itertools import combinations, pairwise

import pytest

from ee_scale.backbone.stages import balanced_bounds, plan_stages
from ee_scale.errors import UserError


def dearest(costs: list[float], bounds: tuple[int, ...]) -> float:
    return max(sum(costs[a:b]) for a, b in pairwise(bounds))


@pytest.mark.parametrize("costs", [[1.0] * 5, [1, 1, 1, 9, 1, 1], [5, 1, 1, 1, 1, 5], [3, 2, 2, 2, 3, 1, 1]])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_balance_is_the_best_there_is(costs: list[float], parts: int) -> None:
    bounds = balanced_bounds(costs, parts)
    assert len(bounds) == parts + 1
    assert (bounds[0], bounds[-1]) == (0, len(costs))
    assert all(a < b for a, b in pairwise(bounds))
    every_cut = combinations(range(1, len(costs)), parts - 1)
    assert dearest(costs, bounds) == min(dearest(costs, (0, *cut, len(costs))) for cut in every_cut)


@pytest.mark.parametrize("num_layers", [4, 5, 7, 12])
@pytest.mark.parametrize("pp", [1, 2, 3, 4])
@pytest.mark.parametrize("whole_model", [False, True])
def test_every_plan_is_a_partition(num_layers: int, pp: int, whole_model: bool) -> None:
    for deepest in range(1, num_layers + 1):
        exits = sorted({1, deepest})
        plan = plan_stages(num_layers, pp, exits, whole_model=whole_model, exit_cost=2.5)
        assert plan.depth == (num_layers if whole_model else deepest)
        assert plan.launched == (pp if whole_model else -(-pp * deepest // num_layers))
        running = [layer for stage in range(plan.launched) for layer in plan.layers(stage)]
        assert running == list(range(plan.depth))
        assert all(len(plan.layers(stage)) > 0 for stage in range(plan.launched))
        assert [k for stage in range(plan.launched) for k in plan.exits(stage)] == exits
        for stage in range(plan.launched):
            assert all(k - 1 in plan.layers(stage) for k in plan.exits(stage))
        assert len(plan.bounds) == pp + 1
        assert all(a < b for a, b in pairwise(plan.bounds))


@pytest.mark.parametrize(
    ("deepest", "pp", "launched"), [(8, 4, 1), (9, 4, 2), (16, 4, 2), (24, 4, 3), (25, 4, 4), (32, 4, 4), (8, 8, 2)]
)
def test_later_stages_are_not_launched(deepest: int, pp: int, launched: int) -> None:
    assert plan_stages(32, pp, [4, deepest]).launched == launched
    assert plan_stages(32, pp, [4, deepest], whole_model=True).launched == pp


def test_exits_count_in_the_balance() -> None:
    assert plan_stages(8, 2, [8]).bounds == (0, 4, 8)
    # Layers 7 and 8 carry exits of three layers' cost each: 6 | 2 (6 against 8) beats 4 | 4 (4 against 10).
    assert plan_stages(8, 2, [7, 8], exit_cost=3.0).bounds == (0, 6, 8)


def test_given_stages() -> None:
    plan = plan_stages(8, 3, [2, 5], given=[2, 2, 4])
    assert (plan.bounds, plan.launched, plan.depth) == ((0, 2, 4, 8), 3, 5)
    assert [list(plan.layers(stage)) for stage in range(3)] == [[0, 1], [2, 3], [4]]
    assert [plan.exits(stage) for stage in range(3)] == [(2,), (), (5,)]
    assert plan_stages(8, 3, [2, 4], given=[2, 2, 4]).launched == 2


@pytest.mark.parametrize(
    ("pp", "given", "text"),
    [
        (6, None, "parallel.pp=6: more stages than the model's 5 layers"),
        (2, [2, 2, 1], r"parallel.stages=\[2, 2, 1\]: 3 stages, but parallel.pp=2"),
        (2, [2, 2], r"parallel.stages=\[2, 2\]: sums to 4 .* the model has 5 layers"),
        (2, [5, 0], r"parallel.stages=\[5, 0\]: sums to 5 with a smallest stage of 0"),
    ],
)
def test_errors(pp: int, given: list[int] | None, text: str) -> None:
    with pytest.raises(UserError, match=text):
        plan_stages(5, pp, [5], given=given)
