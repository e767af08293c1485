"""What drafting with an exit costs and brings, on a machine whose layer and head times are known. Plain arithmetic.

Notation: L layers, an exit after k of them, a draft of `gamma` tokens, `acceptance` the chance that one drafted token
is accepted. Speed is relative to ordinary decoding, one token per pass through L layers and the final head.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_DRAFT = 12  # tokens per cycle, where nobody asked for more
MEAN = 0.1  # weight of the newest measurement


@dataclass(frozen=True)
class DraftCost:
    """What drafting from one source takes, in the unit of `Costs`.

    Attributes:
        each: one draft: the passes it needs, and the look at what they say.
        shared: decoder layers that drafting leaves the states of, so that verification begins behind them.
    """

    each: float
    shared: int = 0


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

    def of_exit(self, k: int) -> DraftCost:
        """Drafts of exit k, which runs the first k layers of the model itself."""
        return DraftCost(self.layers(k) + self.checks[k], k)

    def drafting(self, cost: DraftCost, gamma: int) -> float:
        """Time of drafting `gamma` tokens and verifying them.

        Shared layers run once more than drafts are read (on the last draft), one row at a time; verification runs the
        others, and the final head, on gamma + 1 rows. Nothing shared: every layer on gamma + 1 rows.
        """
        verified = self.layers(self.num_layers - cost.shared, gamma + 1) + self.final_head(gamma + 1)
        return gamma * cost.each + self.layers(cost.shared) + verified

    def cycle(self, k: int, gamma: int) -> float:
        """The same of exit k."""
        return self.drafting(self.of_exit(k), gamma)


@dataclass
class RowTime:
    """Time of a part by rows, learned while decoding: one x (1 + jump [rows > 1] + slope (rows - 1)).

    A second row is dear where one row has a kernel of its own, and further ones then cost little. The line through what
    was seen of more rows is fitted by least squares; older measurements fade.
    """

    one: float
    jump: float = 0.1
    slope: float = 0.05
    count: int = 0  # measurements of one row
    # Sums over those of more: weight, further rows g, g^2, excess y, g y. They start as two on the line above, at g = 1
    # and 8, of little weight.
    sums: tuple[float, ...] = (0.5, 2.25, 16.25, 0.1625, 1.0375)
    recent: dict[int, tuple[float, ...]] = field(default_factory=dict)  # rows -> the last three times

    def at(self, rows: float) -> float:
        """The time of so many rows."""
        return self.one * (1 + (self.jump + self.slope * (rows - 1) if rows > 1 else 0.0))

    def saw(self, rows: int, time: float) -> None:
        """One measurement."""
        if rows == 1:
            self.one, self.count = mixed(self.one, time, self.count), self.count + 1
            return
        # The middle of three: one that was interrupted would make drafts look dear, and where none are made, nothing
        # would correct it.
        last = self.recent[rows] = (*self.recent.get(rows, ())[-2:], time)
        g, y = rows - 1, min(sorted(last)[(len(last) - 1) // 2], 3 * self.at(rows)) / self.one - 1
        news = (1.0, g, g * g, y, g * y)
        self.sums = tuple((1 - MEAN) * old + new for old, new in zip(self.sums, news, strict=True))
        n, s1, s2, sy, sgy = self.sums
        spread = s2 * n - s1 * s1
        slope = max(0.0, (sgy * n - s1 * sy) / spread) if spread > 0.01 * s2 * n else min(self.slope, max(0.0, sy / s1))
        self.slope, self.jump = slope, max(0.0, (sy - slope * s1) / n)


def mixed(old: float, new: float, count: int) -> float:
    """Running mean, `count` measurements old; one that was interrupted by something else counts for little."""
    return new if count == 0 else old + max(MEAN, 1 / (count + 1)) * (min(new, 3 * old) - old)


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
