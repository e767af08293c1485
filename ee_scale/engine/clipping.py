"""Gradient clipping, by groups of parameters that belong together.

Exits share no parameter, so each is clipped by its own norm: no collective crosses stages, and the result does not
depend on how the exits are spread over stages. A supernet is one group over all stages. Reads the averaged gradients
where DeepSpeed's two optimizers keep them between the reduction and the step.
"""

from collections.abc import Iterator, Sequence

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
    are not updated: they are marked for `GuardedAdamW`.
    across_stages: every pipeline stage holds a part of the same groups.
    """
    groups = optimizer.optimizer.param_groups
    assert sorted({group[CLIP_KEY] for group in groups}) == sorted(guard.keys)
    places = [guard.keys.index(group[CLIP_KEY]) for group in groups]
    totals = torch.stack([losses[key].float() for key in guard.keys])
    dist.all_reduce(totals, group=grid.dp_group)
    squares = torch.zeros(len(guard.keys), device=grid.device)
    for index, place in enumerate(places):
        # A parameter that is whole on every tensor rank, or has copies on other stages, counts once.
        counted = [
            gradient
            for parameter, gradient in _gradients(optimizer, index)
            if (cut_dim(parameter) is not None or grid.tp_rank == 0) and not getattr(parameter, COPY, False)
        ]
        squares[place] += sum_of_squares(counted, grid.device)
    dist.all_reduce(squares, group=grid.tp_group)
    if not isinstance(optimizer, BF16_Optimizer):
        dist.all_reduce(squares, group=grid.dp_group)
    if across_stages:
        both = torch.stack([squares, totals])
        dist.all_reduce(both, group=grid.pp_group)
        squares, totals = both
    norms = squares.sqrt()
    left_out = guard.judge(totals / grid.layout.dp, squares)
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    for index, place in enumerate(places):
        groups[index]["left_out"] = left_out[place]
        _scale(optimizer, index, factors[place] if max_norm > 0 else None, left_out[place])
    return dict(zip(guard.keys, norms, strict=True))


def sum_of_squares(tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Over all numbers, fp32 scalar: a few launches for all tensors together. 0 for none."""
    if not tensors:
        return torch.zeros((), device=device)
    # In fp64, because fp32 norms of large tensors are wrong on a CPU: by 3% at 200 million numbers.
    return torch.stack(torch._foreach_norm(tensors, 2, torch.float64)).square().sum().float()


def _scale(optimizer: Optimizer, index: int, factor: torch.Tensor | None, left_out: torch.Tensor) -> None:
    """What this replica updates of a group by."""
    if isinstance(optimizer, BF16_Optimizer):
        if factor is not None:
            optimizer.fp32_groups_gradient_flat_partition[index].mul_(factor)
        return
    # 0 x inf is no number, and DeepSpeed would drop the other groups' update too. In fp32 it waits for the device in
    # any case, for a norm of its own.
    gradients = [gradient for _, gradient in _gradients(optimizer, index)]
    if left_out:
        torch._foreach_zero_(gradients)
    elif factor is not None and gradients:
        torch._foreach_mul_(gradients, factor)


def _gradients(optimizer: Optimizer, index: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(parameter, averaged gradient) of a group: whole on every replica (bf16), or this replica's part (fp32 ZeRO)."""
    if isinstance(optimizer, BF16_Optimizer):
        return zip(optimizer.bf16_groups[index], optimizer.fp32_groups_gradients[index], strict=True)
    parts = [part for part in optimizer.averaged_gradients[index] if not getattr(part, "_zero_padding", False)]
    # DeepSpeed marks its padding, except for the zeros that fill up the last replica's part at the end.
    return zip(optimizer.params_in_partition[index], parts, strict=False)
