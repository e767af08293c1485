"""How far to draft, and from which exit: expected tokens per second from measured costs.

What a cycle costs and brings is in `costs`; choosing the exit by the ratio of both follows DEL (arXiv 2504.05598), with
seconds in place of layer counts.
"""

from collections.abc import Sequence

from .costs import Costs, expected_tokens

BINS = 10
PRIOR = (9.0, 3.0)  # accepted, rejected: counts that every exit starts from, and decays back to
DECAY = 0.97
SWITCH = 1.1  # another exit must promise this much more before it takes over: what is known of exits is noisy
MEAN = 0.1  # weight of the newest measurement
# An exit whose drafts fail in so many cycles in a row (the first: before any was accepted) rests: for GAP cycles, then
# for twice as many, ...
REJECTED, GAP = (3, 6), 16
SEEN = 8  # positions of the prompt; an exit that agreed with the final layer at none of so many rests at once
TRIALS, EVERY = 2, 16  # cycles at the start, and one in so many later, that draft whatever is expected of it


class Drafting:
    """Decides the exit and length of each draft, from what earlier drafts of this call cost and how they fared."""

    def __init__(self, layers: Sequence[int], num_layers: int, max_draft: int, length: int | None = None):
        """`length` fixes the number of drafts (0: none); else it is decided draft by draft."""
        self.layers, self.num_layers = tuple(layers), num_layers
        self.max_draft, self.length = max_draft, length
        self.counts = {k: [0.0, 0.0] for k in layers}
        self.bins = {k: [[0.0, 0.0] for _ in range(BINS)] for k in layers}
        # In units of one layer until the first measurement: a check costs about two layers.
        self.layer, self.check, self.tail, self.slope = 1.0, 2.0, 2.0, 0.05
        self.measured = False
        self.costs = self._costs()
        self.cycles = 0
        self.rejected, self.gap = dict.fromkeys(layers, 0), dict.fromkeys(layers, GAP)
        self.rests_until = dict.fromkeys(layers, 0)  # by number of cycles
        self.agreed: set[int] = set()  # exits with an accepted draft
        self.rate = 0.0  # tokens per second and row of the call so far
        self.current = max(layers, key=self.promise)

    def acceptance(self, k: int) -> float:
        """Probability that a draft of exit k is accepted."""
        good, bad = (prior + count for prior, count in zip(PRIOR, self.counts[k], strict=True))
        return good / (good + bad)

    def calibrated(self, k: int, confidence: float) -> float:
        """The same for a draft of this confidence: shares seen in its bin, drawn to the exit's mean where few."""
        good, seen = self.bins[k][_bin(confidence)]
        return (good + 2 * (confidence + self.acceptance(k)) / 2) / (seen + 2)

    def _costs(self) -> Costs:
        """Seconds, as measured so far: one more row adds a fixed share to a layer, and everything else is one tail."""
        rows = range(1, self.max_draft + 2)
        layer = {n: self.layer * (1 + self.slope * (n - 1)) for n in rows}
        return Costs(self.num_layers, layer, dict.fromkeys(rows, self.tail), dict.fromkeys(self.layers, self.check))

    def promise(self, k: int) -> float:
        """Best expected tokens per second with exit k at a fixed length."""
        a = min(self.acceptance(k), 0.999)
        return max(expected_tokens(a, drafts) / self.costs.cycle(k, drafts) for drafts in range(self.max_draft + 1))

    def start(self) -> int:
        """The exit of the next cycle."""
        promises = {k: self.promise(k) for k in self.layers}
        best = max(self.layers, key=promises.__getitem__)
        if promises[best] > SWITCH * promises[self.current]:
            self.current = best
        return self.current

    def goes_on(self, drafted: int, chances: Sequence[float]) -> bool:
        """Whether one more draft pays. chances: for each row, that all its drafts so far are accepted.

        It does as long as the expected extra tokens per extra second exceed the present rate; now and then one is made
        in any case, because what is never tried is never measured. None while the exit rests.
        """
        k = self.current
        if drafted >= self.max_draft or self.cycles < self.rests_until[k]:
            return False
        if drafted and self.rests_until[k] and self.rejected[k]:
            return False  # after a rest one draft tells enough
        if self.length is not None:
            return drafted < self.length
        if drafted and k not in self.agreed:
            return False  # one at a time until one was right
        if drafted == 0 and (self.cycles < TRIALS or self.cycles % EVERY == 0):
            return True
        extra = self.costs.cycle(k, drafted + 1) - self.costs.cycle(k, drafted)
        rate = len(chances) * (self.rate if self.measured else self.promise(k))
        return sum(chances) * self.acceptance(k) > rate * extra

    def tried(self, k: int, accepted: int) -> None:
        """A cycle that drafted from exit k; `accepted` drafts of all rows. One more failure after a rest is enough."""
        if accepted:
            self.agreed.add(k)
            self.rejected[k], self.gap[k] = 0, GAP
            return
        self.rejected[k] += 1
        if self.rejected[k] >= REJECTED[k in self.agreed]:
            self._rest(k, self.cycles + 1)

    def foresaw(self, k: int, agreed: int, seen: int) -> None:
        """On the prompt, exit k said at `agreed` of `seen` positions what the final layer said."""
        self.counts[k] = [float(agreed), float(seen - agreed)]
        if seen >= SEEN and not agreed:
            self.rejected[k] = REJECTED[0]
            self._rest(k, self.cycles)

    def _rest(self, k: int, start: int) -> None:
        self.rests_until[k] = start + self.gap[k]
        self.gap[k] *= 2

    def fared(self, k: int, confidences: Sequence[float], accepted: int) -> None:
        """One row's drafts: the first `accepted` were right, the one after them wrong, the rest says nothing."""
        for index, confidence in enumerate(confidences[: accepted + 1]):
            good = float(index < accepted)
            self.counts[k][0] += good
            self.counts[k][1] += 1 - good
            cell = self.bins[k][_bin(confidence)]
            cell[0] += good
            cell[1] += 1

    def cycle_done(self, tokens: int, rows: int, seconds: float) -> None:
        """All rows together; old experience fades."""
        self.cycles += 1
        rate = tokens / seconds / rows
        self.rate = rate if not self.rate else (1 - MEAN) * self.rate + MEAN * rate
        for k in self.layers:
            self.counts[k] = [DECAY * count for count in self.counts[k]]
            for cell in self.bins[k]:
                cell[0] *= DECAY
                cell[1] *= DECAY

    def took(self, k: int, drafts: int, early: float, checks: float, late: float, tail: float) -> None:
        """Seconds of one cycle: its early layers, its exit heads, its deep layers, everything else."""
        layer = early / ((drafts + 1) * k)
        if not self.measured:
            self.layer, self.tail, self.check = layer, tail, 2 * layer
            self.measured = True
        self.layer = _mix(self.layer, layer)
        self.tail = _mix(self.tail, tail)
        if drafts:
            self.check = _mix(self.check, checks / drafts)
            if k < self.num_layers:
                rows = late / ((self.num_layers - k) * self.layer)
                self.slope = _mix(self.slope, max(0.0, (rows - 1) / drafts))
        self.costs = self._costs()


def _bin(confidence: float) -> int:
    return min(BINS - 1, max(0, int(confidence * BINS)))


def _mix(old: float, new: float) -> float:
    """Running mean; one measurement that was interrupted by something else counts for little."""
    return old + MEAN * (min(new, 3 * old) - old)
