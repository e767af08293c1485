"""What is to be said of numbers that were copied: some were none to begin with, some are too small for their type."""

import threading

import torch

from ee_scale.backbone.narrowing import all_finite, check_narrowed, told


class Values:
    """Looks at every block on its way, from any thread; remembers names of tensors, not blocks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._odd: set[str] = set()
        self._lost: dict[str, float] = {}  # name -> largest number that became zero
        self._type = ""

    def look(self, name: str, before: torch.Tensor, after: torch.Tensor) -> None:
        """A block of tensor `name`, as it is and as it will be. Raises `NarrowingError` for a number that is lost."""
        if not before.dtype.is_floating_point:
            return
        if not all_finite(before):
            with self._lock:
                self._odd.add(name)
        if before.dtype == after.dtype:
            return
        check_narrowed(before, after, name)
        lost = before[(after == 0) & (before != 0)]
        if lost.numel():
            with self._lock:
                self._lost[name] = max(self._lost.get(name, 0.0), lost.abs().max().item())
                self._type = told(after.dtype)

    def lines(self) -> list[str]:
        """One for each kind of finding."""
        found = []
        if self._odd:
            found.append(f"copied as they are: infinities or NaN in {_some(self._odd)}")
        if self._lost:
            name = max(self._lost, key=self._lost.__getitem__)
            found.append(
                f"too small for {self._type}, and zero now: numbers up to {self._lost[name]:.2g} ('{name}') in "
                f"{_some(set(self._lost))}"
            )
        return found


def _some(names: set[str]) -> str:
    first = f"'{min(names)}'"
    return first if len(names) == 1 else f"{len(names)} tensors, {first} first"
