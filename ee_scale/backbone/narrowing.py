"""Numbers on their way into a narrower type: rounded, never lost to an infinity without a word."""

import torch

from ee_scale.errors import UserError


class NarrowingError(UserError):
    """A number is beyond the largest of the type that it should be stored in."""


def narrowed(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """`tensor` in `dtype`. Raises `NarrowingError` as `check_narrowed`."""
    found = tensor.to(dtype)
    check_narrowed(tensor, found, name)
    return found


@torch.no_grad()
def fill(target: torch.Tensor, values: torch.Tensor, name: str) -> None:
    """target = values, in the type of `target`. Raises `NarrowingError` as `check_narrowed`."""
    target.copy_(values)
    check_narrowed(values, target, name)


def check_narrowed(before: torch.Tensor, after: torch.Tensor, name: str) -> None:
    """Raise `NarrowingError` with the largest number of tensor `name` that is finite `before` and not `after`.

    What is no finite number before may be none after.
    """
    if not is_narrower(after.dtype, before.dtype) or all_finite(after):
        return
    beyond = before[(~after.isfinite()).to(before.device) & before.isfinite()]
    if beyond.numel():
        worst = beyond[beyond.abs().argmax()].item()
        largest = torch.finfo(after.dtype).max
        raise NarrowingError(
            f"'{name}' holds {worst:g}, and the largest number of {told(after.dtype)} is {largest:g}; "
            f"choose a type with a wider range ({'fp32' if largest > 1e38 else 'bf16 or fp32'})"
        )


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no number is an infinity or NaN. If one is, so is the smallest or the largest."""
    return not tensor.numel() or all(end.isfinite().item() for end in tensor.aminmax())


def is_narrower(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether a type of floating-point numbers ends before another does."""
    if not (dtype.is_floating_point and other.is_floating_point):
        return False
    return torch.finfo(dtype).max < torch.finfo(other).max


def told(dtype: torch.dtype) -> str:
    """'bf16' for torch.bfloat16, as settings call it."""
    name = str(dtype).removeprefix("torch.")
    return {"bfloat16": "bf16"}.get(name, name.replace("float", "fp"))
