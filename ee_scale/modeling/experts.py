"""The dense MLP that an exit has where a layer has a mixture of experts.

An exit trains no router, so its MLP is dense, and costs what a token pays in the layer. It starts as the layer's shared
expert where there is one (without the gate in front of it: that is a number per token, which no dense MLP has).
Otherwise it starts as the first k experts side by side, where k go to a token: their units in one MLP, the output
matrices divided by k. That is what the layer computes with a router that finds those k equally good and no other. Ways
to gather experts in a dense MLP of one expert's size (sums, averages, choices of their units) are compared in arXiv
2201.10890; at the size of k experts the units of k can stay as they are.
"""

from collections.abc import Mapping

import torch
from torch import nn


class DenseMlp(nn.Module):
    """down(act(gate(x)) * up(x)): [..., D] -> [..., D]."""

    def __init__(self, weights: Mapping[str, torch.Tensor], act_fn: nn.Module):
        """`weights`: `gate_proj` and `up_proj` [F, D], `down_proj` [D, F]."""
        super().__init__()
        for name, weight in weights.items():
            units, width = weight.shape
            linear = nn.Linear(width, units, bias=False, device="meta")
            linear.weight = nn.Parameter(weight)
            self.add_module(name, linear)
        self.act_fn = act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def dense_part(mlp: nn.Module) -> nn.Module:
    """What an exit starts from, of the MLP of a layer: itself, or what is said above of a mixture of experts."""
    experts = getattr(mlp, "experts", None)
    if experts is None:
        return mlp
    if hasattr(mlp, "shared_expert"):
        return mlp.shared_expert
    k = experts.config.num_experts_per_tok
    inputs, output = dense_inputs(experts.gate_up_proj[:k].detach()), dense_output(experts.down_proj[:k].detach())
    return DenseMlp(inputs | {"down_proj": output}, experts.act_fn)


def dense_inputs(gate_up: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the dense MLP of k experts with weights [k, 2 F, D]: gate and up [k F, D]."""
    gate, up = gate_up.chunk(2, 1)
    return {"gate_proj": gate.flatten(0, 1), "up_proj": up.flatten(0, 1)}


def dense_output(down: torch.Tensor) -> torch.Tensor:
    """The same for its output matrix: [k, D, F] -> [D, k F]."""
    return (down.float() / len(down)).to(down.dtype).transpose(0, 1).flatten(1)
