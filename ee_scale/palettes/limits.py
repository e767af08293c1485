"""Hard limits on what a subnet costs: what they are called, whether they are kept, and the words where they are not."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from ee_scale.elastic.subnet import SubnetSpec
from ee_scale.errors import UserError

Limits = Mapping[str, float]  # name of a cost -> largest value that is allowed; costs without a limit are left out


@dataclass(frozen=True)
class Cost:
    """How a cost is spoken of: 'no subnet is that <small>; the <smallest>, NAME, <has> 3,000<unit>'."""

    adjective: str
    superlative: str
    verb: str
    unit: str = ""


COSTS = {
    "params": Cost("small", "smallest", "has"),
    "flops": Cost("cheap", "cheapest", "needs"),
    "latency_ms": Cost("fast", "fastest", "takes", " ms"),
    "memory_mb": Cost("lean", "leanest", "needs", " MB"),
}


def check_limits(limits: Limits) -> None:
    """Raises `UserError` for an unknown name and for a value that is not above 0."""
    for name, limit in limits.items():
        if name not in COSTS:
            raise UserError(f"max_{name}={limit}: no such limit; known: {', '.join(f'max_{cost}' for cost in COSTS)}")
        if not 0 < limit < inf:
            raise UserError(f"max_{name}={limit}: give a number above 0")


def excess(costs: Mapping[str, float], limits: Limits) -> list[float]:
    """By which share each limit is exceeded; 0 or less where it is kept."""
    return [_sortable(costs[name]) / limit - 1 for name, limit in limits.items()]


def keeps(costs: Mapping[str, float], limits: Limits) -> bool:
    """Whether all limits are kept; a NaN keeps none."""
    return all(costs[name] <= limit for name, limit in limits.items())


def nearest_miss(seen: Mapping[SubnetSpec, Mapping[str, float]], limits: Limits) -> str:
    """Which limits no subnet of `seen` (costs by name) meets, the subnet that comes closest, and by how much it misses.

    Where each limit can be met but not all together, it names those that the closest subnet breaks.
    """
    clauses = []
    for name, limit in limits.items():
        spec = min(seen, key=lambda spec: _sortable(seen[spec][name]))
        if not seen[spec][name] <= limit:
            words = COSTS[name]
            clauses.append(
                f"{_limit(name, limit)}: no subnet is that {words.adjective}; the {words.superlative}, {spec.name}, "
                f"{words.verb} {_by_how_much(name, seen[spec][name], limit)}"
            )
    if clauses:
        return "; ".join(clauses)
    spec = min(seen, key=lambda spec: max(excess(seen[spec], limits)))
    broken = [
        f"max_{name} ({COSTS[name].verb} {_by_how_much(name, seen[spec][name], limit)})"
        for name, limit in limits.items()
        if not seen[spec][name] <= limit
    ]
    together = " and ".join(_limit(name, limit) for name, limit in limits.items())
    return f"{together}: no subnet meets them together; the nearest, {spec.name}, misses {' and '.join(broken)}"


def number(value: float) -> str:
    """For people: '3,001,344', '2.06', '50'."""
    return f"{value:,.0f}" if value >= 100 or float(value).is_integer() else f"{value:.3g}"


def _limit(name: str, limit: float) -> str:
    return f"max_{name}={number(limit)}"


def _by_how_much(name: str, value: float, limit: float) -> str:
    over = f"{value / limit - 1:.1%} over" if value < 2 * limit else f"{value / limit:,.1f} times the limit"
    return f"{number(value)}{COSTS[name].unit} ({over})"


def _sortable(cost: float) -> float:
    return cost if cost == cost else inf  # a NaN keeps no limit
