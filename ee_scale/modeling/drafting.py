"""How far to draft, and from which exit: expected tokens per second from measured costs.

What a cycle costs and brings is in `costs`; choosing the exit by the ratio of both follows DEL (arXiv 2504.05598), with
seconds in place of layer counts. No draft at all is a choice like the others: where drafts do not pay, as measured, a
pass makes one token as in plain decoding, and one draft is tried in spells that double.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from .costs import Costs, RowTime, expected_tokens, mixed

BINS = 10
PRIOR = 2.0  # observations that what earlier calls saw of an exit is worth
GUESS = 0.75  # acceptance of an exit that nobody has seen
DECAY = 0.97  # of an exit's observations, at each new one
FRESH = 6.0  # observations that older ones are worth at most when a draft is tried again
SWITCH = 1.1  # another exit must promise this much more before it takes over: what is known of exits is noisy
EDGE = 1.02  # drafts must promise this much more than none
MEASURED = 2  # cycles without drafts before the first with one
# An exit whose drafts fail in so many cycles in a row (the first: before any was accepted) rests: for GAP cycles, then
# for twice as many, ...
REJECTED, GAP = (3, 6), 16
SEEN = 8  # positions of the prompt; an exit that agreed with the final layer at none of so many rests at once
# What drafts lost against plain decoding, in tokens, is paid back with SPEND per cycle before one is tried again; none
# are made from LIMIT on. Gains are kept up to CREDIT.
SPEND, LIMIT, CREDIT = 0.01, 4.0, 16.0


@dataclass
class Known:
    """What is known of decoding with one model, device and number of rows; calls hand it on.

    Attributes:
        layer, tail: time of a layer, and of everything else that a cycle has, by rows. In units of one layer until the
            first measurement.
        check: time of reading an exit: about two layers until the first measurement.
        plain: seconds of a cycle without drafts, over those that `costs` says.
        cycles, drafts: how many cycles without and with drafts were measured.
        gap, due: cycles between drafts that are tried though they promise nothing; cycles until the next one.
        debt, stopped: what drafts lost, in tokens; whether that was too much, and is not paid back yet.
        share: exit -> its acceptance in earlier calls.
    """

    layer: RowTime = field(default_factory=lambda: RowTime(1.0))
    tail: RowTime = field(default_factory=lambda: RowTime(2.0))
    check: float = 2.0
    plain: float = 1.0
    cycles: int = 0
    drafts: int = 0
    gap: int = GAP
    due: int = 0
    debt: float = 0.0
    stopped: bool = False
    share: dict[int, float] = field(default_factory=dict)

    def costs(self, layers: Sequence[int], num_layers: int, max_draft: int) -> Costs:
        """Everything but layers and exits is one tail."""
        rows = range(1, max_draft + 2)
        return Costs(
            num_layers,
            {n: self.layer.at(n) for n in rows},
            {n: self.tail.at(n) for n in rows},
            dict.fromkeys(layers, self.check),
        )


_known: WeakKeyDictionary[object, dict[tuple[Hashable, ...], Known]] = WeakKeyDictionary()


def known_of(model: object, *case: Hashable) -> Known:
    """What earlier calls have left behind of a model in this case: number type, number of rows, ..."""
    return _known.setdefault(model, {}).setdefault(case, Known())


class Drafting:
    """Decides the exit and length of each draft, from what earlier drafts cost and how they fared."""

    def __init__(
        self,
        layers: Sequence[int],
        num_layers: int,
        max_draft: int,
        length: int | None = None,
        known: Known | None = None,
    ):
        """`length` fixes the number of drafts (0: none); else it is decided draft by draft."""
        self.layers, self.num_layers = tuple(layers), num_layers
        self.max_draft, self.length = max_draft, length
        self.known = Known() if known is None else known
        self.counts = {k: [0.0, 0.0] for k in layers}
        self.bins = {k: [[0.0, 0.0] for _ in range(BINS)] for k in layers}
        self.costs = self._costs()
        self.cycles = 0
        self.rejected, self.gap = dict.fromkeys(layers, 0), dict.fromkeys(layers, GAP)
        self.rests_until = dict.fromkeys(layers, 0)  # by number of cycles
        self.agreed: set[int] = set()  # exits with an accepted draft
        self.drafted = 0  # in the last cycle
        self.trying = False  # this cycle drafts once, whatever is expected of it
        self.turn = 0  # of the exits that are tried
        self.current = max(layers, key=self.promise)

    def acceptance(self, k: int) -> float:
        """Probability that a draft of exit k is accepted."""
        good, bad = self.counts[k]
        return (good + PRIOR * self.known.share.get(k, GUESS)) / (good + bad + PRIOR)

    def calibrated(self, k: int, confidence: float) -> float:
        """The same for a draft of this confidence: shares seen in its bin, drawn to the exit's mean where few."""
        good, seen = self.bins[k][_bin(confidence)]
        return (good + 2 * (confidence + self.acceptance(k)) / 2) / (seen + 2)

    def _costs(self) -> Costs:
        return self.known.costs(self.layers, self.num_layers, self.max_draft)

    def promise(self, k: int) -> float:
        """Best expected tokens per second with drafts of exit k, at a fixed length of one or more."""
        a = min(self.acceptance(k), 0.999)
        lengths = range(1, self.max_draft + 1)
        return max((expected_tokens(a, g) / self.costs.cycle(k, g) for g in lengths), default=0.0)

    @property
    def plain(self) -> float:
        """Tokens per second without drafts."""
        return 1 / self.costs.step

    def start(self) -> int:
        """The exit of the next cycle."""
        promises = {k: self.promise(k) for k in self.layers}
        best = max(self._awake() or self.layers, key=promises.__getitem__)
        if promises[best] > SWITCH * promises[self.current] or not self._wakes(self.current):
            self.current = best
        self.trying = self.length is None and not self._pays(self.current) and self._may_try()
        if self.trying:
            self._refresh(self.current)
        return self.current

    def _pays(self, k: int) -> bool:
        """Whether drafts of exit k promise more than none, and have not lost too much."""
        known = self.known
        if known.cycles < MEASURED or known.stopped or not self._wakes(k):
            return False
        return self.promise(k) > EDGE * self.plain

    def _wakes(self, k: int) -> bool:
        return self.cycles >= self.rests_until[k]

    def _awake(self) -> list[int]:
        return [k for k in self.layers if self._wakes(k)]

    def _may_try(self) -> bool:
        """Whether one draft is due though it promises nothing; then its exit is the current one. They take turns."""
        awake, known = self._awake(), self.known
        if known.cycles < MEASURED or known.due > 0 or known.debt > 0 or not awake:
            return False
        self.current = awake[self.turn % len(awake)]
        return True

    def _refresh(self, k: int) -> None:
        """What was seen long ago counts for less: a text may have become easy."""
        seen = sum(self.counts[k])
        if seen > FRESH:
            self.counts[k] = [count * FRESH / seen for count in self.counts[k]]

    def goes_on(self, drafted: int, chances: Sequence[float]) -> bool:
        """Whether one more draft pays. chances: for each row, that all its drafts so far are accepted.

        The first does if the exit promises more tokens per second than plain decoding, or one is due to be tried; more,
        as long as the expected extra tokens per extra second exceed the best rate. None while the exit rests.
        """
        k = self.current
        if drafted >= self.max_draft or not self._wakes(k):
            return False
        if drafted and self.rests_until[k] and self.rejected[k]:
            return False  # after a rest one draft tells enough
        if self.length is not None:
            return drafted < self.length
        if drafted == 0:
            return self.trying or self._pays(k)
        if self.trying or k not in self.agreed:
            return False  # one at a time until one was right
        extra = self.costs.cycle(k, drafted + 1) - self.costs.cycle(k, drafted)
        return sum(chances) * self.acceptance(k) > len(chances) * max(self.promise(k), self.plain) * extra

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
        """One row's drafts: the first `accepted` were right, the one after them wrong, the rest says nothing.

        Old observations fade as new ones come.
        """
        for index, confidence in enumerate(confidences[: accepted + 1]):
            good = float(index < accepted)
            self.counts[k] = [DECAY * self.counts[k][0] + good, DECAY * self.counts[k][1] + 1 - good]
            for cell in self.bins[k]:
                cell[:] = [DECAY * count for count in cell]
            cell = self.bins[k][_bin(confidence)]
            cell[0] += good
            cell[1] += 1
            share = self.known.share
            share[k] = share.get(k, GUESS) + (1 - DECAY) * (good - share.get(k, GUESS))

    def took(self, k: int, drafts: int, early: float, checks: float, late: float, tail: float) -> None:
        """Seconds of one cycle: its early layers, its exit heads, its deep layers, everything else."""
        known, layer = self.known, early / ((drafts + 1) * k)
        if known.layer.count == 0:
            known.tail.one, known.check = tail, 2 * layer
        known.layer.saw(1, layer)
        if k < self.num_layers:
            known.layer.saw(drafts + 1, late / (self.num_layers - k))
        known.tail.saw(drafts + 1, tail)
        if drafts:
            known.check, known.drafts = mixed(known.check, checks / drafts, known.drafts), known.drafts + 1
        self.costs, self.drafted = self._costs(), drafts

    def cycle_done(self, tokens: int, rows: int, seconds: float) -> None:
        """All rows together, after `took`."""
        self.cycles += 1
        known, step = self.known, self.costs.step
        if not self.drafted:
            known.plain, known.cycles = mixed(known.plain, seconds / step, known.cycles), known.cycles + 1
        if self.length is not None:
            return
        known.due, known.debt = max(0, known.due - 1), known.debt - SPEND
        if self.drafted:
            usual = 3 * self.costs.cycle(self.current, self.drafted)  # all that is longer is not the drafts' fault
            known.debt += min(seconds, usual) / (known.plain * step) - tokens / rows
            if self._pays(self.current):
                known.gap = GAP
            elif not (self.trying and tokens > 1.5 * rows):  # one that was right is followed by another
                known.due, known.gap = known.gap, 2 * known.gap
                self.turn += 1
        known.debt = max(known.debt, -CREDIT)
        known.stopped = known.debt > (0 if known.stopped else LIMIT)


def _bin(confidence: float) -> int:
    return min(BINS - 1, max(0, int(confidence * BINS)))
