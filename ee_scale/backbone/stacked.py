"""Tensor ranks in one process: each is a part of the batch, and holds its slices of the projections.

What ranks compute by themselves runs on all parts at once; where they would meet, the parts are summed or joined.
x: [tp x B, S, D], rank r in rows r x B to (r + 1) x B.
"""

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ee_scale.backbone.experts import own_units
from ee_scale.backbone.parallel import COLUMN, EXPERTS, GATHERED, SPLIT, swap_linears


class StackedLinear(nn.Module):
    """One projection, cut over `tp` ranks in the style of transformers' plan."""

    def __init__(self, whole: nn.Linear, style: str, tp: int):
        super().__init__()
        rows, bias = style in (COLUMN, GATHERED), whole.bias
        self.weights = whole.weight.chunk(tp, 0 if rows else 1)
        self.biases = bias.chunk(tp) if rows and bias is not None else [None] * tp
        self.bias = None if rows else bias  # whole on every rank, added to the sum
        self.style, self.tp = style, tp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = list(x.chunk(self.tp))
        if self.style == SPLIT:
            parts = [part.chunk(self.tp, -1)[rank] for rank, part in enumerate(parts)]
        out = [F.linear(*each) for each in zip(parts, self.weights, self.biases, strict=True)]
        if self.style == COLUMN:
            return torch.cat(out)
        if self.style == GATHERED:
            return torch.cat([torch.cat(out, -1)] * self.tp)
        met = torch.stack(out).sum(0)
        return torch.cat([met if self.bias is None else met + self.bias] * self.tp)


class StackedExperts(nn.Module):
    """The experts of a layer, each with its units dealt to `tp` ranks."""

    def __init__(self, whole: nn.Module, tp: int):
        super().__init__()
        self.ranks = nn.ModuleList(copy.deepcopy(whole) for _ in range(tp))
        for rank, experts in enumerate(self.ranks):
            for name, parameter in whole.named_parameters(recurse=False):
                experts.register_parameter(name, nn.Parameter(own_units(name, parameter, rank, tp)))

    def forward(self, x: torch.Tensor, *routes: torch.Tensor) -> torch.Tensor:
        """x, experts and their weights: [tp x B x S, ...]."""
        parts = zip(*(tensor.chunk(len(self.ranks)) for tensor in (x, *routes)), strict=True)
        out = [experts(*part) for experts, part in zip(self.ranks, parts, strict=True)]
        return torch.cat([torch.stack(out).sum(0)] * len(self.ranks))


def stack_ranks(layers: nn.ModuleList, plan: Mapping[str, str], tp: int) -> None:
    """Cut decoder layers in place; `plan` is by the name inside a layer."""
    for layer in layers:
        swap_linears(layer, plan, "", lambda linear, style: StackedLinear(linear, style, tp))
        for name, module in list(layer.named_modules()):
            if plan.get(name) == EXPERTS:
                layer.set_submodule(name, StackedExperts(module, tp))
