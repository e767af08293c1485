"""Low-rank adapters beside frozen projections (LoRA, arXiv 2106.09685, with alpha = r), cut as the projections are."""

from collections.abc import Iterator, Sequence
from math import sqrt

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import nn

from ee_scale.backbone.digest import named_generator
from ee_scale.backbone.narrowing import narrowed
from ee_scale.backbone.parallel import COLUMN, ROW, ColumnLinear, RowLinear, update_beside
from ee_scale.backbone.shard import BackboneStage
from ee_scale.grid import Grid

DOWN, UP = ".lora_A.weight", ".lora_B.weight"  # [r, in] and [out, r], by the names of PEFT


def add_adapters(
    backbone: BackboneStage, rank: int, targets: Sequence[str], grid: Grid, seed: int
) -> dict[str, nn.Parameter]:
    """Attach a pair to every projection that `targets` names; returns the pairs by name in the whole model.

    They start as no change: down is uniform in +-1/sqrt(in) (as `nn.Linear`), up is zero. A hook adds them, so that
    the frozen projections keep their names.
    """
    adapters: dict[str, nn.Parameter] = {}
    for name, projection in _projections(backbone, targets):
        adapters |= _add_adapter(name, projection, rank, grid, seed)
    return adapters


def _add_adapter(name: str, projection: nn.Module, rank: int, grid: Grid, seed: int) -> dict[str, nn.Parameter]:
    style = _style(projection)
    out, inner = projection.weight.shape
    tp, tp_rank = (grid.layout.tp, grid.tp_rank) if style == ROW else (1, 0)
    bound = 1 / sqrt(inner * tp)
    whole = torch.empty(rank, inner * tp).uniform_(-bound, bound, generator=named_generator(name + DOWN, seed))
    options = {"device": grid.device, "dtype": projection.weight.dtype}
    down = nn.Parameter(whole.narrow(1, tp_rank * inner, inner).to(**options).contiguous())
    up = nn.Parameter(torch.zeros(out, rank, **options))
    if style == ROW:
        set_tensor_model_parallel_attributes(down, True, 1, 1)
    if style == COLUMN:
        set_tensor_model_parallel_attributes(up, True, 0, 1)
    projection.register_forward_hook(
        lambda module, args, output: output + update_beside(module, args[0], down, up, grid.tp_group)
    )
    return {name + DOWN: down, name + UP: up}


def _style(projection: nn.Module) -> str | None:
    """How the tensor group holds it; None: whole everywhere."""
    if isinstance(projection, ColumnLinear):
        return COLUMN
    return ROW if isinstance(projection, RowLinear) else None


def merged(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, name: str) -> torch.Tensor:
    """Projection `name` with its adapter inside: [out, in], in the type of `weight`, rounded once.

    Raises `NarrowingError` for a sum that this type has not.
    """
    return narrowed(weight.float() + up.float() @ down.float(), weight.dtype, name)


def _projections(backbone: BackboneStage, targets: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    prefixes = backbone.family.prefixes(targets)
    for index, layer in zip(backbone.layer_indices, backbone.base.layers, strict=True):
        for name, module in layer.named_modules():
            if name.startswith(prefixes) and isinstance(module, nn.Linear | ColumnLinear | RowLinear):
                yield f"model.layers.{index}.{name}", module
