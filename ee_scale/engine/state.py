"""The exits' trained state as whole fp32 tensors, whatever the grid: out of DeepSpeed's partitions and back."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import nn

from ee_scale.backbone.parallel import cut_dim
from ee_scale.backbone.shard import is_vocabulary
from ee_scale.exits.stage import local_slice
from ee_scale.grid import Grid

MOMENTS = ("exp_avg", "exp_avg_sq")


def start_moments(optimizer: Any, step: int = 0) -> None:
    """Give AdamW its moments now, and tell DeepSpeed where they lie.

    DeepSpeed links them after the first step of the first group, when those of later groups do not exist yet.
    """
    adam = optimizer.optimizer
    for group in adam.param_groups:
        for parameter in group["params"]:
            state = adam.state[parameter]
            state["step"] = torch.tensor(float(step), device=parameter.device)
            for name in MOMENTS:
                state.setdefault(name, torch.zeros_like(parameter))
    optimizer._lazy_init_hp_params_optimizer_state()


def whole_tensors(
    parameters: Iterable[tuple[str, nn.Parameter]], vocab_size: int, grid: Grid
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """For each parameter its name and {'param', 'exp_avg', 'exp_avg_sq'}: whole, fp32, on the CPU.

    A collective over the stage's replicas and tensor ranks; all of them call it, one parameter at a time.
    """
    for name, parameter in parameters:
        parts = {"param": safe_get_full_fp32_param(parameter)}
        parts |= {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
        yield name, {key: _gather(part, parameter, name, vocab_size, grid).cpu() for key, part in parts.items()}


def restore_tensors(
    parameters: Iterable[tuple[str, nn.Parameter]],
    read: Callable[[str, str], torch.Tensor],
    optimizer: Any,
    step: int,
    grid: Grid,
) -> None:
    """Fill all parameters of a stage and their moments from `read(name, 'param' | 'exp_avg' | 'exp_avg_sq')`, whole."""
    start_moments(optimizer, step)
    for name, parameter in parameters:
        for key in ("param", *MOMENTS):
            part = local_slice(read(name, key), parameter, grid.tp_rank).to(grid.device)
            if key == "param":
                safe_set_full_fp32_param(parameter, part)
            else:
                safe_set_full_optimizer_state(parameter, part, key)
    optimizer.update_lp_params()


def _gather(part: torch.Tensor, parameter: nn.Parameter, name: str, vocab_size: int, grid: Grid) -> torch.Tensor:
    dim = cut_dim(parameter)
    if dim is None:
        return part
    parts = [torch.empty_like(part) for _ in range(grid.layout.tp)]
    dist.all_gather(parts, part.contiguous(), group=grid.tp_group)
    whole = torch.cat(parts, dim=dim)
    return whole.narrow(0, 0, vocab_size) if is_vocabulary(name) else whole
