"""The loss of one exit: forward, backward and free, a chunk of logits at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi

import torch
from torch import nn

from ee_scale.exits.heads import ExitHead
from ee_scale.exits.vocab_parallel import confidence, cross_entropy, kl_divergence, mask_padding


@dataclass(frozen=True)
class LossSettings:
    """What an exit is trained on; see `ExitsConfig` for the meaning of each field."""

    vocab_size: int
    chunk_tokens: int = 1024
    confidence_weighting: bool = False
    kl_weight: float = 0.0
    kl_temperature: float = 1.0


def exit_backward(
    head: ExitHead,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    lm_head: nn.Module | None,
    settings: LossSettings,
    scale: float,
    final_hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add the gradient of `scale` x loss to the exit's parameters; logits exist for `chunk_tokens` tokens at a time.

    hidden [B, S, D]: the exit's own, with its graph; labels, loss_mask [B, S]; final_hidden [B, S, D]: what the
    lm_head reads after the last layer (the teacher), for the KL term.
    loss = sum_t w_t (CE_t + kl_weight KL_t) / sum_t w_t, with w = loss_mask, times the exit's own (detached)
    confidence if wanted. Returns fp32 [2]: mean cross entropy over the mask, mean KL.
    """
    flat = hidden.detach().flatten(0, 1)
    labels, mask = labels.flatten(), loss_mask.flatten().float()
    teacher = final_hidden.flatten(0, 1) if settings.kl_weight else None

    def logits_of(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        piece = flat[part].requires_grad_(hidden.requires_grad)
        return piece, mask_padding(head.logits(piece, lm_head), settings.vocab_size)

    parts = [slice(i, i + settings.chunk_tokens) for i in range(0, len(flat), settings.chunk_tokens)]
    weights = _confidence_weights(logits_of, parts, mask) if settings.confidence_weighting else mask
    tokens, total_weight = mask.sum().clamp(min=1), weights.sum().clamp(min=1e-6)
    means, gradients = flat.new_zeros(2, dtype=torch.float32), []
    for part in parts:
        piece, logits = logits_of(part)
        loss = 0.0
        if teacher is not None:
            with torch.no_grad():
                target = mask_padding(head.capped(lm_head(teacher[part])), settings.vocab_size)
            kl = kl_divergence(logits, target, settings.kl_temperature)
            means[1] += (kl.detach() * mask[part]).sum() / tokens
            loss = settings.kl_weight * kl
        ce = cross_entropy(logits, labels[part])
        means[0] += (ce.detach() * mask[part]).sum() / tokens
        ((loss + ce) * weights[part]).sum().mul(scale / total_weight).backward()
        gradients.append(piece.grad)
    if hidden.requires_grad:
        hidden.backward(torch.cat(gradients).view_as(hidden))
    return means


def _confidence_weights(
    logits_of: Callable[[slice], tuple[torch.Tensor, torch.Tensor]], parts: list[slice], mask: torch.Tensor
) -> torch.Tensor:
    # Their sum normalises the loss, so they are needed before the first gradient: one more head pass.
    with torch.no_grad():
        return torch.cat([confidence(logits_of(part)[1]) for part in parts]) * mask


def loss_weight(final: float, initial: float, step: int, warmup_steps: int, style: str) -> float:
    """Weight of an exit's loss at `step` (0-based): initial + ratio x (final - initial) (EE-LLM's warm-up).

    ratio grows from 0 to 1 over `warmup_steps`: linear, or 0.5 (1 - cos(pi x)).
    """
    x = 1.0 if step >= warmup_steps else step / warmup_steps
    ratio = x if style == "linear" else 0.5 * (1 - cos(pi * x))
    return initial + ratio * (final - initial)
