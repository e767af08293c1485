"""Linear layers with weights that oneDNN has packed: on a CPU a few rows then cost hardly more than one.

A packed layer holds its weight once, in oneDNN's own layout. Whoever asks for its parameters finds the plain ones: a
state dict, a copy, a move to another device or number type, an optimizer, a pass that needs gradients. The layer turns
back into a plain one first, bit for bit and with the same `Parameter`; the next `generate` packs it again.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import nan
from threading import RLock
from typing import SupportsIndex
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.utils import logging

SMALLEST = 1 << 14  # elements: below, the call of oneDNN costs more than it saves
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # oneDNN knows no fp64
_lock = RLock()
_running: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # model -> `packed_linears` that are open
logger = logging.get_logger(__name__)


class PackedLinear(nn.Linear):
    """What `pack_linears` makes of a linear layer, in place: `__init__` never runs.

    Attributes:
        packed: the weight, opaque.
        tied: of a weight that something else reads too (an embedding), and that is therefore kept: its `_state`.
    """

    packed: torch.Tensor
    tied: tuple[int, int, torch.Tensor] | None

    @property
    def weight(self) -> nn.Parameter:
        """The plain weight; asking for it unpacks the layer."""
        return unpack(self).weight

    @property
    def _parameters(self) -> dict[str, nn.Parameter | None]:
        """All of torch's ways to parameters but attributes lead here."""
        return unpack(self)._parameters

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple | str:
        """Copies and pickles are plain."""
        return unpack(self).__reduce_ex__(protocol)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        packed, own = self.__dict__.get("packed"), self.__dict__["_parameters"]
        learns = torch.is_grad_enabled() and (hidden.requires_grad or own["weight"].requires_grad)
        if packed is None or learns or hidden.dtype != packed.dtype or torch.is_autocast_enabled("cpu"):
            return linear(hidden, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(hidden, packed, own["bias"], "none", [], "")


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """`pack_linears`, and meanwhile nobody else packs: plain weights may be being read."""
    with _lock:
        pack_linears(model)
        _running[model] = _running.get(model, 0) + 1
    try:
        yield
    finally:
        with _lock:
            _running[model] -= 1


def pack_linears(model: nn.Module) -> None:
    """Pack the linear layers of a model on a CPU, if it is in eval mode and this torch can; else leave them plain.

    A tied output matrix is held twice, as the embedding reads it plain.
    """
    with _lock:
        if not model.training and not _running.get(model, 0):
            _pack_all(list(model.modules()))


def _pack_all(layers: list[nn.Module]) -> None:
    for layer in layers:
        if type(layer) is PackedLinear and layer.tied is not None and not _same(layer):
            unpack(layer)
    plain = [layer for layer in layers if type(layer) is nn.Linear and _can_be_packed(layer)]
    if not plain:
        return
    parameters = [p for layer in layers for p in vars(layer)["_parameters"].values() if p is not None]
    readers = Counter(p.data_ptr() for p in parameters if type(p.data) is torch.Tensor and p.layout == torch.strided)
    for layer in plain:
        _pack(layer, tied=readers[layer.weight.data_ptr()] > 1)
    twice = sum(layer.packed.nbytes for layer in plain if layer.tied is not None)
    logger.info(f"{len(plain)} linear layers packed for oneDNN; {twice / 2**20:.0f} MiB more, of tied weights")


def _can_be_packed(layer: nn.Linear) -> bool:
    weight = layer.weight
    return (
        type(weight) is nn.Parameter
        and type(weight.data) is torch.Tensor
        and weight.device.type == "cpu"
        and weight.layout == torch.strided
        and weight.numel() >= SMALLEST
        and weight.dtype in DTYPES
        and weight.grad is None
        and not weight.is_inference()
        and "forward" not in vars(layer)  # what wraps it may read the weight
        and torch.backends.mkldnn.enabled
        and packs(weight.dtype)
    )


@cache
def packs(dtype: torch.dtype) -> bool:
    """Whether this torch, on this machine, has packed linear layers of a number type, and they are right."""
    weight = torch.linspace(-1, 1, 24 * 16).view(24, 16).to(dtype)
    bias = weight[:, 0].contiguous()
    try:
        with torch.inference_mode():
            packed = torch.ops.mkldnn._reorder_linear_weight(weight)
            product = torch.ops.mkldnn._linear_pointwise(weight[:3], packed, bias, "none", [], "")
            right = torch.allclose(product, linear(weight[:3], weight, bias), rtol=1e-2, atol=1e-2)
            if right and torch.equal(packed.to_dense(), weight):
                return True
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        pass
    logger.warning_once(
        f"torch {torch.__version__} has no packed linear layers of {dtype} on this machine: they stay plain, and a few "
        "rows cost more time than one"
    )
    return False


def _pack(layer: nn.Linear, tied: bool) -> None:
    weight = layer.weight
    with torch.inference_mode(False), torch.no_grad():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        vars(layer).update(packed=packed, tied=_state(weight) if tied else None)
        layer.__class__ = PackedLinear
        if not tied:
            # The parameter lives on, so that who holds it holds the right one later; read before, it says NaN.
            weight.data = weight.new_full((1, 1), nan).expand(weight.shape)


def product(weight: torch.Tensor, pack: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """[..., in] -> [..., out] with a weight [out, in] of nobody else's; packed, if wanted and worth it."""
    if not pack or weight.numel() < SMALLEST:
        return lambda hidden: linear(hidden, weight)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    return lambda hidden: torch.ops.mkldnn._linear_pointwise(hidden, packed, None, "none", [], "")


def unpack(layer: nn.Linear) -> nn.Linear:
    """The layer, with its plain weight: the same numbers in the same `Parameter`."""
    with _lock:
        if type(layer) is PackedLinear:
            own = vars(layer)
            packed, tied = own.pop("packed"), own.pop("tied")
            if tied is None:
                with torch.inference_mode(False), torch.no_grad():
                    own["_parameters"]["weight"].data = packed.to_dense()
            layer.__class__ = nn.Linear
    return layer


def plain_weight(layer: nn.Module) -> torch.Tensor:
    """A linear layer's weight [out, in] to read; a packed layer stays packed."""
    if type(layer) is not PackedLinear:
        return layer.weight
    with _lock:
        if type(layer) is PackedLinear and layer.tied is None:
            return layer.packed.to_dense()
        return vars(layer)["_parameters"]["weight"]


def _state(weight: torch.Tensor) -> tuple[int, int, torch.Tensor]:
    """What shows that somebody wrote to a weight; `weight.data` can be written to without a new version."""
    return weight._version, weight.data_ptr(), weight.detach()[:, 0].clone()


def _same(layer: PackedLinear) -> bool:
    (version, pointer, column), now = layer.tied, vars(layer)["_parameters"]["weight"]
    return (version, pointer) == (now._version, now.data_ptr()) and torch.equal(column, now[:, 0])
