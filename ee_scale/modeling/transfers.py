"""Between host and device: many values in one wait, and none for what the host knows already."""

from collections.abc import Sequence

import torch

WHOLE = (torch.int64, torch.bool)


def waits_are_free(device: torch.device) -> bool:
    """Whether the host can look at a number of the device's without holding it up: they are one."""
    return device.type == "cpu"


def read(*values: torch.Tensor) -> list[list]:
    """The values of tensors of one dimension, as lists of int, bool or float: the host waits for the device once.

    Token ids and fp32 numbers go through fp64, which holds them exactly.
    """
    if waits_are_free(values[0].device):
        return [value.tolist() for value in values]
    packed = torch.cat([value.double() for value in values]).tolist()
    lists, end = [], 0
    for value in values:
        part = packed[end : end + len(value)]
        end += len(value)
        if value.dtype in WHOLE:
            part = [bool(x) if value.dtype == torch.bool else int(x) for x in part]
        lists.append(part)
    return lists


def send(values: Sequence, device: torch.device) -> torch.Tensor:
    """Whole numbers (nested lists) as int64 on the device; the host does not wait until they are there.

    From ordinary memory the copy to a GPU would wait for all that is queued before it.
    """
    tensor = torch.tensor(values, dtype=torch.long)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
