"""Which layers and which exits live on which pipeline stage. Arithmetic only."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil, inf

from ee_scale.errors import UserError


@dataclass(frozen=True)
class StagePlan:
    """The cut of a model into stages.

    Attributes:
        bounds: layers in front of each stage and, last, the number of layers: stage s owns layers
            bounds[s] .. bounds[s+1]-1 (counted from 0).
        exit_layers: sorted; an exit at k reads the hidden state after k layers.
        launched: stages that run. Later ones hold no exit and are never started.
        depth: layers that run; those after the deepest exit are not even built.
    """

    bounds: tuple[int, ...]
    exit_layers: tuple[int, ...]
    launched: int
    depth: int

    def layers(self, stage: int) -> range:
        """Layers of a stage that run, counted from 0."""
        return range(self.bounds[stage], min(self.bounds[stage + 1], self.depth))

    def exits(self, stage: int) -> tuple[int, ...]:
        """Exit layers of a stage: the exit at k belongs to the stage of the k-th layer."""
        return tuple(k for k in self.exit_layers if self.bounds[stage] < k <= self.bounds[stage + 1])

    def stage_of(self, k: int) -> int:
        """The stage of the k-th layer."""
        return next(stage for stage, end in enumerate(self.bounds[1:]) if k <= end)

    def is_last(self, stage: int) -> bool:
        """Whether it is the last one that runs."""
        return stage == self.launched - 1


def plan_stages(
    num_layers: int,
    pp: int,
    exit_layers: Sequence[int],
    *,
    given: Sequence[int] | None = None,
    layer_cost: float = 1.0,
    exit_cost: float = 0.0,
    last_cost: float = 0.0,
    whole_model: bool = False,
) -> StagePlan:
    """Cut `num_layers` into `pp` stages and launch those up to the deepest exit.

    Without `given` (layers per stage) the ceil(pp x deepest / num_layers) stages that run are balanced by cost;
    the others share the remaining layers evenly. `whole_model` launches everything (the final layer teaches, or
    trains: `last_cost` is that of its own loss).
    Raises `UserError` naming the numbers.
    """
    if pp > num_layers:
        raise UserError(f"parallel.pp={pp}: more stages than the model's {num_layers} layers")
    exit_layers = tuple(sorted(exit_layers))
    depth = num_layers if whole_model else exit_layers[-1]
    if given is not None:
        bounds = _given_bounds(num_layers, pp, given)
        launched = next(s for s in range(pp) if depth <= bounds[s + 1]) + 1
    else:
        launched = ceil(pp * depth / num_layers)
        costs = [layer_cost + exit_cost * (k in exit_layers) for k in range(1, depth + 1)]
        costs[-1] += last_cost
        bounds = balanced_bounds(costs, launched)
        if launched < pp:
            rest = balanced_bounds([1.0] * (num_layers - depth), pp - launched)
            bounds += tuple(depth + bound for bound in rest[1:])
        bounds = (*bounds[:-1], num_layers)
    return StagePlan(bounds, exit_layers, launched, depth)


def balanced_bounds(costs: Sequence[float], parts: int) -> tuple[int, ...]:
    """Cut a list into contiguous, non-empty parts so that the dearest part is as cheap as possible.

    Own code because DeepSpeed's `partition_balanced` may leave a part empty, which no stage can be.
    """
    prefix = [0.0, *accumulate(costs)]
    n = len(costs)
    best = [[inf] * (n + 1) for _ in range(parts + 1)]
    cut = [[0] * (n + 1) for _ in range(parts + 1)]
    best[0][0] = 0.0
    for part in range(1, parts + 1):
        for end in range(part, n + 1):
            for start in range(part - 1, end):
                cost = max(best[part - 1][start], prefix[end] - prefix[start])
                if cost < best[part][end]:
                    best[part][end], cut[part][end] = cost, start
    bounds = [n]
    for part in range(parts, 0, -1):
        bounds.append(cut[part][bounds[-1]])
    return tuple(reversed(bounds))


def _given_bounds(num_layers: int, pp: int, given: Sequence[int]) -> tuple[int, ...]:
    if len(given) != pp:
        raise UserError(f"parallel.stages={list(given)}: {len(given)} stages, but parallel.pp={pp}")
    if min(given) < 1 or sum(given) != num_layers:
        raise UserError(
            f"parallel.stages={list(given)}: sums to {sum(given)} with a smallest stage of {min(given)}; "
            f"the model has {num_layers} layers and every stage needs one"
        )
    bounds = (0, *accumulate(given))
    assert all(a < b for a, b in pairwise(bounds))
    return bounds
