"""Loss, perplexity and agreement with the final layer, for every exit."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import exp
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from ee_scale.errors import UserError


@dataclass(frozen=True)
class ExitQuality:
    """One exit (or the final layer) on a text.

    Attributes:
        loss: mean next-token cross entropy, nats.
        agreement: share of positions whose most likely token is that of the final layer.
    """

    layer: int
    final: bool
    loss: float
    perplexity: float
    agreement: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@torch.no_grad()
def evaluate_exits(model: Any, windows: Iterable[torch.Tensor]) -> tuple[list[ExitQuality], int]:
    """Measure a model on windows of tokens [B, S+1]: exits in order of depth, the final layer last; tokens measured.

    Raises `UserError` if there is nothing to measure.
    """
    device = next(model.parameters()).device
    layers = list(model.exit_spec.layers) if hasattr(model, "exit_spec") else []
    losses, agreed, tokens = dict.fromkeys([*layers, 0], 0.0), dict.fromkeys(layers, 0), 0
    for window in windows:
        inputs, labels = window[:, :-1].to(device), window[:, 1:].to(device)
        output = model(inputs, use_cache=False)
        final = output.logits.argmax(-1)
        losses[0] += _sum_loss(output.logits, labels)
        for k in layers:
            losses[k] += _sum_loss(output.exit_logits[k], labels)
            agreed[k] += int((output.exit_logits[k].argmax(-1) == final).sum())
        tokens += labels.numel()
    if tokens == 0:
        raise UserError("data: no tokens to measure on")
    rows = [_quality(k, False, losses[k] / tokens, agreed[k] / tokens) for k in layers]
    return [*rows, _quality(model.config.num_hidden_layers, True, losses[0] / tokens, 1.0)], tokens


def _sum_loss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return float(cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum"))


def _quality(layer: int, final: bool, loss: float, agreement: float) -> ExitQuality:
    return ExitQuality(layer, final, loss, exp(min(loss, 700)), agreement)
