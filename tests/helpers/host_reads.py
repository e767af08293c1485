"""Counts where a host would wait for its GPU, on a machine without one."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ee_scale.modeling import early_exits, layer_runner, loop, prompt_lookup, sequences, sources, speculate, transfers

READS = ("tolist", "cpu", "numpy")  # which show in no operation here
WAITING = ("item", "is_nonzero", "_local_scalar_dense", "nonzero")


class HostReads(TorchDispatchMode):
    """What would wait, by name: numbers that the host reads, and lists that it sends by other ways than `send`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.sending = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        tensors = [item for arg in args for item in (arg if isinstance(arg, list) else [arg]) if torch.is_tensor(item)]
        by_mask = name in ("index", "index_put_") and any(item.dtype == torch.bool for item in tensors[1:])
        sent = name == "lift_fresh" and args[0].dim() > 0 and not self.sending
        if name in WAITING or by_mask or sent:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def host_reads() -> Iterator[HostReads]:
    """Count inside."""
    with pytest.MonkeyPatch.context() as patch, HostReads() as mode:
        for name in READS:
            patch.setattr(torch.Tensor, name, _counted(mode, name, getattr(torch.Tensor, name)))
        for module in (early_exits, layer_runner, loop, prompt_lookup, sequences, sources, speculate):
            if hasattr(module, "send"):
                patch.setattr(module, "send", _sending(mode))
        yield mode


def _counted(mode: HostReads, name: str, method: Callable) -> Callable:
    def counted(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        mode.found[name] += 1
        return method(self, *args, **kwargs)

    return counted


def _sending(mode: HostReads) -> Callable:
    def send(*args: Any) -> torch.Tensor:
        mode.sending = True
        try:
            return transfers.send(*args)
        finally:
            mode.sending = False

    return send
