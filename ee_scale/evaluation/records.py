"""One teacher-forced pass over a text, kept so compactly that any policy can be tried afterwards without the model.

N predicted tokens, m exits in order of depth, U units (windows or documents that the tokens belong to).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ee_scale.errors import UserError
from ee_scale.evaluation.states import exit_states
from ee_scale.families.registry import decoder_family
from ee_scale.modeling.policies import NEVER, Decisions, ExitPolicy, score

Head = Callable[[torch.Tensor], torch.Tensor]
CHUNK_LOGITS = 1 << 25  # logits of one exit that exist at the same time (128 MiB in fp32)


@dataclass(frozen=True)
class Window:
    """Token ids [n + 1] int64; the unit (number) and the tag they belong to; which of the n predictions count, bool [n]
    (None: all).
    """

    tokens: torch.Tensor
    unit: int
    tag: str | None = None
    learned: torch.Tensor | None = None

    @property
    def num_predicted(self) -> int:
        """How many tokens are predicted."""
        return len(self.tokens) - 1 if self.learned is None else int(self.learned.sum())


@dataclass(frozen=True)
class Records:
    """What every exit said about every token, given the true text before it.

    Attributes:
        layers: the exits, in order of depth; num_layers: layers of the whole model.
        scores: policy -> fp32 [m, N], what that policy compares with its limits.
        tokens: each exit's most likely token, int32 [m, N]; final_tokens: the whole model's, int32 [N].
        losses: cross entropy of each exit in nats, fp32 [m, N], infinite where it does not score the true token (a
            shortlist); final_losses: fp32 [N].
        units: the unit of each token, int64 [N], 0..U-1 in order of first appearance.
        tags: the tag of each unit (None where the data has none).
    """

    layers: tuple[int, ...]
    num_layers: int
    scores: dict[str, torch.Tensor]
    tokens: torch.Tensor
    losses: torch.Tensor
    final_tokens: torch.Tensor
    final_losses: torch.Tensor
    units: torch.Tensor
    tags: tuple[str | None, ...]

    @property
    def matches(self) -> torch.Tensor:
        """Whether each exit's token is the whole model's: bool [m, N]."""
        return self.tokens == self.final_tokens

    def take(self, units: torch.Tensor) -> "Records":
        """The tokens of some units (int64 [u], each once), which are then numbered as in `units`."""
        numbers = torch.full((len(self.tags),), -1)
        numbers[units] = torch.arange(len(units))
        new = numbers[self.units]
        kept = new >= 0
        return Records(
            self.layers,
            self.num_layers,
            {name: values[:, kept] for name, values in self.scores.items()},
            self.tokens[:, kept],
            self.losses[:, kept],
            self.final_tokens[kept],
            self.final_losses[kept],
            new[kept],
            tuple(self.tags[i] for i in units.tolist()),
        )

    def tagged(self, tag: str) -> torch.Tensor:
        """Which tokens belong to a tag, bool [N]."""
        return torch.tensor([name == tag for name in self.tags])[self.units]

    @property
    def tag_names(self) -> list[str]:
        """The tags, sorted; empty where the data has none."""
        return sorted({tag for tag in self.tags if tag is not None})

    def by_tag(self) -> dict[str, "Records"]:
        """The records of each tag, in the order of `tag_names`."""
        own = {name: torch.tensor([i for i, tag in enumerate(self.tags) if tag == name]) for name in self.tag_names}
        return {name: self.take(units) for name, units in own.items()}


def batched(windows: Sequence[Window], batch_size: int) -> list[list[Window]]:
    """Batches of windows of about the same length, so that little is padded."""
    ordered = sorted(windows, key=lambda window: -len(window.tokens))
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


@torch.no_grad()
def collect(
    model: PreTrainedModel, batches: Iterable[Sequence[Window]], policies: Sequence[str] = tuple(NEVER)
) -> Records:
    """Run the model once over windows, all exits included; a model without exits gives records of its final layer.

    `policies`: whose scores are kept. Logits exist for one exit and CHUNK_LOGITS numbers at a time. Raises `UserError`
    if there is nothing to measure.
    """
    parts: list[dict[str, torch.Tensor]] = []
    numbers: dict[int, int] = {}  # unit of the caller -> unit of the records
    tags: list[str | None] = []
    for batch in batches:
        for window in batch:
            if window.unit not in numbers:
                numbers[window.unit] = len(tags)
                tags.append(window.tag)
        counts = torch.tensor([window.num_predicted for window in batch])
        units = torch.tensor([numbers[window.unit] for window in batch]).repeat_interleave(counts)
        parts.append({**_read(model, batch, policies), "units": units})
    if not parts:
        raise UserError("data: no tokens to measure on")
    joined = {key: torch.cat([part[key] for part in parts], dim=-1) for key in parts[0]}
    return Records(
        layers=tuple(model.exit_spec.layers) if hasattr(model, "exit_spec") else (),
        num_layers=model.config.num_hidden_layers,
        scores={name: joined[name] for name in policies},
        tokens=joined["tokens"],
        losses=joined["losses"],
        final_tokens=joined["final_tokens"],
        final_losses=joined["final_losses"],
        units=joined["units"],
        tags=tuple(tags),
    )


def simulate(records: Records, policy: ExitPolicy) -> torch.Tensor:
    """The layer at which each token leaves, int64 [N]: what `policies.choose_layers` says of the same logits.

    Limits may be one row for all tokens, or one row per token.
    """

    def said(k: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        at = records.layers.index(k)
        scores = records.scores[policy.name][at] if policy.name in NEVER else None
        return scores, records.tokens[at].long()

    return Decisions(policy, len(records.units)).layers(said, records.num_layers)


@dataclass(frozen=True)
class Outcome:
    """What leaving at chosen layers does to a text.

    Attributes:
        match: whether each token is the whole model's choice, bool [N]; losses: nats, fp32 [N].
        layers: int64 [N].
    """

    match: torch.Tensor
    losses: torch.Tensor
    layers: torch.Tensor

    def summary(self) -> dict[str, float]:
        """`match_rate` (share of tokens), `loss` (nats per token), `mean_depth` (layers per token).

        The loss is infinite where a token leaves at an exit that does not score the true one.
        """
        return {
            "match_rate": float(self.match.double().mean()),
            "loss": float(self.losses.double().mean()),
            "mean_depth": float(self.layers.double().mean()),
        }


def outcome(records: Records, layers: torch.Tensor) -> Outcome:
    """Match and loss of every token when it leaves at `layers` [N]."""
    match, losses = torch.ones(len(layers), dtype=torch.bool), records.final_losses
    for i, k in enumerate(records.layers):
        # At the last layer's depth `layers` cannot tell an exit from the final head: the head is meant.
        if k < records.num_layers:
            here = layers == k
            match = torch.where(here, records.matches[i], match)
            losses = torch.where(here, records.losses[i], losses)
    return Outcome(match, losses, layers)


def finite(value: float) -> float | None:
    """A number for JSON, which has no infinity."""
    return value if isfinite(value) else None


def _read(model: PreTrainedModel, batch: Sequence[Window], policies: Sequence[str]) -> dict[str, torch.Tensor]:
    """The values of a batch of windows, flat over all predicted tokens, on the CPU."""
    rows, device = [window.tokens for window in batch], next(model.parameters()).device
    # Padding lies to the right of a causal model's text: no position sees it, and it is dropped before the heads.
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    lengths = torch.tensor([len(row) - 1 for row in rows], device=device)
    kept = torch.arange(padded.shape[1] - 1, device=device) < lengths[:, None]
    for row, window in zip(kept, batch, strict=True):
        if window.learned is not None:
            row[: len(window.learned)] &= window.learned.to(device)
    labels = padded[:, 1:][kept]
    hidden, lm_head = exit_states(model, padded[:, :-1]), model.get_output_embeddings()
    family = decoder_family(model.config)
    final = _measure(hidden.pop(0)[kept], lambda x: family.cap(lm_head(x), model.config), labels, ())
    found = {"final_tokens": final["tokens"], "final_losses": final["losses"]}
    exits = [
        _measure(states[kept], partial(model.exit_heads[str(k)].logits, lm_head=lm_head), labels, policies)
        for k, states in hidden.items()
    ]
    for key in ("tokens", "losses", *policies):
        found[key] = torch.stack([values[key] for values in exits]) if exits else torch.empty(0, len(labels))
    return found


def _measure(
    hidden: torch.Tensor, head: Head, labels: torch.Tensor, policies: Sequence[str]
) -> dict[str, torch.Tensor]:
    """hidden [n, D], labels [n] -> tokens int32 [n], losses fp32 [n], and the scores of `policies` fp32 [n]."""
    found: dict[str, list[torch.Tensor]] = {key: [] for key in ("tokens", "losses", *policies)}
    for states, targets in _chunks(hidden, labels, head):
        logits = head(states).float()
        found["losses"].append(cross_entropy(logits, targets, reduction="none").cpu())
        found["tokens"].append(logits.argmax(-1).int().cpu())
        for name in policies:
            found[name].append(score(name, logits)[0].cpu())
    return {key: torch.cat(values) for key, values in found.items()}


def _chunks(hidden: torch.Tensor, labels: torch.Tensor, head: Head) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    size = max(1, CHUNK_LOGITS // head(hidden[:1]).shape[-1])
    return zip(hidden.split(size), labels.split(size), strict=True)
