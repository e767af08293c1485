"""The search on synthetic spaces whose front is known: limits, budget, fronts, and measurements that contradict."""

import warnings
from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise
from math import inf, log, nan, sin

import optuna
import pytest

from ee_scale.elastic.subnet import ElasticShape, SearchSpace, SubnetSpec
from ee_scale.errors import UserError
from ee_scale.palettes import search as module
from ee_scale.palettes.limits import check_limits, keeps, nearest_miss, number
from ee_scale.palettes.search import Candidate, pareto, search, spread, verified


def make_space(steps: int = 4, depth: int = 4, *, groups: bool = True, exits: tuple[int, ...] = ()) -> SearchSpace:
    """`steps` sizes of every width; a smaller depth drops the layers before the last."""
    sizes = tuple(range(steps, 0, -1))
    shape = ElasticShape(16 * steps, steps, 64 * steps, depth, 16, 1, head_dim_is_derived=not groups)
    kept = {k: (*range(k - 1), depth - 1) for k in range(1, depth + 1)}
    widths = tuple(16 * size for size in sizes)
    ffn = tuple(64 * size for size in sizes)
    return SearchSpace(shape, widths, sizes if groups else (), ffn, tuple(range(depth, 0, -1)), kept, exits)


def estimate(spec: SubnetSpec) -> dict[str, float]:
    params = spec.depth * spec.hidden * (64 * spec.groups + 3 * spec.ffn)
    return {"params": params, "latency_ms": 0.1 * spec.depth + params / 1e6, "memory_mb": 5 + params / 1e6}


def quality(spec: SubnetSpec) -> float:
    """Better with size, with axes of different worth, and not smooth; early exits are bad."""
    size = 4 * spec.hidden**-0.5 + 2 * (16 * spec.groups) ** -0.4 + 3 * spec.ffn**-0.4 + spec.depth**-0.8
    wiggle = 0.005 * sin(7 * spec.hidden + 3 * spec.ffn + spec.depth)
    return 2 + size + wiggle + (0.5 if spec.layers == tuple(range(spec.depth)) and spec.depth == 2 else 0)


class Counted:
    """A function that remembers its calls."""

    def __init__(self, function):
        self.function, self.calls = function, Counter()

    def __call__(self, spec: SubnetSpec):
        self.calls[spec] += 1
        return self.function(spec)


def flat(cost: float, loss: float, **costs: float) -> Candidate:
    """A candidate with the given parameters, whose other costs follow them."""
    spec = SubnetSpec(int(cost), 1, 64, (0,))
    return Candidate(spec, loss, {"params": cost, "latency_ms": cost / 10, **costs})


def beats(a: Candidate, b: Candidate, name: str) -> bool:
    pair, other = (a.quality, a.cost(name)), (b.quality, b.cost(name))
    return pair != other and all(x <= y for x, y in zip(pair, other, strict=True))


# --- search


@pytest.mark.parametrize("method", ["auto", "grid", "random", "nsga2"])
@pytest.mark.parametrize("groups", [True, False])
def test_a_small_space_is_evaluated_as_a_whole(method: str, groups: bool) -> None:
    space, asked = make_space(3, 3, groups=groups, exits=(1, 2)), Counted(quality)
    found = search(space, asked, estimate, {}, method=method, trials=100)
    assert {candidate.spec for candidate in found} == set(space.members())
    assert len(found) == (81 if groups else 27) + 2  # the two exits keep other layers than the shrunk depths
    assert set(asked.calls.values()) == {1}
    assert all(candidate.quality == quality(candidate.spec) for candidate in found)
    assert all(candidate.estimates == estimate(candidate.spec) for candidate in found)


@pytest.mark.parametrize("method", ["auto", "random", "nsga2"])
@pytest.mark.parametrize("groups", [True, False])
def test_limits_and_budget_are_kept(method: str, groups: bool) -> None:
    space, limits = make_space(5, 6, groups=groups, exits=(2,)), {"params": 2e5, "latency_ms": 0.6}
    asked, estimated, shares = Counted(quality), Counted(estimate), []
    found = search(space, asked, estimated, limits, method=method, trials=30, progress=shares.append)
    assert len(found) == 30
    assert set(asked.calls) == {candidate.spec for candidate in found}
    assert set(asked.calls.values()) == set(estimated.calls.values()) == {1}
    assert all(keeps(candidate.estimates, limits) for candidate in found)
    assert SubnetSpec(80, 5, 320, (0, 1)) not in asked.calls  # the exit is too large
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_few_that_fit_are_all_evaluated_in_a_larger_space() -> None:
    space, limits = make_space(5, 6), {"params": 3e4}
    fitting = {spec for spec in space.members() if keeps(estimate(spec), limits)}
    assert 5 < len(fitting) < 100 < len(list(space.members()))
    assert {candidate.spec for candidate in search(space, quality, estimate, limits, trials=100)} == fitting


@pytest.mark.parametrize("method", ["random", "nsga2"])
def test_no_trial_is_wasted_where_few_fit(method: str) -> None:
    space, limits = make_space(6, 6), {"params": 3e4}
    count = sum(keeps(estimate(spec), limits) for spec in space.members()) - 1
    assert len(search(space, quality, estimate, limits, method=method, trials=count)) == count


@pytest.mark.parametrize("method", ["random", "nsga2"])
def test_a_seed_decides(method: str) -> None:
    space = make_space(6, 6, exits=(2,))
    first, again, other = (
        search(space, quality, estimate, {"params": 4e5}, method=method, trials=25, seed=seed) for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("method", ["auto", "random"])
def test_full_smallest_and_exits_are_always_tried(method: str) -> None:
    space = make_space(6, 6, exits=(2, 4))
    found = {c.spec for c in search(space, quality, estimate, {}, method=method, trials=20)}
    assert found >= {space.shape.full, space.smallest(), *space.exit_members()}


def hypervolume(front: list[Candidate], largest: float) -> float:
    """Area between a front and a corner that its cheapest member barely beats, in (log params, loss)."""
    volume, loss = 0.0, 6.0
    for candidate in front:
        volume += (log(largest) - log(candidate.cost("params"))) * (loss - candidate.quality)
        loss = candidate.quality
    return volume


@pytest.mark.parametrize("enumerable", [module.ENUMERABLE, 100])
def test_nsga2_beats_random_draws(monkeypatch: pytest.MonkeyPatch, enumerable: int) -> None:
    space, limits, volumes = make_space(8, 8), {"params": 1.5e6}, {}
    best = hypervolume(pareto(search(space, quality, estimate, limits, trials=10**4), "params"), 1.5e6)
    monkeypatch.setattr(module, "ENUMERABLE", enumerable)  # 100: the space is too large to be looked at as a whole
    for method in ("random", "nsga2"):
        runs = [search(space, quality, estimate, limits, method=method, trials=160, seed=seed) for seed in range(8)]
        assert {len(found) for found in runs} == {160}
        assert all(keeps(candidate.estimates, limits) for found in runs for candidate in found)
        volumes[method] = sum(hypervolume(pareto(found, "params"), 1.5e6) for found in runs) / len(runs)
    # Of what random draws miss, at least a fifth is found.
    assert best > volumes["nsga2"] > volumes["random"] + (best - volumes["random"]) / 5


def test_a_corner_of_a_space_too_large_to_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ENUMERABLE", 50)
    space, smallest = make_space(9, 9), make_space(9, 9).smallest()
    limits = {"params": estimate(smallest)["params"]}
    for method in ("random", "nsga2"):
        assert [c.spec for c in search(space, quality, estimate, limits, method=method, trials=5)] == [smallest]
    with pytest.raises(UserError, match=f"the smallest, {smallest.name}, has 4,096"):
        search(space, quality, estimate, {"params": 4095}, trials=5)
    with pytest.raises(UserError, match="method=grid: more than 50 subnets to evaluate, but trials=5"):
        search(space, quality, estimate, {}, method="grid", trials=5)


def test_optuna_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    before = optuna.logging.INFO
    optuna.logging.set_verbosity(before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search(make_space(), quality, estimate, {"params": 1e5}, method="nsga2", trials=15)
    assert capfd.readouterr() == ("", "")
    assert optuna.logging.get_verbosity() == before


@pytest.mark.parametrize("method", ["grid", "nsga2"])
def test_a_subnet_that_diverged_is_no_candidate(method: str) -> None:
    space = make_space()
    found = search(space, lambda s: nan if s.depth > 2 else quality(s), estimate, {}, method=method, trials=1000)
    assert {candidate.spec.depth for candidate in found} == {1, 2}
    few = search(space, lambda s: inf if s.depth > 2 else quality(s), estimate, {}, method="nsga2", trials=40)
    assert {candidate.spec.depth for candidate in few} == {1, 2}
    with pytest.raises(UserError, match="quality: not finite for any of the 40 subnets"):
        search(space, lambda _: nan, estimate, {}, method="nsga2", trials=40)


# --- errors


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (
            {"params": 1000},
            "max_params=1,000: no subnet is that small; the smallest, h16-g1-f64-l1, has 4,096 (4.1 times the limit)",
        ),
        (
            {"latency_ms": 0.1},
            "max_latency_ms=0.1: no subnet is that fast; the fastest, h16-g1-f64-l1, takes 0.104 ms (4.1% over)",
        ),
        (
            {"params": 5000, "memory_mb": 2},
            "max_memory_mb=2: no subnet is that lean; the leanest, h16-g1-f64-l1, needs 5 MB (2.5 times the limit)",
        ),
        (
            {"params": 1000, "memory_mb": 2},
            "max_params=1,000: no subnet is that small; the smallest, h16-g1-f64-l1, has 4,096 (4.1 times the limit); "
            "max_memory_mb=2: no subnet is that lean; the leanest, h16-g1-f64-l1, needs 5 MB (2.5 times the limit)",
        ),
    ],
)
def test_no_subnet_fits(limits: dict[str, float], text: str) -> None:
    asked = Counted(quality)
    with pytest.raises(UserError) as caught:
        search(make_space(), asked, estimate, limits, trials=50)
    assert str(caught.value) == text
    assert not asked.calls


def test_limits_that_cannot_be_met_together() -> None:
    """The wide one is fast but large, the deep one small but slow; the middle misses both by least."""
    wide, middle, deep = (SubnetSpec(size, 1, 64, (0,)) for size in (96, 64, 32))
    seen = {
        wide: {"params": 9000.0, "latency_ms": 1.0},
        middle: {"params": 5500.0, "latency_ms": 2.06},
        deep: {"params": 2000.0, "latency_ms": 9.0},
    }
    both = "max_params=5,000 and max_latency_ms=2: no subnet meets them together; the nearest, h64-g1-f64-l1, misses "
    assert nearest_miss(seen, {"params": 5000, "latency_ms": 2}) == (
        f"{both}max_params (has 5,500 (10.0% over)) and max_latency_ms (takes 2.06 ms (3.0% over))"
    )
    seen[middle]["params"] = 4000.0
    assert nearest_miss(seen, {"params": 5000, "latency_ms": 2}) == f"{both}max_latency_ms (takes 2.06 ms (3.0% over))"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"method": "anneal"}, "method=anneal: choose one of auto, palette, grid, nsga2, random"),
        ({"objective": "joules"}, "objective=joules: choose one of params, flops, latency_ms, memory_mb"),
        ({"trials": 0}, "trials=0: give at least 1"),
        ({"limits": {"weight": 3}}, "max_weight=3: no such limit; known: max_params, max_flops"),
        ({"limits": {"params": -2}}, "max_params=-2: give a number above 0"),
        ({"limits": {"params": nan}}, "max_params=nan: give a number above 0"),
        ({"method": "grid", "trials": 9}, "method=grid: 256 subnets to evaluate, but trials=9; raise trials"),
    ],
)
def test_bad_settings(changes: dict, text: str) -> None:
    settings = {"limits": {}, "trials": 50} | changes
    with pytest.raises(UserError, match=text):
        search(make_space(), quality, estimate, settings.pop("limits"), **settings)


def test_values_without_a_number_keep_no_limit() -> None:
    limits = {"params": 5.0}
    check_limits(limits)
    assert keeps({"params": 5.0}, limits)
    assert not keeps({"params": nan}, limits)
    seen = {SubnetSpec(size, 1, 1, (0,)): {"params": cost} for size, cost in ((1, nan), (2, 6.0), (3, nan))}
    assert nearest_miss(seen, limits).endswith("the smallest, h2-g1-f1-l1, has 6 (20.0% over)")
    with pytest.raises(UserError, match="max_params=5: no subnet"):
        search(make_space(2, 2), quality, lambda _: {"params": nan}, limits)
    assert [number(x) for x in (3_001_344, 999.6, 2.0604, 50, 0.001)] == ["3,001,344", "1,000", "2.06", "50", "0.001"]


# --- fronts


def test_the_front_is_what_none_beats() -> None:
    found = search(make_space(4, 4, exits=(2,)), quality, estimate, {}, trials=1000)
    found += found[:20]
    for objective in ("params", "latency_ms"):
        front = pareto(found, objective)
        left = {(c.cost(objective), c.quality) for c in found if not any(beats(d, c, objective) for d in found)}
        assert [(c.cost(objective), c.quality) for c in front] == sorted(left)
        assert 3 < len(front) < len(found)


def test_equal_ones_are_on_the_front_once() -> None:
    a, b, worse, larger = flat(10, 1.0), flat(11, 1.0, params=10), flat(12, 2.0, params=10), flat(20, 1.0)
    assert pareto([larger, worse, b, a, a], "params") == [a]
    assert pareto([], "params") == []


def test_measured_costs_go_before_estimates() -> None:
    slow = Candidate(SubnetSpec(5, 1, 1, (0,)), 1.0, {"params": 5.0}, {"params": 50.0})
    assert pareto([slow, flat(10, 1.0)], "params") == [flat(10, 1.0)]


def test_spread_is_as_even_as_can_be() -> None:
    costs = [10, 11, 12, 30, 33, 90, 100, 270, 800, 810]
    front = [flat(cost, 10 - index) for index, cost in enumerate(costs)]
    for count in range(2, 10):
        picks = [candidate.cost("params") for candidate in spread(front, count, "params")]
        assert (len(picks), picks[0], picks[-1], picks) == (count, 10, 810, sorted(picks))

        def unevenness(chosen: tuple[float, ...]) -> float:
            return sum((log(b) - log(a)) ** 2 for a, b in pairwise(chosen))

        every = [(10, *middle, 810) for middle in combinations(costs[1:-1], count - 2)]
        assert unevenness(tuple(picks)) == pytest.approx(min(map(unevenness, every)))
    assert [c.cost("params") for c in spread(front, 5, "params")] == [10, 30, 90, 270, 810]
    assert spread(front, 1, "params") == [front[-1]]
    assert spread(front, 10, "params") == spread(front, 99, "params") == front


# --- verified

FRONT = [flat(cost, 5 - log(cost)) for cost in (10, 20, 30, 40, 50, 60, 70, 80)]


def run_verified(count: int, latencies: dict[int, float] | None = None, limit: float = 5.0, **measured: float):
    """`latencies` by parameters; others are measured as estimated. Returns what stands and the order of measurement."""
    order = []

    def measure(candidate: Candidate) -> dict[str, float]:
        order.append(int(candidate.cost("params")))
        own = (latencies or {}).get(order[-1], candidate.estimates["latency_ms"])
        return {"params": candidate.estimates["params"], "latency_ms": own, **measured}

    standing = verified(FRONT, count, measure, {"latency_ms": limit}, "params")
    return [int(candidate.cost("params")) for candidate in standing], order, standing


def test_measurements_that_agree() -> None:
    kept, order, standing = run_verified(3, limit=99)
    assert kept == order == [10, 30, 80]
    assert all(candidate.measured["latency_ms"] == candidate.estimates["latency_ms"] for candidate in standing)
    assert [c.quality for c in standing] == [FRONT[0].quality, FRONT[2].quality, FRONT[7].quality]


def test_one_that_breaks_a_limit_is_replaced_by_its_nearest_cheaper_neighbour() -> None:
    kept, order, standing = run_verified(3, {80: 11.0, 70: 10.5}, limit=10)
    assert order == [10, 30, 80, 70, 60]
    assert kept == [10, 30, 60]
    assert [c.measured["latency_ms"] for c in standing] == [1.0, 3.0, 6.0]


def test_dearer_neighbours_of_a_broken_one_come_last() -> None:
    """40 is nearer to 30 than 20 is, but its estimate is higher than the one that was too low already."""
    kept, order, _ = run_verified(3, {30: 11.0}, limit=10)
    assert order == [10, 30, 80, 20]
    assert kept == [10, 20, 80]
    kept, order, _ = run_verified(3, {30: 11.0, 20: 12.0}, limit=10)
    assert order == [10, 30, 80, 20, 40]
    assert kept == [10, 40, 80]


def test_too_few_are_left() -> None:
    kept, order, _ = run_verified(4, dict.fromkeys(range(30, 90, 10), 6.0), limit=5)
    assert kept == [10, 20]
    assert sorted(order) == [10, 20, 30, 40, 50, 60, 70, 80]
    assert len(run_verified(20, limit=99)[0]) == 8


def test_members_that_others_beat_by_measurement_are_replaced() -> None:
    """By measured latency 30 is slower than the better 80."""
    order = []

    def measure(candidate: Candidate) -> dict[str, float]:
        order.append(int(candidate.estimates["params"]))
        return {"latency_ms": 9.0 if order[-1] == 30 else candidate.estimates["latency_ms"]}

    shares: list[float] = []
    standing = verified(FRONT, 3, measure, {}, "latency_ms", shares.append)
    assert order == [10, 30, 80, 40]
    assert [candidate.cost("params") for candidate in standing] == [10, 40, 80]
    assert shares == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1.0])


def test_nothing_stands() -> None:
    with pytest.raises(UserError) as caught:
        run_verified(3, {cost: 5.0 + cost for cost in range(10, 90, 10)}, limit=5)
    assert str(caught.value) == (
        "max_latency_ms=5: no subnet is that fast; the fastest, h10-g1-f64-l1, takes 15 ms (3.0 times the limit); "
        "by estimate the 8 measured ones kept to it, and none does"
    )


def test_the_sizes_that_the_run_was_told_of() -> None:
    told = replace(make_space(), palette=((64, 2, 128, 3), (48, 4, 64, 2)))
    for method in ("auto", "palette"):
        found = search(told, quality, estimate, {}, method=method, trials=2)
        assert {candidate.spec for candidate in found} == set(told.palette_members())
        assert len(search(told, quality, estimate, {"params": 50_000}, method=method)) == 1
        with pytest.raises(UserError, match="method=palette: 2 subnets to evaluate, but trials=1"):
            search(told, quality, estimate, {}, method=method, trials=1)
    assert len(search(told, quality, estimate, {}, method="random", trials=30)) == 30
    with pytest.raises(UserError, match=r"method=palette: the run has no space\.palette"):
        search(make_space(), quality, estimate, {}, method="palette")
