"""Elastic layers: the frozen weight and its low-rank factors, cut to the sizes that are active now.

Real slicing: the first rows and columns of matrices whose units are sorted by importance. The rank r is never cut.
Gradients of every factor are whole on every tensor rank that holds a copy (see `ElasticLinear.forward`).
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region as copy_to,
)
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region as reduce_from,
)
from torch import nn
from torch.func import functional_call

from ee_scale.backbone.parallel import COLUMN, ROW, low_rank_update
from ee_scale.elastic.subnet import ElasticShape, SubnetSpec
from ee_scale.families.family import SHARDED, VOCAB


class Active:
    """What every elastic module of a stage reads at each call: the subnet's sizes, and how many phases count."""

    def __init__(self, shape: ElasticShape, tp: int):
        self._shape, self._tp = shape, tp
        self.phases = 0
        self.lengths: dict[str, int] = {}
        self.select(shape.full)

    def select(self, spec: SubnetSpec) -> None:
        """Make a subnet the active one. Lengths are those of this rank."""
        sizes = self._shape.sizes(spec)
        self.lengths = {axis: size // self._tp if axis in SHARDED else size for axis, size in sizes.items()}

    def cut(self, tensor: torch.Tensor, axes: tuple[str, ...]) -> torch.Tensor:
        """A view of the active part of a tensor."""
        return tensor[tuple(slice(self.lengths.get(axis)) for axis in axes)]


class ElasticModule(nn.Module):
    """A frozen module of the base model and what the recipe's phases trained on top of it.

    Attributes:
        axes: of the weight; a bias lies along the first.
        trained: phase -> leaf -> parameter. Leaves: 'A' [out, r] and 'B' [r, in] of a low-rank update; 'weight'
            and 'bias': whole updates, added to the frozen tensor of that name.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        axes: tuple[str, ...],
        active: Active,
        group: dist.ProcessGroup,
    ):
        super().__init__()
        self.axes, self.active, self.group = axes, active, group
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.trained: dict[int, dict[str, nn.Parameter]] = {}
        self.merged: set[int] = set()

    def leaf_axes(self, leaf: str) -> tuple[str, ...]:
        """Axes of a leaf of `trained`."""
        return {"A": (self.axes[0], "rank"), "B": ("rank", self.axes[-1]), "bias": self.axes[:1]}.get(leaf, self.axes)

    @torch.no_grad()
    def merge(self, phase: int) -> None:
        """Add what a phase trained to the frozen tensors (in fp32); it is kept, to be saved."""
        leaves = {leaf: parameter.float() for leaf, parameter in self.trained.get(phase, {}).items()}
        if phase in self.merged or not leaves:
            return
        if "A" in leaves:
            leaves["weight"] = leaves.get("weight", 0) + leaves["A"] @ leaves["B"]
        for name in ("weight", "bias"):
            if name in leaves:
                tensor = getattr(self, name)
                tensor.copy_(tensor.float() + leaves[name])
        self.merged.add(phase)

    def _phases(self) -> Iterator[dict[str, nn.Parameter]]:
        for phase, leaves in self.trained.items():
            if phase < self.active.phases and phase not in self.merged:
                yield leaves

    def _tensor(self, name: str) -> torch.Tensor | None:
        """The active part of weight or bias with all whole updates."""
        tensor, axes = getattr(self, name), self.leaf_axes(name)
        if tensor is None:
            return None
        tensor = self.active.cut(tensor, axes)
        for leaves in self._phases():
            if name in leaves:
                tensor = tensor + self.active.cut(leaves[name], axes).to(tensor.dtype)
        return tensor

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for leaves in self._phases():
            if "A" in leaves:
                yield tuple(self.active.cut(leaves[leaf], self.leaf_axes(leaf)) for leaf in "AB")


class ElasticLinear(ElasticModule):
    """[..., in'] -> [..., out'].

    COLUMN: outputs are dealt to the tensor ranks, ROW: inputs are, summed over the group; None: whole everywhere.
    """

    @property
    def style(self) -> str | None:
        column = self.axes[0] in (*SHARDED, VOCAB)
        return COLUMN if column else ROW if self.axes[1] in SHARDED else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The frozen part, and the pairs as `low_rank_update` adds them."""
        bias, row = self._tensor("bias"), self.style == ROW and self.group.size() > 1
        source = copy_to(x, self.group) if self.style == COLUMN else x
        y = F.linear(source, self._tensor("weight"), None if row else bias)
        if row:
            y = reduce_from(y, self.group)
        for up, down in self._pairs():
            y = y + low_rank_update(x, down, up, self.style, self.group)
        return y + bias if row and bias is not None else y


class FusedLinear(nn.Module):
    """[..., in'] -> the outputs of several projections, side by side: a module that the model has in one piece."""

    def __init__(self, parts: Iterable[ElasticLinear]):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.parts], -1)


class ElasticEmbedding(ElasticModule):
    """Ids -> [..., D']. Rows are cut over the group for the vocabulary; other tables are whole on every rank."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids of any shape."""
        cut = self.axes[0] == VOCAB and self.group.size() > 1
        if cut:
            local = ids - self.group.rank() * self.weight.shape[0]
            outside = (local < 0) | (local >= self.weight.shape[0])
            ids = local.masked_fill(outside, 0)

        def look_up(table: torch.Tensor) -> torch.Tensor:
            rows = F.embedding(ids, table)
            return reduce_from(rows.masked_fill(outside.unsqueeze(-1), 0), self.group) if cut else rows

        y = look_up(self._tensor("weight"))
        for up, down in self._pairs():
            y = y + F.linear(look_up(up), down.t())
        return y


class ElasticNorm(ElasticModule):
    """A norm over the active width. LayerNorm is torch's; an RMSNorm is the model's own module on the cut weight."""

    def __init__(self, module: nn.Module, *args: Any):
        super().__init__(*args)
        self._module = [module]  # unregistered: its own weight is on the meta device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D'] -> [..., D']."""
        weight, module = self._tensor("weight"), self._module[0]
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(x, weight.shape, weight, self._tensor("bias"), module.eps)
        return functional_call(module, {"weight": weight}, (x,))
