"""The loss of one exit: forward, backward and free, a chunk of logits at a time."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import cos, pi

import torch
from megatron.core import parallel_state
from torch import nn

from ee_scale.exits.vocab_parallel import confidence, cross_entropy, kl_divergence, mask_padding, sampled_kl
from ee_scale.modeling.heads import ExitHead

LEAST_CHUNK = 1024  # tokens; on a CPU larger ones gain nothing
GPU_LOGITS = 2**28  # of a chunk that is chosen here: half a gigabyte in bf16, and a matrix product that fills a GPU

# What a head learns from beside labels: its logits [n, V/tp] of a slice of all tokens -> KL of each, fp32 [n].
Teacher = Callable[[torch.Tensor, slice], torch.Tensor]


@dataclass(frozen=True)
class LossSettings:
    """What logits are trained on; see `ExitsConfig` for the meaning of each field. vocab_size: tokens scored."""

    vocab_size: int
    chunk_tokens: int | None = None
    confidence_weighting: bool = False
    ce_weight: float = 1.0
    kl_weight: float = 0.0
    kl_temperature: float = 1.0
    kernel: str = "torch"


def chunk_tokens(given: int | None, columns: int, device: str) -> int:
    """Tokens whose logits [tokens, columns] exist at the same time: as given, else by the type of the device."""
    if given is not None:
        return given
    if device == "cpu":
        return LEAST_CHUNK
    return max(LEAST_CHUNK, 1 << (GPU_LOGITS // columns).bit_length() - 1)


def exit_backward(
    head: ExitHead,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    lm_head: nn.Module | None,
    settings: LossSettings,
    scale: float,
    final_hidden: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the gradient of `scale` x loss (see `token_backward`) to the parameters behind `hidden`.

    hidden [B, S, D]: the exit's own; labels, loss_mask [B, S]; final_hidden [B, S, D]: what the lm_head reads after
    the last layer (the teacher), for the KL term. Returns fp32 [2] (mean cross entropy, mean KL), and the gradient of
    `hidden` for the modules in front of it.

    A shortlist head learns from the positions whose label is in its shortlist, as EAGLE-3's draft head does (arXiv
    2503.01840): all others are masked out of loss and means. Its teacher is the final layer's distribution over those
    tokens: `lm_head` has their rows only.
    """
    if head.shortlist is not None:
        places = head.shortlist.places(labels)
        labels, loss_mask = places.clamp(min=0), loss_mask * (places >= 0)
        settings = replace(settings, vocab_size=head.spec.shortlist)
    return token_backward(
        lambda piece: head.scored_logits(piece, lm_head),
        hidden,
        labels,
        loss_mask,
        settings,
        scale,
        whole_teacher(lambda piece: head.spec.capped(lm_head(piece)), final_hidden, settings)
        if settings.kl_weight
        else None,
    )


def whole_teacher(
    logits_of: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, settings: LossSettings
) -> Teacher:
    """KL to a teacher's distribution, computed from its hidden state [B, S, D'] when it is needed."""

    def kl(logits: torch.Tensor, part: slice) -> torch.Tensor:
        with torch.no_grad():
            target = mask_padding(logits_of(hidden.flatten(0, 1)[part]), settings.vocab_size)
        return kl_divergence(logits, target, settings.kl_temperature)

    return kl


def sampled_teacher(tokens: torch.Tensor, negentropy: torch.Tensor, settings: LossSettings) -> Teacher:
    """KL to a teacher of whom `systematic_sample` was kept: [B, S, K] and [B, S]."""
    tokens, negentropy = tokens.flatten(0, 1), negentropy.flatten()
    return lambda logits, part: sampled_kl(logits, tokens[part], negentropy[part], settings.kl_temperature)


def token_backward(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    settings: LossSettings,
    scale: float,
    teacher: Teacher | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Backward of `scale` x loss into the parameters of `logits_of`; logits exist for `chunk_tokens` tokens at a time.

    loss = sum_t w_t (ce_weight CE_t + kl_weight KL_t) / n, with w = loss_mask and n the number of tokens that it does
    not leave out; with confidence weighting w and n are times the (detached) confidence c: n = sum_{w_t > 0} c_t.
    hidden [B, S, D], labels and loss_mask [B, S].
    Returns fp32 [2] (cross entropy, sum_t w_t CE_t / n, and KL) and the gradient of hidden, [B, S, D].
    """
    flat, needs_grad = hidden.detach().flatten(0, 1), hidden.requires_grad
    labels, mask = labels.flatten(), loss_mask.flatten().float()

    def chunk(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        piece = flat[part].requires_grad_(needs_grad)
        return piece, mask_padding(logits_of(piece), settings.vocab_size)

    columns = -(-settings.vocab_size // parallel_state.get_tensor_model_parallel_world_size())
    size = chunk_tokens(settings.chunk_tokens, columns, flat.device.type)
    parts = [slice(i, i + size) for i in range(0, len(flat), size)]
    learned = (mask > 0).float()
    trust = _confidence(chunk, parts) if settings.confidence_weighting else torch.ones_like(mask)
    tokens, total_weight = learned.sum().clamp(min=1), (trust * learned).sum().clamp(min=1e-6)
    weights = trust * mask
    means, gradients = flat.new_zeros(2, dtype=torch.float32), []
    for part in parts:
        piece, logits = chunk(part)
        loss = 0.0
        if teacher is not None:
            kl = teacher(logits, part)
            means[1] += (kl.detach() * mask[part]).sum() / tokens
            loss = settings.kl_weight * kl
        ce = cross_entropy(logits, labels[part], settings.kernel)  # after the KL: it may overwrite the logits
        means[0] += (ce.detach() * mask[part]).sum() / tokens
        ((loss + settings.ce_weight * ce) * weights[part]).sum().mul(scale / total_weight).backward()
        gradients.append(piece.grad)
    return means, torch.cat(gradients).view_as(hidden) if needs_grad else hidden.new_empty(0)


def _confidence(logits_of: Callable[[slice], tuple[torch.Tensor, torch.Tensor]], parts: list[slice]) -> torch.Tensor:
    # Its sum normalises the loss, so it is needed before the first gradient: one more head pass.
    with torch.no_grad():
        return torch.cat([confidence(logits_of(part)[1]) for part in parts])


def loss_weight(final: float, initial: float, step: int, warmup_steps: int, style: str) -> float:
    """Weight of an exit's loss at `step` (0-based): initial + ratio x (final - initial) (EE-LLM's warm-up).

    ratio grows from 0 to 1 over `warmup_steps`: linear, or 0.5 (1 - cos(pi x)).
    """
    x = 1.0 if step >= warmup_steps else step / warmup_steps
    ratio = x if style == "linear" else 0.5 * (1 - cos(pi * x))
    return initial + ratio * (final - initial)
