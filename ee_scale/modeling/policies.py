"""When a token may leave at an exit.

A decision reads the exit's raw logits (before temperature and other processors) at the last position.
R rows of a batch, m exits in order of depth, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isnan
from typing import Any

import torch

from .calibration import check_calibration
from .costs import MAX_DRAFT
from .policy_names import DRAFT_SOURCES, DRAFT_WEIGHTS, POLICIES
from .shortlist import choose_tokens
from .transfers import read

# One limit; one per exit; one list per row of a batch; or by layer.
Threshold = float | Sequence[float] | Sequence[Sequence[float]] | Mapping[int | str, float] | torch.Tensor


@dataclass(frozen=True)
class Score:
    """What the limits of a policy apply to.

    Attributes:
        of: probabilities [..., V] -> [...]; low: whether a token leaves at a limit and below, not at and above.
    """

    of: Callable[[torch.Tensor], torch.Tensor]
    low: bool = False


def _margin(p: torch.Tensor) -> torch.Tensor:
    best, second = p.topk(2, dim=-1).values.unbind(-1)
    return best - second


SCORES = {
    "threshold": Score(lambda p: p.amax(-1)),
    "entropy": Score(lambda p: torch.special.entr(p).sum(-1), low=True),
    "margin": Score(_margin),
}
# A limit that no score reaches: the exit is never taken (and never computed).
NEVER = {name: -inf if score.low else inf for name, score in SCORES.items()}


@dataclass(frozen=True)
class ExitPolicy:
    """A checked policy; `resolve_policy` makes it from what a person passes to `generate`.

    Attributes:
        name: one of `POLICIES`.
        layers: the exits that may be looked at, in order of depth.
        limits: `threshold` (max probability >= limit), `margin` (p1 - p2 >= limit), `entropy` (nats <= limit): for
            each row, or for all rows in one, a limit per exit of `layers`.
        patience: `patience`: this many exits in a row with the same most likely token.
        layer: `fixed`: the exit that is always taken; `lossless`: the drafting exit, None lets measured cost choose.
        max_pending: tokens whose deeper keys and values may be missing before they are computed.
        draft_length: `lossless`: tokens per draft, None lets measured cost choose (at most `max_draft`).
        shortlist: `lossless`: token ids that drafts are chosen among; None is the whole vocabulary.
        draft_weights: `lossless`: one of `DRAFT_WEIGHTS`, what the drafting exit's early layers are.
        draft_sources: `lossless`: which of `DRAFT_SOURCES` draft.
    """

    name: str
    layers: tuple[int, ...]
    limits: tuple[tuple[float, ...], ...] = ()
    patience: int = 2
    layer: int | None = None
    max_pending: int = 8
    draft_length: int | None = None
    max_draft: int = MAX_DRAFT
    shortlist: tuple[int, ...] | None = None
    draft_weights: str = "model"
    draft_sources: tuple[str, ...] = ()


def resolve_policy(
    name: str | None,
    spec_layers: Sequence[int],
    *,
    calibration: Mapping[str, Any] | None = None,
    tags: Sequence[str] | None = None,
    batch_size: int | None = None,
    threshold: Threshold | None = None,
    patience: int | None = None,
    layer: int | None = None,
    min_layer: int | None = None,
    max_pending: int | None = None,
    draft_length: int | None = None,
    shortlist: int | Sequence[int] | None = None,
    draft_sources: str | Sequence[str] | None = None,
    vocab_size: int | None = None,
    head_tokens: Sequence[int] = (),
    draft_weights: str | None = None,
) -> ExitPolicy:
    """Check what a person asked for. Raises ValueError in one line that names the option and the values in conflict.

    threshold: a number, one per exit of the model, one list per row, or {layer: value}; left out, the limits that
    `ee-scale calibrate` stored (of a row's tag where there are any). head_tokens: `ExitSpec.shortlist_ids`.
    """
    name = "off" if name is None else name
    if name not in POLICIES:
        raise ValueError(f"exit_policy={name!r}: choose one of {', '.join(POLICIES)}")
    layers = tuple(spec_layers)
    if calibration is not None:
        check_calibration(calibration, vocab_size)
    _check_layers(name, layers, layer, min_layer)
    patience, max_pending = 2 if patience is None else patience, 8 if max_pending is None else max_pending
    drafts = 0 if draft_length is None else draft_length
    _check_counts(exit_patience=(patience, 1), exit_max_pending=(max_pending, 0), exit_draft_length=(drafts, 0))
    sources = _check_drafts(name, layer, draft_length, draft_weights, draft_sources)
    chosen = (layer,) if layer is not None else tuple(k for k in layers if min_layer is None or k >= min_layer)
    limits: tuple[tuple[float, ...], ...] = ()
    if name in NEVER:
        rows = _limits(name, threshold, layers, calibration, tags, batch_size)
        chosen, limits = _reached(name, chosen, [[row[layers.index(k)] for k in chosen] for row in rows])
    elif threshold is not None:
        raise ValueError(f"exit_threshold={threshold}: exit_policy={name} has no threshold")
    if name == "lossless" and "exits" not in sources:
        chosen = ()
    elif name == "lossless" and not chosen:
        raise ValueError(f"exit_min_layer={min_layer}: no exit is left to draft from, of those at {_list(layers)}")
    return ExitPolicy(
        name,
        () if name == "off" else chosen,
        limits,
        patience=patience,
        layer=layer,
        max_pending=max_pending,
        draft_length=draft_length,
        max_draft=max(MAX_DRAFT, draft_length or 0),
        draft_sources=sources,
        shortlist=choose_tokens(shortlist, name, (calibration or {}).get("shortlist"), vocab_size, head_tokens),
        draft_weights=draft_weights or "model",
    )


def _check_drafts(
    policy: str, layer: int | None, length: int | None, weights: object, sources: object
) -> tuple[str, ...]:
    """What drafts: what was asked for; the asked exit alone; all."""
    wanted = {"exit_draft_length": length, "exit_draft_weights": weights, "exit_draft_sources": sources}
    if policy != "lossless":
        for option, value in wanted.items():
            if value is not None:
                raise ValueError(f"{option}={value!r}: only exit_policy=lossless drafts, not {policy!r}")
        return ()
    if weights is not None and weights not in DRAFT_WEIGHTS:
        raise ValueError(f"exit_draft_weights={weights!r}: choose one of {', '.join(DRAFT_WEIGHTS)}")
    if sources is None:
        return DRAFT_SOURCES if layer is None else ("exits",)
    names = [sources] if isinstance(sources, str) else sources
    if not isinstance(names, Sequence) or not names or any(name not in DRAFT_SOURCES for name in names):
        raise ValueError(f"exit_draft_sources={sources!r}: give {' or '.join(DRAFT_SOURCES)}, or a list of both")
    if "exits" not in names:
        for option, value in (("exit_layer", layer), ("exit_draft_weights", weights)):
            if value is not None:
                raise ValueError(f"{option}={value}: exit_draft_sources={sources!r} drafts from no exit")
    return tuple(name for name in DRAFT_SOURCES if name in names)


def _reached(
    name: str, layers: Sequence[int], rows: Sequence[Sequence[float]]
) -> tuple[tuple[int, ...], tuple[tuple[float, ...], ...]]:
    """Exits that some row can take, and their limits by row; others are not looked at."""
    used = [i for i in range(len(layers)) if any(_reachable(name, row[i]) for row in rows)]
    return tuple(layers[i] for i in used), tuple(tuple(row[i] for i in used) for row in rows)


def _check_counts(**counts: tuple[Any, int]) -> None:
    for option, (value, least) in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{option}={value!r}: give a whole number of at least {least}")


def _check_layers(name: str, layers: tuple[int, ...], layer: int | None, min_layer: int | None) -> None:
    for option, value in (("exit_layer", layer), ("exit_min_layer", min_layer)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{option}={value!r}: give a layer number")
    if layer is not None and name not in ("fixed", "lossless"):
        raise ValueError(f"exit_layer={layer}: only exit_policy=fixed and lossless take it, not {name!r}")
    if layer is not None and layer not in layers:
        raise ValueError(f"exit_layer={layer}: the model has exits at {_list(layers)}")
    if name == "fixed" and layer is None:
        raise ValueError(f"exit_policy=fixed: say which exit with exit_layer, one of {_list(layers)}")
    if layer is not None and min_layer is not None and layer < min_layer:
        raise ValueError(f"exit_layer={layer} is above exit_min_layer={min_layer}: leave one of them out")


def score(name: str, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [..., V] -> (what `name` compares with its limit, fp32 [...]; the most likely token, int64 [...]).

    Of a policy without limits: the highest probability.
    """
    logits = logits.float()
    return SCORES.get(name, SCORES["threshold"]).of(logits.softmax(-1)), logits.argmax(-1)


def most_likely(logits: torch.Tensor) -> torch.Tensor:
    """Logits [..., V] -> tokens [...]. On a CPU torch looks through 16-bit numbers five times slower than fp32."""
    return logits.float().argmax(-1)


def passes(name: str, scores: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """Whether scores [R] are good enough for limits [R] (or [1])."""
    return scores <= limits if SCORES[name].low else scores >= limits


class Decisions:
    """The decisions about one token of each row of a batch, asked exit by exit in order of depth."""

    def __init__(self, policy: ExitPolicy, batch_size: int, device: torch.device | str = "cpu"):
        self.policy = policy
        self.limits = torch.tensor(policy.limits, device=device) if policy.limits else None
        self.last = torch.full((batch_size,), -1, device=device)
        self.agreed = torch.zeros(batch_size, dtype=torch.long, device=device)

    def start(self) -> None:
        """Forget the last token's exits."""
        if self.policy.name == "patience":
            self.last.fill_(-1)
            self.agreed.zero_()

    def resume(self, row: int, last: int, agreed: int) -> None:
        """Go on with a row's token where `said` left it on another device."""
        if self.policy.name == "patience":
            self.last[row], self.agreed[row] = last, agreed

    def said(self, row: int) -> tuple[int, int]:
        """(the last exit's token, how many exits in a row said it), which `patience` needs; else (-1, 0)."""
        if self.policy.name != "patience":
            return -1, 0
        (last,), (agreed,) = read(self.last[row, None], self.agreed[row, None])
        return last, agreed

    def ask(self, k: int, logits: torch.Tensor, rows: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Exit k of rows `rows` [R] (None: all) with logits [R, V] -> (leave, bool [R]; score [R]; token [R])."""
        scores, tokens = score(self.policy.name, logits)
        return self.leave(k, scores, tokens, rows), scores, tokens

    def leave(
        self, k: int, scores: torch.Tensor | None, tokens: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The same for what exit k said: scores [R] (not read by `patience` and `fixed`), tokens [R] -> bool [R]."""
        policy, name = self.policy, self.policy.name
        if name in NEVER:
            limits = self.limits[:, policy.layers.index(k)]
            if rows is not None and len(limits) > 1:
                limits = limits[rows]
            return passes(name, scores, limits)
        if name == "patience":
            rows = torch.arange(len(tokens), device=tokens.device) if rows is None else rows
            same = tokens == self.last[rows]
            self.agreed[rows] = torch.where(same, self.agreed[rows] + 1, 1)
            self.last[rows] = tokens
            return self.agreed[rows] >= policy.patience
        return torch.full_like(tokens, k == policy.layer, dtype=torch.bool)

    def layers(self, said: Callable[[int], tuple[torch.Tensor | None, torch.Tensor]], num_layers: int) -> torch.Tensor:
        """The layer at which each row leaves, int64 [R]; `said`: what each exit said, as `leave` reads it."""
        chosen = torch.full_like(self.agreed, num_layers)
        for k in self.policy.layers:
            chosen = torch.where(self.leave(k, *said(k)) & (chosen == num_layers), k, chosen)
        return chosen


def choose_layers(policy: ExitPolicy, exit_logits: Mapping[int, torch.Tensor], num_layers: int) -> torch.Tensor:
    """The layer at which each of N independent positions leaves: {layer: logits [N, V]} -> int64 [N].

    The same decisions as during decoding, for measuring on given text.
    """
    some = next(iter(exit_logits.values()))
    decisions = Decisions(policy, len(some), some.device)
    return decisions.layers(lambda k: score(policy.name, exit_logits[k]), num_layers)


def _limits(
    name: str,
    threshold: Threshold | None,
    layers: tuple[int, ...],
    calibration: Mapping[str, Any] | None,
    tags: Sequence[str] | None,
    batch_size: int | None,
) -> tuple[tuple[float, ...], ...]:
    if threshold is None:
        return _calibrated(name, layers, calibration, tags)
    if isinstance(threshold, torch.Tensor):
        threshold = threshold.tolist()
    if isinstance(threshold, Mapping):
        by_layer = {int(k) if str(k).isdecimal() else k: value for k, value in threshold.items()}
        if wrong := sorted(set(by_layer) - set(layers), key=str):
            raise ValueError(f"exit_threshold: no exit at layer {wrong[0]}; the model has exits at {_list(layers)}")
        rows = [[by_layer.get(k, NEVER[name]) for k in layers]]
    elif isinstance(threshold, (list, tuple)):
        nested = bool(threshold) and all(isinstance(row, (list, tuple)) for row in threshold)
        rows = list(threshold) if nested else [threshold]
        if nested and batch_size is not None and len(rows) != batch_size:
            raise ValueError(f"exit_threshold: {len(rows)} rows of limits for {batch_size} rows in the batch")
    else:
        rows = [[threshold] * len(layers)]
    for row in rows:
        if len(row) != len(layers):
            raise ValueError(
                f"exit_threshold={list(row)}: {len(row)} limits for {len(layers)} exits (at layers {_list(layers)})"
            )
        for value in row:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or isnan(value):
                raise ValueError(f"exit_threshold={list(row)}: {value!r} is not a number")
    return tuple(tuple(float(value) for value in row) for row in rows)


def _calibrated(
    name: str, layers: tuple[int, ...], calibration: Mapping[str, Any] | None, tags: Sequence[str] | None
) -> tuple[tuple[float, ...], ...]:
    if not calibration or calibration.get("policy") != name:
        has = f"; the model is calibrated for {calibration['policy']!r}" if calibration else ""
        raise ValueError(f"exit_policy={name}: give exit_threshold, or run `ee-scale calibrate` on the model{has}")
    by_tag = calibration.get("tags") or {}
    tables = [by_tag.get(tag, calibration) for tag in tags] if tags and by_tag else [calibration]
    # JSON has no infinity: null is "never".
    return tuple(
        tuple(NEVER[name] if (v := table["thresholds"].get(str(k))) is None else float(v) for k in layers)
        for table in tables
    )


def _reachable(name: str, limit: float) -> bool:
    return limit >= 0 if SCORES[name].low else limit <= 1


def _list(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "no layer"
