"""Gradient clipping, by groups of parameters that belong together.

Exits share no parameter, so each is clipped by its own norm: no collective crosses stages, and the result does not
depend on how the exits are spread over stages. A supernet is one group over all stages. Reads the averaged gradients
where DeepSpeed's two optimizers keep them between the reduction and the step.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from ee_scale.backbone.parallel import cut_dim
from ee_scale.engine.guard import UpdateGuard
from ee_scale.grid import Grid

Optimizer = BF16_Optimizer | DeepSpeedZeroOptimizer  # of DeepSpeed, in bf16 and in fp32
CLIP_KEY = "clip_group"  # key of a param group: groups with the same number (an exit's layer) share one norm
COPY = "is_copy"  # attribute of a parameter whose original lies on another stage
ALL, TOGETHER = 0, "all"  # number of the one group where everything belongs together; its key in metrics


@torch.no_grad()
def clip_groups(
    optimizer: Optimizer,
    max_norm: float,
    grid: Grid,
    guard: UpdateGuard,
    losses: dict[int, torch.Tensor],
    across_stages: bool = False,
) -> dict[int, torch.Tensor]:
    """Scale each group's gradient to an L2 norm of at most `max_norm` (0: leave it). Returns the norms before.

    losses: of each group, a scalar of this replica and stage; `guard` decides by them, and by the norms, which groups
    are not updated: their gradients become zero and they are marked for `GuardedAdamW`.
    across_stages: every pipeline stage holds a part of the same groups.
    """
    groups = optimizer.optimizer.param_groups
    keys = sorted({group[CLIP_KEY] for group in groups})
    totals = torch.stack([losses[key].float() for key in keys])
    dist.all_reduce(totals, group=grid.dp_group)
    squares = torch.zeros(len(keys), device=grid.device)
    for index, group in enumerate(groups):
        for parameter, gradient in _gradients(optimizer, index):
            # A parameter that is whole on every tensor rank, or has copies on other stages, counts once.
            if (cut_dim(parameter) is not None or grid.tp_rank == 0) and not getattr(parameter, COPY, False):
                squares[keys.index(group[CLIP_KEY])] += gradient.float().pow(2).sum()
    dist.all_reduce(squares, group=grid.tp_group)
    if not isinstance(optimizer, BF16_Optimizer):
        dist.all_reduce(squares, group=grid.dp_group)
    if across_stages:
        both = torch.stack([squares, totals])
        dist.all_reduce(both, group=grid.pp_group)
        squares, totals = both
    norms = dict(zip(keys, squares.sqrt(), strict=True))
    skipped = guard.judge(keys, totals / grid.layout.dp, squares)
    for index, group in enumerate(groups):
        group["skipped"] = group[CLIP_KEY] in skipped
        factor = (max_norm / (norms[group[CLIP_KEY]] + 1e-6)).clamp(max=1.0)
        for _, gradient in _gradients(optimizer, index):
            if group["skipped"]:
                gradient.zero_()  # 0 x inf is no number, and DeepSpeed would drop the other groups' update too
            elif max_norm > 0:
                gradient.mul_(factor)
    return norms


def _gradients(optimizer: Optimizer, index: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(parameter, averaged gradient) of a group: whole on every replica (bf16), or this replica's part (fp32 ZeRO)."""
    if isinstance(optimizer, BF16_Optimizer):
        return zip(optimizer.bf16_groups[index], optimizer.fp32_groups_gradients[index], strict=True)
    parts = [part for part in optimizer.averaged_gradients[index] if not getattr(part, "_zero_padding", False)]
    # DeepSpeed marks its padding, except for the zeros that fill up the last replica's part at the end.
    return zip(optimizer.params_in_partition[index], parts, strict=False)
