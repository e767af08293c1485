"""An exit kind in a file of its own: it reads the hidden state one layer earlier."""

from collections.abc import Callable

from torch import nn
from torch.utils.hooks import RemovableHandle

from ee_scale.modeling.kinds import ExitKind, Tap, register


class Previous(ExitKind):
    """The hidden state in front of its layer, and a norm."""

    name, tapped = "previous", True

    def watch(self, layer: nn.Module, mlp_input_norm: str | None, keep: Callable[[Tap], None]) -> RemovableHandle:
        return layer.register_forward_pre_hook(lambda module, args: keep(Tap(args[0])))

    def stock_layers(self, k: int) -> int:
        return k - 1


register(Previous())
