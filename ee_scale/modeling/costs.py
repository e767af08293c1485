"""What drafting with an exit costs and brings, on a machine whose layer and head times are known. Plain arithmetic.

Notation: L layers, an exit after k of them, a draft of `gamma` tokens, `acceptance` the chance that one drafted token
is accepted. Speed is relative to ordinary decoding, one token per pass through L layers and the final head.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

MAX_DRAFT = 12  # tokens per cycle, where nobody asked for more


@dataclass(frozen=True)
class Costs:
    """Times in one unit, whichever it is (seconds, or layers).

    Attributes:
        layer: rows -> time of one decoder layer on that many positions of one sequence; 1 must be among them. Between
            the rows given, time is taken as linear; past the last one it grows as between the last two.
        head: the same for the final norm and head.
        checks: exit -> time of reading that exit on one position: its modules, its head, the decision.
    """

    num_layers: int
    layer: Mapping[int, float]
    head: Mapping[int, float]
    checks: Mapping[int, float]

    def layers(self, count: int, rows: float = 1) -> float:
        """Time of `count` layers on `rows` positions."""
        return count * _interpolated(self.layer, rows)

    def final_head(self, rows: float = 1) -> float:
        """Time of the final head on `rows` positions."""
        return _interpolated(self.head, rows)

    @property
    def step(self) -> float:
        """Time of one ordinary token: every layer and the final head."""
        return self.layers(self.num_layers) + self.final_head()

    @property
    def head_layers(self) -> float:
        """The final head's time in layers."""
        return self.final_head() / self.layers(1)

    def draft_cost(self, k: int) -> float:
        """c: one draft token at exit k, as a share of an ordinary token."""
        return (self.layers(k) + self.checks[k]) / self.step

    def cycle(self, k: int, gamma: int) -> float:
        """Time of drafting `gamma` tokens at exit k and verifying them (Algorithm A of `speculate`).

        Early layers run once more than drafts are read (on the last draft), and verification goes on from there:
        (gamma + 1) k layers on one row, (L - k) layers and the final head on gamma + 1 rows.
        """
        rows = gamma + 1
        draft = self.layers(k * rows) + gamma * self.checks[k]
        return draft + self.layers(self.num_layers - k, rows) + self.final_head(rows)


def expected_tokens(acceptance: float, gamma: int) -> float:
    """Tokens per cycle, 1 + a + ... + a^gamma, when each draft is accepted independently (arXiv 2211.17192)."""
    return gamma + 1.0 if acceptance == 1 else (1 - acceptance ** (gamma + 1)) / (1 - acceptance)


def lossless_speedup(costs: Costs, k: int, acceptance: float, gamma: int) -> float:
    """Speed of self-speculation with a fixed draft length; gamma = 0 is ordinary decoding."""
    return expected_tokens(acceptance, gamma) * costs.step / costs.cycle(k, gamma)


def best_draft_length(costs: Costs, k: int, acceptance: float, longest: int = MAX_DRAFT) -> tuple[int, float]:
    """The draft length with the highest speed, and that speed (at least 1: gamma = 0 never loses)."""
    speeds = [lossless_speedup(costs, k, acceptance, gamma) for gamma in range(longest + 1)]
    gamma = max(range(longest + 1), key=lambda g: (round(speeds[g], 12), -g))
    return gamma, speeds[gamma]


def _interpolated(times: Mapping[int, float], rows: float) -> float:
    if rows in times:
        return times[rows]
    known = sorted(times)
    if len(known) == 1:
        return times[known[0]]
    right = min(max(bisect_left(known, rows), 1), len(known) - 1)
    a, b = known[right - 1], known[right]
    slope = (times[b] - times[a]) / (b - a)
    # Noise must not make more rows cheaper past the last measurement.
    return times[b] + max(slope, 0.0) * (rows - b) if rows > b else times[a] + slope * (rows - a)
