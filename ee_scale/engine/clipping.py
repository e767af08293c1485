"""Gradient clipping, exit by exit.

Exits share no parameter, so each is clipped by its own norm: no collective crosses stages, and the result does not
depend on how the exits are spread over stages. Reads the averaged gradients where DeepSpeed's two optimizers keep
them between the reduction and the step.
"""

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import get_global_norm_of_tensors, is_model_parallel_parameter

EXIT_KEY = "exit_layer"  # key of a param group: the exit that it belongs to


@torch.no_grad()
def clip_exits(optimizer: object, max_norm: float, mpu: object) -> dict[int, torch.Tensor]:
    """Scale each exit's gradient to a norm of at most `max_norm` (0: leave it). Returns the norms before clipping."""
    groups = optimizer.optimizer.param_groups
    squares: dict[int, torch.Tensor] = {}
    for index, group in enumerate(groups):
        square = _group_norm(optimizer, index, mpu) ** 2
        squares[group[EXIT_KEY]] = squares.get(group[EXIT_KEY], 0.0) + square
    norms = {k: square.sqrt() for k, square in squares.items()}
    if max_norm > 0:
        for index, group in enumerate(groups):
            factor = (max_norm / (norms[group[EXIT_KEY]] + 1e-6)).clamp(max=1.0)
            for gradient in _gradients(optimizer, index):
                gradient.mul_(factor)
    return norms


def _gradients(optimizer: object, index: int) -> list[torch.Tensor]:
    """The averaged gradients of a group: whole on every replica (bf16), or this replica's partition (fp32 ZeRO)."""
    if isinstance(optimizer, BF16_Optimizer):
        return optimizer.fp32_groups_gradients[index]
    return optimizer.averaged_gradients[index]


def _group_norm(optimizer: object, index: int, mpu: object) -> torch.Tensor:
    """L2 norm of a group over the tensor group; a parameter that is whole on every tensor rank counts once."""
    gradients = _gradients(optimizer, index)
    if not isinstance(optimizer, BF16_Optimizer):
        return optimizer.get_grad_norm_direct(gradients, optimizer.params_in_partition[index])
    counted = [
        gradient
        for parameter, gradient in zip(optimizer.bf16_groups[index], gradients, strict=True)
        if is_model_parallel_parameter(parameter) or mpu.get_model_parallel_rank() == 0
    ]
    return torch.as_tensor(get_global_norm_of_tensors(input_tensors=counted, mpu=mpu), dtype=torch.float32)
