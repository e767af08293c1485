"""Attention masks that transformers builds once for a shape of batches, and layers are handed from then on.

Each time it builds them it looks whether several texts are packed into a row, which the host waits for a GPU to answer.
A mask with four dimensions it takes for a finished one, and passes it on to the layers as it is.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class HandedMasks:
    """Hooks on decoder layers that keep what the model hands them, and put it in the place of a blank later."""

    def __init__(self, layers: Iterable[nn.Module]):
        self._blank = torch.empty(1, 1, 1, 1)
        self._masks: dict[tuple[int, torch.Size], Any] = {}  # by layer and [B, S], in the model's own kind of mask
        self._keeps = False
        for layer in layers:
            layer.register_forward_pre_hook(self._hand, with_kwargs=True)

    @contextmanager
    def handed(self, layers: Sequence[nn.Module], x: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
        """Arguments for a call of the model, made inside the block without cache and padding, that runs these layers.

        x: its ids [B, S] or hidden states [B, S, D].
        """
        if len(layers) and all((id(layer), x.shape[:2]) in self._masks for layer in layers):
            yield {"attention_mask": self._blank}
            return
        self._keeps = True
        try:
            yield {}
        finally:
            self._keeps = False

    def _hand(self, layer: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        key, mask = (id(layer), hidden.shape[:2]), kwargs["attention_mask"]
        if mask is self._blank:  # also when a checkpointed layer runs again
            return args, {**kwargs, "attention_mask": self._masks[key]}
        if self._keeps:
            self._masks[key] = mask
        return None
