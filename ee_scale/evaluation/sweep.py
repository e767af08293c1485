"""Quality against speed: policies tried on recorded text, and the speed of real decoding beside them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

import torch

from ee_scale.errors import UserError, one_line
from ee_scale.evaluation.calibration import Limits, calibrated_layers, limit_policy
from ee_scale.evaluation.per_exit import Gap, largest_gap
from ee_scale.evaluation.records import Outcome, Records, finite, outcome, simulate
from ee_scale.modeling.attention import without_cudnn
from ee_scale.modeling.policies import SCORES

SWEEP_POINTS = 21
BATCH_SIZES = (1, 8)
PLAIN = "no exits"


@dataclass
class SweepPoint:
    """One way to decode.

    Attributes:
        name: `threshold` and the like for a limit of the sweep, `calibrated`, `lossless`, or PLAIN.
        limit: the limit, the same at every exit.
        settings: arguments of `generate`.
        match_rate: share of tokens that are the whole model's choice; loss: nats per token; mean_depth: layers per
            token (None for `lossless`, whose tokens are all the whole model's): teacher-forced, on the recorded text.
        tags: the same three figures per tag.
        tokens_per_second: by batch size; speed: the ratio to PLAIN in the same rounds. Empty if not timed.
    """

    name: str
    limit: float | None
    settings: dict[str, Any]
    match_rate: float
    loss: float
    mean_depth: float | None
    tags: dict[str, dict[str, float]] = field(default_factory=dict)
    tokens_per_second: dict[int, float] = field(default_factory=dict)
    speed: dict[int, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values, flat but for `tags`; JSON has no infinity, so such a loss is None."""
        flat = {key: getattr(self, key) for key in ("name", "limit", "match_rate", "loss", "mean_depth")}
        flat["loss"] = finite(self.loss)
        for what in ("tokens_per_second", "speed"):
            flat |= {f"{what}_batch_{size}": value for size, value in getattr(self, what).items()}
        tags = {tag: {**figures, "loss": finite(figures["loss"])} for tag, figures in self.tags.items()}
        return {**flat, "tags": tags} if tags else flat


def sweep_limits(records: Records, policy: str) -> list[float]:
    """21 limits from never leaving (or nearly so) to always leaving at the first exit: 1.00, 0.95, .. 0 for
    probabilities; quantiles of the entropies that were seen, smallest first.
    """
    if SCORES[policy].low:
        steps = torch.linspace(0, 1, SWEEP_POINTS, dtype=torch.float64)
        return torch.quantile(_sampled(records.scores[policy]).double(), steps).tolist()
    return [1 - i / (SWEEP_POINTS - 1) for i in range(SWEEP_POINTS)]


def sweep(records: Records, policy: str, calibration: Mapping[str, Any] | None = None) -> list[SweepPoint]:
    """The points of a sweep: 21 limits, the calibrated ones (if there are any), lossless, and no exits at all."""
    points = []
    for limit in sweep_limits(records, policy):
        row: Limits = (limit,) * len(records.layers)
        result = outcome(records, simulate(records, limit_policy(records, policy, row)))
        settings = {"exit_policy": policy, "exit_threshold": limit}
        points.append(_point(records, result, policy, limit, settings))
    if calibration is not None:
        points.append(calibrated_point(records, calibration))
    full = outcome(records, torch.full((len(records.units),), records.num_layers))
    lossless = _point(records, full, "lossless", None, {"exit_policy": "lossless"})
    lossless.mean_depth = None
    for figures in lossless.tags.values():
        del figures["mean_depth"]
    return [*points, lossless, _point(records, full, PLAIN, None, {})]


def calibrated_point(records: Records, calibration: Mapping[str, Any]) -> SweepPoint:
    """What the limits that `ee-scale calibrate` stored do on this text, each tag under its own."""
    tables = {
        tag: tuple(table["thresholds"].get(str(k)) for k in records.layers)
        for tag, table in {None: calibration, **(calibration.get("tags") or {})}.items()
    }
    policy = calibration["policy"]
    result = outcome(records, calibrated_layers(records, policy, tables))
    return _point(records, result, "calibrated", None, {"exit_policy": policy})


def match_gap(points: Iterable[SweepPoint]) -> tuple[SweepPoint, Gap] | None:
    """The point whose match rate differs most between tags, and that gap; None without two tags."""
    found = []
    for point in points:
        gap = largest_gap({tag: figures["match_rate"] for tag, figures in point.tags.items()})
        if gap is not None:
            found.append((point, gap))
    return max(found, key=lambda item: item[1].size, default=None)


@without_cudnn()
def time_points(
    points: Sequence[SweepPoint],
    generate: Callable[..., torch.Tensor],
    prompts: torch.Tensor,
    new_tokens: int,
    rounds: int,
    *,
    tags: Sequence[str | None] | None = None,
    track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    clock: Callable[[], float] = perf_counter,
) -> None:
    """Fill in tokens/s and speed: every point continues prompts [P, S] greedily by `new_tokens`, in batches.

    In a round each point continues the same batch, one after the other, in an order that moves on from round to round,
    so that whatever else the machine does falls on all of them; speed is the median over rounds of the ratio to PLAIN.
    `tags` (one per prompt) choose the limits of the calibrated point. Raises `UserError` if the model cannot decode so.
    """
    plain = next(i for i, point in enumerate(points) if point.name == PLAIN)
    for size in (size for size in BATCH_SIZES if size <= len(prompts)):
        starts = range(0, len(prompts) - size + 1, size)
        for point in points:
            _decode(point, generate, slice(0, size), prompts, tags, new_tokens)  # buffers, and measured costs
        times: list[list[float]] = [[] for _ in points]
        order = [(n, (n + step) % len(points)) for n in range(rounds) for step in range(len(points))]
        for n, i in track(order):
            start = starts[n % len(starts)]
            begin = clock()
            _decode(points[i], generate, slice(start, start + size), prompts, tags, new_tokens)
            times[i].append(clock() - begin)
        for point, own in zip(points, times, strict=True):
            point.tokens_per_second[size] = size * new_tokens / median(own)
            point.speed[size] = median(base / mine for base, mine in zip(times[plain], own, strict=True))


def _decode(
    point: SweepPoint,
    generate: Callable[..., torch.Tensor],
    rows: slice,
    prompts: torch.Tensor,
    tags: Sequence[str] | None,
    new_tokens: int,
) -> None:
    ids, settings = prompts[rows], dict(point.settings)
    if tags is not None and point.name == "calibrated":
        settings["exit_tags"] = list(tags[rows])
    # Ends of text are put off: every point makes the same number of tokens.
    settings |= {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    try:
        generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    except ValueError as error:
        name = point.name if point.limit is None else f"{point.name} at {point.limit:g}"
        raise UserError(f"sweep: {name}: {one_line(error)}") from error
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)


def _point(records: Records, result: Outcome, name: str, limit: float | None, settings: dict[str, Any]) -> SweepPoint:
    tags = {}
    for tag in records.tag_names:
        own = records.tagged(tag)
        tags[tag] = Outcome(result.match[own], result.losses[own], result.layers[own]).summary()
    return SweepPoint(name, limit, settings, **result.summary(), tags=tags)


def _sampled(values: torch.Tensor, most: int = 1 << 20) -> torch.Tensor:
    """At most `most` of the values, evenly spread (torch.quantile refuses very many)."""
    flat = values.flatten()
    return flat[:: -(-len(flat) // most)]
