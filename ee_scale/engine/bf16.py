"""The end of a step of DeepSpeed's BF16_Optimizer without what it costs there: a copy of all gradients, a second norm,
and waits for the device. Which updates are left out is decided before (`engine.guard`)."""

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer


def reduce_gradients(optimizer: BF16_Optimizer, group: dist.ProcessGroup) -> None:
    """Average the fp32 gradients over the replicas, where they lie."""
    if group.size() == 1:
        return
    for gradients in optimizer.fp32_groups_gradients_flat:
        dist.all_reduce(gradients, group=group)
        gradients.mul_(1 / group.size())


@torch.no_grad()
def update(optimizer: BF16_Optimizer) -> None:
    """Step on this replica's part of the master copies; gather the bf16 parameters; forget the gradients."""
    parts = zip(optimizer.fp32_groups_flat_partition, optimizer.fp32_groups_gradient_flat_partition, strict=True)
    for master, gradient in parts:
        master.grad = gradient
    optimizer.optimizer.step()
    optimizer.update_lp_params()
    optimizer.zero_grad()
