"""Trained state as whole fp32 tensors, whatever the grid: out of DeepSpeed's partitions and back."""

from collections.abc import Callable, Iterable, Iterator

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import nn

from ee_scale.engine.clipping import CLIP_KEY, Optimizer
from ee_scale.engine.staging import Staging

MOMENTS = ("exp_avg", "exp_avg_sq")

# (name, parameter, this rank's part) -> the whole tensor, and back: how a kind of run cuts tensors over tensor ranks.
Gather = Callable[[str, nn.Parameter, torch.Tensor], torch.Tensor]
Local = Callable[[str, nn.Parameter, torch.Tensor], torch.Tensor]


def start_moments(optimizer: Optimizer, updates: Callable[[int], int] = lambda group: 0) -> None:
    """Give AdamW its moments now, and tell DeepSpeed where they lie. `updates`: made so far, by clip group.

    DeepSpeed links them after the first step of the first group, when those of later groups do not exist yet.
    """
    adam = optimizer.optimizer
    for group in adam.param_groups:
        for parameter in group["params"]:
            state = adam.state[parameter]
            state["step"] = torch.tensor(float(updates(group[CLIP_KEY])), device=parameter.device)
            for name in MOMENTS:
                state.setdefault(name, torch.zeros_like(parameter))
    optimizer._lazy_init_hp_params_optimizer_state()


def whole_tensors(
    parameters: Iterable[tuple[str, nn.Parameter]], gather: Gather, staging: Staging
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """For each parameter its name and {'param', 'exp_avg', 'exp_avg_sq'}: whole, fp32, on the CPU.

    A collective over the stage's replicas and tensor ranks; all of them call it, one parameter at a time.
    """
    for name, parameter in parameters:
        parts = {"param": safe_get_full_fp32_param(parameter)}
        parts |= {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
        wholes = {key: gather(name, parameter, part.view(parameter.shape)) for key, part in parts.items()}
        yield name, {key: staging.to_host(whole) for key, whole in wholes.items()}


def restore_tensors(
    parameters: Iterable[tuple[str, nn.Parameter]],
    read: Callable[[str, str], torch.Tensor],
    local: Local,
    optimizer: Optimizer,
    updates: Callable[[int], int],
) -> None:
    """Fill all parameters of a stage and their moments from `read(name, 'param' | 'exp_avg' | 'exp_avg_sq')`, whole."""
    start_moments(optimizer, updates)
    for name, parameter in parameters:
        for key in ("param", *MOMENTS):
            part = local(name, parameter, read(name, key)).to(parameter.device)
            if key == "param":
                safe_set_full_fp32_param(parameter, part)
            else:
                safe_set_full_optimizer_state(parameter, part, key)
    optimizer.update_lp_params()
