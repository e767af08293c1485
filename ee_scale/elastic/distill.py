"""What a subnet learns from: the task, the teacher's output, the teacher's hidden states."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ee_scale.backbone.digest import named_generator
from ee_scale.config.supernet import DistillConfig
from ee_scale.exits.losses import LossSettings

FROZEN, LIVE = "frozen", "live"


class FeatureLoss:
    """Distance of projected hidden states to the teacher's, layer by layer (MLFS: sum_l ||U_j h_j - U h||^2).

    Student layer l and its teacher are the same layer, so the loss is local to a pipeline stage. U [p, D] has fixed
    orthonormal rows (a learned one can shrink to zero); a subnet uses its first D' columns. Each sequence's squared
    distance is divided by its teacher's mean square, so that one weight fits all layers and replicas add up.
    """

    def __init__(self, hidden_size: int, dim: int, seed: int, device: torch.device, dtype: torch.dtype):
        dim = min(dim, hidden_size)
        random = torch.randn(hidden_size, dim, generator=named_generator("features", seed), dtype=torch.float64)
        self.projection = torch.linalg.qr(random).Q.t().contiguous().to(device, dtype)

    def project(self, states: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """[B, S, D'] -> [B, S, p] for each layer."""
        return {i: F.linear(state, self.projection[:, : state.shape[-1]]) for i, state in states.items()}

    def __call__(
        self, student: Mapping[int, torch.Tensor], teacher: Mapping[int, torch.Tensor], mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Sum over the stage's kept layers; mask [B, S] says which positions count. Scalar, fp32."""
        total = torch.zeros((), device=self.projection.device)
        for i, projected in self.project(student).items():
            target = teacher[i].float()
            weight = torch.ones(target.shape[:-1], device=target.device) if mask is None else mask.float()
            distance = ((projected.float() - target).pow(2).mean(-1) * weight).sum(-1)
            power = (target.pow(2).mean(-1) * weight).sum(-1)
            total = total + (distance / power.clamp(min=1e-12)).mean()
        return total


def token_losses(distill: DistillConfig, vocab_size: int, kernel: str, *, learns: bool) -> LossSettings:
    """The losses of a causal LM's tokens; `learns`: from a teacher too, not from the task alone."""
    alpha = distill.kl_weight if learns else 0.0
    return LossSettings(
        vocab_size,
        distill.loss_chunk_tokens,
        ce_weight=1 - alpha,
        kl_weight=alpha,
        kl_temperature=distill.temperature,
        kernel=kernel,
    )


def text_backward(
    head: nn.Module,
    final: torch.Tensor,
    labels: torch.Tensor,
    distill: DistillConfig,
    scale: float,
    teacher_logits: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Backward of (1 - kl_weight) task loss + kl_weight KL(teacher || subnet) into a classifier; without a teacher of
    the task loss.

    final [B, D'], teacher_logits [B, C]. Returns (fp32 [2]: task loss and KL, gradient of final).
    """
    alpha = 0.0 if teacher_logits is None else distill.kl_weight
    leaf = final.detach().requires_grad_(final.requires_grad)
    logits = head(leaf).float()
    task_loss = F.cross_entropy(logits, labels)
    loss, kl = (1 - alpha) * task_loss, torch.zeros((), device=logits.device)
    if teacher_logits is not None:
        t = distill.temperature
        kl = (
            t
            * t
            * F.kl_div(
                (logits / t).log_softmax(-1),
                (teacher_logits.float() / t).log_softmax(-1),
                log_target=True,
                reduction="batchmean",
            )
        )
        loss = loss + alpha * kl
    (loss * scale).backward()
    return torch.stack([task_loss.detach(), kl.detach()]), leaf.grad
