"""One tensor rank's part of a decoder layer on the meta device, and what ranks join inside of it."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ee_scale.backbone.parallel import COLUMN, GATHERED, SPLIT, swap_linears


class Gathered(nn.Linear):
    """[..., in] -> [..., out]: this rank's rows, and space for what the others give."""

    def __init__(self, whole: nn.Linear, tp: int):
        weight = whole.weight
        own = whole.out_features // tp
        super().__init__(whole.in_features, own, whole.bias is not None, device=weight.device, dtype=weight.dtype)
        self.tp = tp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.whole(super().forward(x))

    def whole(self, out: torch.Tensor) -> torch.Tensor:
        """[..., out/tp] -> [..., out]."""
        return torch.cat([out, *(torch.empty_like(out) for _ in range(self.tp - 1))], -1)


class Split(nn.Linear):
    """[..., in] -> [..., out]: this rank's columns, which read its part of the input."""

    def __init__(self, whole: nn.Linear, tp: int):
        weight = whole.weight
        own = whole.in_features // tp
        super().__init__(own, whole.out_features, whole.bias is not None, device=weight.device, dtype=weight.dtype)
        self.tp = tp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.own(x))

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., in/tp]."""
        return x.chunk(self.tp, -1)[0].contiguous()


def gathers(plan: Mapping[str, str], prefixes: tuple[str, ...]) -> bool:
    """Whether projections whose names begin so are joined behind each."""
    return any(style == GATHERED and name.startswith(prefixes) for name, style in plan.items())


def cut_gathered(layer: nn.Module, plan: Mapping[str, str], tp: int) -> None:
    """Put this rank's part in the place of each projection that is joined, or reads a joined input."""

    def part(linear: nn.Linear, style: str) -> nn.Module:
        if style == GATHERED:
            return Gathered(linear, tp)
        return Split(linear, tp) if style == SPLIT else linear

    swap_linears(layer, plan, "", part)


def input_gradients(layer: nn.Module, plan: Mapping[str, str]) -> int:
    """All-reduces of a layer's backward pass: each projection that is cut by columns sums the gradient of its input."""
    return sum(plan.get(name) in (COLUMN, GATHERED) for name, _ in layer.named_modules())


def joined(passes: Iterable[tuple[nn.Module | None, bool]]) -> tuple[int, int]:
    """(calls, numbers of each token) of what tensor ranks gather in passes through modules of one rank's layers:
    outputs, and where there is a backward pass the gradients of what is split."""
    widths = []
    for module, backward in passes:
        for part in module.modules() if module else ():
            if isinstance(part, Gathered):
                widths.append(part.out_features * part.tp)
            elif isinstance(part, Split) and backward:
                widths.append(part.in_features * part.tp)
    return len(widths), sum(widths)
