"""The search for subnets on the front of quality and cost, under hard limits. Knows no model: only callables."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from math import isfinite, log
from random import Random

import optuna
from optuna.distributions import CategoricalDistribution

from ee_scale.elastic.subnet import SearchSpace, SubnetSpec
from ee_scale.errors import UserError
from ee_scale.palettes.limits import COSTS, Limits, check_limits, excess, keeps, nearest_miss

METHODS = ("auto", "palette", "grid", "nsga2", "random")
ENUMERABLE = 10_000  # spaces up to this size are estimated as a whole before the search
PROPOSALS = 20  # for each evaluation: most proposals that may turn out known or outside the limits
SMALLEST_COST = 1e-12  # what has a logarithm


@dataclass(frozen=True)
class Candidate:
    """A subnet with its figures.

    Attributes:
        quality: lower is better, as a loss.
        estimates: every cost by name, before anything was measured.
        measured: what `verified` found; empty until then.
    """

    spec: SubnetSpec
    quality: float
    estimates: Mapping[str, float]
    measured: Mapping[str, float] = field(default_factory=dict)

    def cost(self, name: str) -> float:
        """Measured where it was, else estimated."""
        return self.measured.get(name, self.estimates[name])


def search(
    space: SearchSpace,
    quality: Callable[[SubnetSpec], float],
    estimate: Callable[[SubnetSpec], Mapping[str, float]],
    limits: Limits,
    *,
    method: str = "auto",
    trials: int = 200,
    objective: str = "params",
    seed: int = 0,
    progress: Callable[[float], object] = bool,
) -> list[Candidate]:
    """Subnets within the limits (by estimate), with their quality.

    'palette' evaluates the sizes that the supernet was told of (`SearchSpace.palette`), as 'auto' does where there are
    any. Every subnet within the limits is evaluated where there are at most `trials`; otherwise 'auto' and 'nsga2'
    follow NSGA-II (Deb et al. 2002; optuna) towards the front of (quality, log cost), and 'random' draws.

    quality: expensive; called at most `trials` times, once per subnet, never for one that breaks a limit.
    estimate: cheap; gives every cost that has a limit, and the objective.
    objective: the cost that the palette spans, one of COSTS. progress: hears the share of trials that are done.

    Raises `UserError` for bad settings, where no subnet keeps the limits (with the nearest miss), and where no quality
    is finite.
    """
    _check(limits, method, trials, objective)
    tried = _Tried(quality, estimate, limits, trials, progress)
    if method == "palette" and not space.palette:
        raise UserError("method=palette: the run has no space.palette")
    method = "palette" if method == "auto" and space.palette else method
    members = list(space.palette_members() if method == "palette" else islice(space.members(), ENUMERABLE + 1))
    whole = len(members) <= ENUMERABLE
    # The smallest subnet tells whether anything fits; the full one and the exits are where most other paths begin.
    anchors = [space.smallest(), next(space.members()), *space.exit_members()]
    fitting = [spec for spec in (members if whole else anchors) if tried.fits(spec)]
    if not fitting:
        raise UserError(nearest_miss(tried.estimates, limits))
    every = whole and len(fitting) <= trials
    if method in ("palette", "grid") and not every:
        count = f"{len(fitting):,}" if whole else f"more than {ENUMERABLE:,}"
        raise UserError(
            f"method={method}: {count} subnets to evaluate, but trials={trials}; raise trials or take nsga2"
        )
    random = Random(seed)
    if every:
        tried.evaluate_all(fitting)
    else:
        tried.evaluate_all(anchors)
        if method != "random":
            _nsga2(space, tried, objective, seed)
        if whole:
            tried.evaluate_all(random.sample(fitting, len(fitting)))
        else:
            tried.evaluate_all(space.draw(random) for _ in range(PROPOSALS * trials))
    progress(1.0)
    if not tried.found:
        raise UserError(f"quality: not finite for any of the {tried.spent} subnets that were evaluated")
    return list(tried.found.values())


def pareto(candidates: Iterable[Candidate], objective: str) -> list[Candidate]:
    """Those that none other beats, cheapest first: every further one costs more and is better.

    Of several with the same cost and quality one stays.
    """
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.cost(objective), c.quality, c.spec)):
        if not front or candidate.quality < front[-1].quality:
            front.append(candidate)
    return front


def spread(front: Sequence[Candidate], count: int, objective: str) -> list[Candidate]:
    """`count` members of a front of `pareto`, the cheapest and the best among them, as even in log cost as possible.

    Fewer if the front has fewer; with count=1 the best.
    """
    if count >= len(front):
        return list(front)
    if count == 1:
        return [front[-1]]
    logs = [_log(candidate.cost(objective)) for candidate in front]
    # As the gaps add up to a constant, the least sum of their squares makes them as equal as they can be.
    # best: last pick -> (sum, picks).
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for _ in range(count - 1):
        best = {
            i: min((total + (logs[i] - logs[j]) ** 2, (*picks, i)) for j, (total, picks) in best.items() if j < i)
            for i in range(min(best) + 1, len(front))
        }
    return [front[i] for i in best[len(front) - 1][1]]


def verified(
    front: Sequence[Candidate],
    count: int,
    measure: Callable[[Candidate], Mapping[str, float]],
    limits: Limits,
    objective: str,
    progress: Callable[[float], object] = bool,
) -> list[Candidate]:
    """`count` members of a front, spread over it, that keep the limits by measurement; cheapest first.

    Those that break a limit, or that another beats by (quality, measured objective), are replaced by their nearest
    neighbours on the front until `count` stand or every member was measured.

    measure: expensive; costs of a candidate by name, with all that have a limit. progress: hears the share that stands.

    Raises `UserError` with the nearest miss where none keeps the limits.
    """
    waiting, measured = list(front), []
    picks = spread(front, count, objective)
    standing: list[Candidate] = []
    while picks:
        candidate = picks.pop(0)
        waiting.remove(candidate)
        measured.append(replace(candidate, measured=dict(measure(candidate))))
        standing = pareto((found for found in measured if keeps(found.measured, limits)), objective)
        progress(min(1.0, len(standing) / count))
        if not picks and len(standing) < count:
            lost = [found for found in measured if found not in standing]
            picks = _replacements(waiting, lost, limits, objective)[: count - len(standing)]
    if not standing:
        seen = {candidate.spec: candidate.measured for candidate in measured}
        raise UserError(
            f"{nearest_miss(seen, limits)}; by estimate the {len(seen)} measured ones kept to it, and none does"
        )
    return standing


@dataclass
class _Tried:
    """What was looked at: estimates of every subnet, and the quality of those within the limits."""

    quality: Callable[[SubnetSpec], float]
    estimate: Callable[[SubnetSpec], Mapping[str, float]]
    limits: Limits
    trials: int
    progress: Callable[[float], object]
    estimates: dict[SubnetSpec, Mapping[str, float]] = field(default_factory=dict)
    found: dict[SubnetSpec, Candidate] = field(default_factory=dict)
    evaluated: set[SubnetSpec] = field(default_factory=set)

    @property
    def spent(self) -> int:
        """How many subnets were evaluated."""
        return len(self.evaluated)

    def excess(self, spec: SubnetSpec) -> list[float]:
        """By which share each limit is exceeded; negative where it is kept."""
        if spec not in self.estimates:
            self.estimates[spec] = dict(self.estimate(spec))
        return excess(self.estimates[spec], self.limits)

    def fits(self, spec: SubnetSpec) -> bool:
        return max(self.excess(spec), default=0.0) <= 0

    def evaluate(self, spec: SubnetSpec) -> Candidate | None:
        """None for a subnet outside the limits, without a finite quality, or for which no trial is left."""
        if spec not in self.evaluated and self.spent < self.trials and self.fits(spec):
            self.evaluated.add(spec)
            quality = float(self.quality(spec))
            if isfinite(quality):  # not a subnet that diverged
                self.found[spec] = Candidate(spec, quality, self.estimates[spec])
            self.progress(self.spent / self.trials)
        return self.found.get(spec)

    def evaluate_all(self, specs: Iterable[SubnetSpec]) -> None:
        """As many as there are trials left."""
        for spec in specs:
            if self.spent >= self.trials:
                return
            self.evaluate(spec)


def _nsga2(space: SearchSpace, tried: _Tried, objective: str, seed: int) -> None:
    """NSGA-II until the trials are spent, or too many proposals were known ones."""
    axes = {"hidden": space.hidden, "groups": space.groups or (None,), "ffn": space.ffn, "depth": space.depth}
    known: set[SubnetSpec] = set()
    with _quiet():
        sampler = optuna.samplers.NSGAIISampler(
            population_size=max(8, min(50, tried.trials // 16)),  # many generations: there are few trials
            seed=seed,
            constraints_func=lambda trial: tried.excess(space.member(**trial.params)) or [0.0],
        )
        study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        for index in (-1, 0):
            study.enqueue_trial({axis: choices[index] for axis, choices in axes.items()})
        distributions = {axis: CategoricalDistribution(choices) for axis, choices in axes.items()}
        for _ in range(PROPOSALS * tried.trials):
            if tried.spent >= tried.trials:
                return
            trial = study.ask(distributions)
            spec = space.member(**trial.params)
            candidate = tried.evaluate(spec)
            if spec in known or (candidate is None and tried.fits(spec)):
                study.tell(trial, state=optuna.trial.TrialState.FAIL)  # so that no population holds a subnet twice
            elif candidate is None:
                study.tell(trial, (0.0, 0.0))  # outside the limits only the excess counts
            else:
                study.tell(trial, (candidate.quality, _log(candidate.cost(objective))))
            known.add(spec)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without optuna's log lines and warnings (experimental and deprecated arguments)."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)


def _replacements(
    waiting: Sequence[Candidate], lost: Sequence[Candidate], limits: Limits, objective: str
) -> list[Candidate]:
    """Unmeasured candidates by their distance in log cost to the nearest lost one; last those with an estimate that is
    no better than that of a candidate that broke the same limit, as they would hardly keep it."""

    def order(candidate: Candidate) -> tuple[bool, float]:
        hopeless = any(
            not other.measured[name] <= limits[name] and candidate.estimates[name] >= other.estimates[name]
            for other in lost
            for name in limits
        )
        here = _log(candidate.estimates[objective])
        return hopeless, min(abs(here - _log(other.estimates[objective])) for other in lost)

    return sorted(waiting, key=order) if lost else list(waiting)


def _check(limits: Limits, method: str, trials: int, objective: str) -> None:
    if method not in METHODS:
        raise UserError(f"method={method}: choose one of {', '.join(METHODS)}")
    if objective not in COSTS:
        raise UserError(f"objective={objective}: choose one of {', '.join(COSTS)}")
    if trials < 1:
        raise UserError(f"trials={trials}: give at least 1")
    check_limits(limits)


def _log(cost: float) -> float:
    return log(max(cost, SMALLEST_COST))
