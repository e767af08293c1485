"""Which updates are left out: those whose loss or gradient is no number, or whose loss exploded.

The decision is made, and kept to, where the numbers are: a GPU need not tell the host before the update is queued.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from math import isfinite, sqrt

import torch

WARM_UP = 20  # updates until a running mean is trusted
DECAY = 0.95  # of the running mean
LATE = 1  # steps after which the host reads a verdict: the device has come to it by then


class HostCopy:
    """A small tensor on its way to the host. Nothing waits before it is read."""

    def __init__(self, values: torch.Tensor):
        self._arrived = None
        self._values = values
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def tolist(self) -> list[list[float]]:
        """The numbers; waits for the device to have come to them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


class UpdateGuard:
    """Judges each group of parameters (an exit, or everything) at each step, the same on all ranks that hold it.

    Attributes:
        keys: of the groups; spike_factor: a loss above this many times its running mean is left out; 0: only what is
            not a number.
        skipped: int64 [keys] on the device, updates that were left out. A new tensor at every step.
        in_a_row: of these, the newest ones without an update between, as far as `verdicts` has told.
        reasons: why, for those of the step that it has told last.
    """

    def __init__(self, keys: Sequence[int], spike_factor: float, device: torch.device):
        self.keys, self.spike_factor = list(keys), spike_factor
        self.in_a_row: Counter[int] = Counter()
        self.reasons: dict[int, str] = {}
        self._pending: deque[HostCopy] = deque()
        # Python's numbers are doubles too.
        self._means = torch.zeros(len(self.keys), dtype=torch.float64, device=device)
        self._seen, self.skipped, self._row = (
            torch.zeros(len(self.keys), dtype=torch.int64, device=device) for _ in range(3)
        )

    def judge(self, losses: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        """By losses and squared gradient norms [keys]: fp32 [keys] on the device, 1 for groups that are not updated."""
        losses, squares = losses.double(), squares.double()
        limits = self.spike_factor * self._means
        spikes = (limits > 0) & (losses > limits) & (self._seen >= WARM_UP)
        left_out = ~(losses.isfinite() & squares.isfinite()) | spikes
        self.skipped = self.skipped + left_out
        self._row = (self._row + 1) * left_out
        self._pending.append(HostCopy(torch.stack([left_out, losses, squares, self._means, self._row], dim=-1)))
        before = torch.where(self._seen == 0, losses, self._means)
        learned = DECAY * before + (1 - DECAY) * losses
        self._means = torch.where(left_out, self._means, learned)
        self._seen = self._seen + ~left_out
        return left_out.float()

    def verdicts(self, late: int = 0) -> Iterator[tuple[int, dict[int, str]]]:
        """(judgements since, reasons by group) of what was not told yet, but for the newest `late`. Waits for them."""
        while len(self._pending) > late:
            rows = self._pending.popleft().tolist()
            self.reasons = {}
            for key, (left_out, loss, square, mean, row) in zip(self.keys, rows, strict=True):
                self.in_a_row[key] = round(row)
                if left_out:
                    self.reasons[key] = self._reason(loss, square, mean)
            yield len(self._pending), self.reasons

    def count(self, key: int) -> torch.Tensor:
        """Updates of a group that were left out so far, int64 scalar on the device."""
        return self.skipped[self.keys.index(key)]

    def recall(self, key: int, skipped: int) -> None:
        """Go on counting from there."""
        self.skipped[self.keys.index(key)] = skipped

    def _reason(self, loss: float, square: float, mean: float) -> str:
        if isfinite(loss) and isfinite(square):
            return f"loss {loss:.4g} is above {self.spike_factor:g} times its running mean {mean:.4g}"
        return f"loss {loss:.4g}, gradient norm {sqrt(square) if square >= 0 else square:.4g}"
