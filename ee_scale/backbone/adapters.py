"""Low-rank adapters beside frozen projections (LoRA, arXiv 2106.09685, with alpha = r), cut as the projections are."""

from collections.abc import Iterator, Sequence
from math import sqrt

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import nn

from ee_scale.backbone.digest import named_generator
from ee_scale.backbone.narrowing import narrowed
from ee_scale.backbone.parallel import COLUMN, ROW, ColumnLinear, RowLinear, low_rank_update
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
        style = COLUMN if isinstance(projection, ColumnLinear) else ROW if isinstance(projection, RowLinear) else None
        out, inner = projection.weight.shape
        tp = grid.layout.tp if style == ROW else 1
        whole = torch.empty(rank, inner * tp)
        whole.uniform_(-1 / sqrt(inner * tp), 1 / sqrt(inner * tp), generator=named_generator(name + DOWN, seed))
        options = {"device": grid.device, "dtype": projection.weight.dtype}
        start = grid.tp_rank * inner if style == ROW else 0
        down = nn.Parameter(whole.narrow(1, start, inner).to(**options).contiguous())
        up = nn.Parameter(torch.zeros(out, rank, **options))
        if style == ROW:
            set_tensor_model_parallel_attributes(down, True, 1, 1)
        if style == COLUMN:
            set_tensor_model_parallel_attributes(up, True, 0, 1)
        projection.register_forward_hook(
            lambda module, args, output, down=down, up=up, style=style: (
                output + low_rank_update(args[0], down, up, style, grid.tp_group)
            )
        )
        adapters |= {name + DOWN: down, name + UP: up}
    return adapters


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
