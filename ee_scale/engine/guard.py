"""Which updates are left out: those whose loss or gradient is no number, or whose loss exploded."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite, sqrt

import torch

WARM_UP = 20  # updates until a running mean is trusted
DECAY = 0.95  # of the running mean


@dataclass
class UpdateGuard:
    """Judges each group of parameters (an exit, or everything) at each step, the same on all ranks that hold it.

    Attributes:
        spike_factor: a loss above this many times its running mean is left out; 0: only what is not a number.
        skipped: updates that were left out, by group.
        in_a_row: of these, the newest ones without an update between.
        reasons: why, for those of the last step.
    """

    spike_factor: float = 0.0
    skipped: Counter[int] = field(default_factory=Counter)
    in_a_row: Counter[int] = field(default_factory=Counter)
    reasons: dict[int, str] = field(default_factory=dict)
    _means: dict[int, float] = field(default_factory=dict)
    _seen: Counter[int] = field(default_factory=Counter)

    def judge(self, keys: Sequence[int], losses: torch.Tensor, squares: torch.Tensor) -> set[int]:
        """Groups that are not updated; `losses` and squared gradient norms [keys]. Waits for both (they are small)."""
        self.reasons = {}
        for key, (loss, square) in zip(keys, torch.stack([losses, squares], -1).tolist(), strict=True):
            if not isfinite(loss) or not isfinite(square) or self._is_spike(key, loss):
                self.skipped[key] += 1
                self.in_a_row[key] += 1
                self.reasons[key] = self._reason(key, loss, square)
            else:
                self.in_a_row[key] = 0
                self._learn(key, loss)
        return set(self.reasons)

    def _is_spike(self, key: int, loss: float) -> bool:
        return 0 < self.spike_factor * self._means.get(key, 0.0) < loss and self._seen[key] >= WARM_UP

    def _reason(self, key: int, loss: float, square: float) -> str:
        if isfinite(loss) and isfinite(square):
            return f"loss {loss:.4g} is above {self.spike_factor:g} times its running mean {self._means[key]:.4g}"
        return f"loss {loss:.4g}, gradient norm {sqrt(square) if square >= 0 else square:.4g}"

    def _learn(self, key: int, loss: float) -> None:
        self._seen[key] += 1
        mean = self._means.get(key, loss)
        self._means[key] = DECAY * mean + (1 - DECAY) * loss
