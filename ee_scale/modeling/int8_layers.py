"""Decoder layers with int8 weights, as copies to draft with; the model's own layers stay as they are.

Weights are int8 with a scale per output row, activations bf16. A token's pass through such a layer reads half the
bytes of bf16 weights. One operation of torch does it on a CPU and on CUDA.
"""

import copy
from functools import cache
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.utils import logging

from .heads import ModelWithExits
from .packing import PackedLinear, plain_weight

LARGEST = 127
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # whoever wants fp64 wants no int8
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
Case = tuple[torch.device, torch.dtype]
_lock = RLock()
_copies: WeakKeyDictionary[ModelWithExits, dict[Case, list[nn.Module]]] = WeakKeyDictionary()
logger = logging.get_logger(__name__)


class Int8Linear(nn.Module):
    """A linear layer with its weight rounded to int8.

    Attributes:
        weight: int8 [out, in]; scale: bf16 [out].
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        """weight [out, in], bias [out]: of the layer that is copied; the bias is shared."""
        super().__init__()
        weight = weight.detach()
        scale = (weight.abs().amax(1).float() / LARGEST).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
        self.weight = (weight / scale.float()[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8)
        self.scale, self.bias = scale, bias

    @property
    def nbytes(self) -> int:
        """Memory of the copy."""
        return self.weight.nbytes + self.scale.nbytes

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out], of the same number type."""
        rows = hidden.reshape(-1, hidden.shape[-1]).bfloat16()
        product = torch._weight_int8pack_mm(rows, self.weight, self.scale).to(hidden.dtype)
        product = product.view(*hidden.shape[:-1], len(self.scale))
        return product if self.bias is None else product + self.bias


def int8_layers(model: ModelWithExits, count: int) -> list[nn.Module]:
    """Copies of the first `count` decoder layers: made when first asked for, and kept as long as the model.

    Norms and biases are the model's own parameters, and the place in a cache is that of the layer which is copied.
    Weights that are changed later are not followed. Raises ValueError where torch has no int8 products.
    """
    weight = model.base_model.embed_tokens.weight
    check_int8(weight.device, weight.dtype)
    with _lock, torch.inference_mode(False), torch.no_grad():
        copies = _copies.setdefault(model, {}).setdefault((weight.device, weight.dtype), [])
        new = [_copied(layer, model) for layer in model.base_model.layers[len(copies) : count]]
        copies += new
        if new:
            size = sum(part.nbytes for layer in new for part in layer.modules() if type(part) is Int8Linear)
            logger.info(f"{len(new)} layers copied in int8 for drafts; {size / 2**20:.0f} MiB more")
        return copies[:count]


def check_int8(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError where there are no int8 drafts."""
    if dtype not in DTYPES:
        raise ValueError(f"exit_draft_weights=int8: the model is in {dtype}; use fp32, bf16 or fp16, or leave it out")
    if not _multiplies(device):
        raise ValueError(f"exit_draft_weights=int8: torch {torch.__version__} has no int8 products on {device.type}")


@cache
def _multiplies(device: torch.device) -> bool:
    """Whether this torch has the product on a device, and it is right."""
    weight = torch.linspace(-1, 1, 32 * 64, device=device).view(32, 64)
    with torch.inference_mode():
        try:
            product = Int8Linear(weight)(weight[:3])
        except (AttributeError, NotImplementedError, RuntimeError):
            return False
        return torch.allclose(product, linear(weight[:3], weight), rtol=5e-2, atol=5e-1)


def _copied(layer: nn.Module, model: ModelWithExits) -> nn.Module:
    """A decoder layer with int8 weights; what is not a plain or packed linear layer is copied as it is."""
    memo: dict[int, Any] = {id(model.config): model.config}  # what `deepcopy` is to take instead of a copy
    for module in layer.modules():
        own = vars(module)
        if type(module) in (nn.Linear, PackedLinear):
            memo[id(module)] = Int8Linear(plain_weight(module), own["_parameters"]["bias"])
            continue
        memo |= {id(parameter): parameter for parameter in own["_parameters"].values() if parameter is not None}
        memo |= {id(own[hooks]): type(own[hooks])() for hooks in HOOKS}  # others decode at the same time
    return copy.deepcopy(layer, memo)
