"""How far to draft, and from which source: expected tokens per second from measured costs.

What a cycle costs and brings is in `costs`; choosing the source by the ratio of both follows DEL (arXiv 2504.05598),
with seconds in place of layer counts. No draft at all is a choice like the others: where drafts do not pay, as
measured, a pass makes one token as in plain decoding, and one draft is tried in spells that double.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakKeyDictionary

from .costs import Costs, DraftCost, RowTime, expected_tokens, mixed

BINS = 10
# Observations that a guess, and what earlier calls saw of a source, are worth.
PRIOR, LEARNED, ENOUGH = 2.0, 6.0, 4  # the latter from so many drafts on
PROMPTED = 0.25  # worth of a position of the prompt where earlier calls are known: written text is harder than own text
GUESS = 0.75  # acceptance of an exit that nobody has seen
DECAY = 0.985  # of an exit's observations, at each new one
FRESH = 6.0  # observations that older ones are worth at most when a draft is tried again
SWITCH = 1.1  # another exit must promise this much more before it takes over: what is known of exits is noisy
EDGE = 1.02  # drafts must promise this much more than none
MEASURED = 2  # cycles without drafts before the first with one
# An exit whose drafts fail in so many cycles in a row (the first: before any was accepted) rests: for GAP cycles, then
# for twice as many, ...
REJECTED, GAP = (3, 6), 16
# The source that copies from the text. Its drafts are known by how many tokens a match has, up to the last of these;
# acceptance that nobody has seen: m / (m + 2) of m tokens.
PROMPT, MATCHES = "prompt", 8
CONFIDENT = 2  # tokens; where the number of drafts is given, a match of so many goes before exits
SEEN = 8  # positions of the prompt; an exit that agreed with the final layer at none of so many rests at once
# What drafts lost against plain decoding, in tokens, is paid back with SPEND per cycle before one is tried again; none
# are made from LIMIT on. Gains are kept up to CREDIT.
SPEND, LIMIT, CREDIT = 0.01, 4.0, 16.0


LOOKUPS = {f"{PROMPT} {m}": m / (m + 2) for m in range(1, MATCHES + 1)}


@dataclass
class Known:
    """What is known of decoding with one model, device and number of rows; calls hand it on.

    Attributes:
        layer, tail: time of a layer, and of everything else that a cycle has, by rows. In units of one layer until the
            first measurement.
        check: time of reading an exit: about two layers until the first measurement.
        each: source that shares no layers -> time of one draft.
        plain: seconds of a cycle without drafts, over those that `costs` says.
        cycles, drafts: how many cycles without and with drafts were measured.
        gap, due: cycles between drafts that are tried though they promise nothing; cycles until the next one.
        debt, stopped: what drafts lost, in tokens; whether that was too much, and is not paid back yet.
        share, seen: source -> its acceptance in earlier calls, and how many drafts say so.
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
    share: dict[str, float] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    each: dict[str, float] = field(default_factory=dict)

    def usual(self, name: str) -> float:
        """Acceptance of a source in earlier calls; a guess where there were none."""
        return self.share.get(name, LOOKUPS.get(name, GUESS))

    def learned(self, name: str) -> bool:
        """Whether that is more than a guess."""
        return self.seen.get(name, 0) >= ENOUGH

    def costs(self, num_layers: int, max_draft: int) -> Costs:
        """Everything but layers and exits is one tail."""
        rows = range(1, max_draft + 2)
        return Costs(num_layers, {n: self.layer.at(n) for n in rows}, {n: self.tail.at(n) for n in rows}, {})

    def draft_cost(self, source: "Priced") -> DraftCost:
        """What drafting from a source takes."""
        if source.shared:
            return DraftCost(source.shared * self.layer.one + self.check, source.shared)
        return DraftCost(self.each.get(source.name, source.each * self.layer.one))


_known: WeakKeyDictionary[object, dict[tuple[Hashable, ...], Known]] = WeakKeyDictionary()


def known_of(model: object, *case: Hashable) -> Known:
    """What earlier calls have left behind of a model in this case: number type, number of rows, ..."""
    return _known.setdefault(model, {}).setdefault(case, Known())


class Priced(Protocol):
    """What the controller has to know of a source; see `sources.Source`."""

    name: str
    shared: int
    each: float


class Drafting:
    """Decides the source and length of each draft, from what earlier drafts cost and how they fared."""

    def __init__(self, num_layers: int, max_draft: int, length: int | None = None, known: Known | None = None):
        """`length` fixes the number of drafts (0: none); else it is decided draft by draft."""
        self.num_layers, self.max_draft, self.length = num_layers, max_draft, length
        self.known = Known() if known is None else known
        self.cycles = 0
        self.drafted = 0  # in the last cycle
        self.trying = False  # this cycle drafts once, whatever is expected of it
        self.turn = 0  # of the sources that are tried

    def meet(self, sources: Iterable[Priced]) -> "Drafting":
        """Choose among these sources from now on: at least one."""
        self.priced = {source.name: source for source in sources}
        self.sources = [name for name in self.priced if name != PROMPT]  # those that are tried to be known
        self.counts = {name: [0.0, 0.0] for name in (*self.sources, *LOOKUPS)}
        self.planned = 0  # drafts from the text in this cycle
        self.bins = {name: [[0.0, 0.0] for _ in range(BINS)] for name in self.sources}
        self.rejected, self.gap = dict.fromkeys(self.sources, 0), dict.fromkeys(self.sources, GAP)
        self.rests_until = dict.fromkeys(self.sources, 0)  # by number of cycles
        self.agreed: set[str] = set()  # sources with an accepted draft
        self.costs = self._costs()
        self.current = max(self.sources, key=self.promise, default=PROMPT)
        return self

    def acceptance(self, name: str) -> float:
        """Probability that a draft of this source is accepted."""
        good, bad = self.counts[name]
        worth = LEARNED if self.known.learned(name) else PRIOR
        return (good + worth * self.known.usual(name)) / (good + bad + worth)

    def calibrated(self, name: str, confidence: float) -> float:
        """The same for a draft of this confidence: shares seen in its bin, drawn to the source's mean where few."""
        good, seen = self.bins[name][_bin(confidence)]
        return (good + 2 * (confidence + self.acceptance(name)) / 2) / (seen + 2)

    def _costs(self) -> Costs:
        return self.known.costs(self.num_layers, self.max_draft)

    def cycle(self, name: str, drafts: int) -> float:
        """Seconds of a cycle with so many drafts of this source."""
        return self.costs.drafting(self.known.draft_cost(self.priced[name]), drafts)

    def promise(self, name: str) -> float:
        """Best expected tokens per second with drafts of this source, at a fixed length of one or more."""
        a = min(self.acceptance(name), 0.999)
        lengths = range(1, self.max_draft + 1)
        return max((expected_tokens(a, g) / self.cycle(name, g) for g in lengths), default=0.0)

    @property
    def plain(self) -> float:
        """Tokens per second without drafts."""
        return 1 / self.costs.step

    def start(self, matches: Sequence[int] = ()) -> str:
        """The source of the next cycle. matches: for each row, the tokens that a lookup matched in the text; or 0."""
        self.planned, self.trying = 0, False
        if self.sources:
            self._choose_exit()
        if any(matches):
            self.planned = self._plan(matches)
        if self.sources and not self.planned:
            self.trying = self.length is None and not self._pays(self.current) and self._may_try()
            if self.trying:
                self._refresh(self.current)
        return PROMPT if self.planned else self.current

    def _choose_exit(self) -> None:
        promises = {name: self.promise(name) for name in self.sources}
        best = max(self._awake() or self.sources, key=promises.__getitem__)
        if promises[best] > SWITCH * promises[self.current] or not self._wakes(self.current):
            self.current = best

    def _plan(self, matches: Sequence[int]) -> int:
        """Drafts from the text with the most expected tokens per second, all rows together; 0: others promise more."""
        if self.length is not None:
            return self.length if max(matches) >= CONFIDENT or not self.sources else 0
        if self.known.cycles < MEASURED or self.known.stopped:
            return 0
        rate = self.promise(self.current) if self.sources and self._pays(self.current) else EDGE * self.plain
        best, expected, sure = 0, 1.0, [float(match > 0) for match in matches]
        accepted = [self.acceptance(name) for name in LOOKUPS]
        for count in range(1, self.max_draft + 1):
            sure = [s * accepted[min(m + count - 1, MATCHES) - 1] for s, m in zip(sure, matches, strict=True)]
            expected += sum(sure) / len(matches)
            if (promised := expected / self.cycle(PROMPT, count)) > rate:
                best, rate = count, promised
        return best

    def _pays(self, name: str) -> bool:
        """Whether drafts of source `name` promise more than none, and have not lost too much."""
        known = self.known
        if known.cycles < MEASURED or known.stopped or not self._wakes(name):
            return False
        return self.promise(name) > EDGE * self.plain

    def _wakes(self, name: str) -> bool:
        return self.cycles >= self.rests_until[name]

    def _awake(self) -> list[str]:
        return [name for name in self.sources if self._wakes(name)]

    def _may_try(self) -> bool:
        """Whether one draft is due though it promises nothing; then its source is the current one. They take turns."""
        awake, known = self._awake(), self.known
        if known.cycles < MEASURED or known.due > 0 or known.debt > 0 or not awake:
            return False
        self.current = awake[self.turn % len(awake)]
        return True

    def _refresh(self, name: str) -> None:
        """What was seen long ago counts for less: a text may have become easy."""
        seen = sum(self.counts[name])
        if seen > FRESH:
            self.counts[name] = [count * FRESH / seen for count in self.counts[name]]

    def goes_on(self, drafted: int, chances: Sequence[float]) -> bool:
        """Whether one more draft pays. chances: for each row, that all its drafts so far are accepted.

        The first does if the source promises more tokens per second than plain decoding, or one is due to be tried;
        more, as long as the expected extra tokens per extra second exceed the best rate. None while the source rests.
        """
        name = self.current
        if self.planned or name == PROMPT:
            return drafted < self.planned
        if drafted >= self.max_draft or not self._wakes(name):
            return False
        if drafted and self.rests_until[name] and self.rejected[name]:
            return False  # after a rest one draft tells enough
        if self.length is not None:
            return drafted < self.length
        if drafted == 0:
            return self.trying or self._pays(name)
        if self.trying or name not in self.agreed:
            return False  # one at a time until one was right
        extra = self.cycle(name, drafted + 1) - self.cycle(name, drafted)
        return sum(chances) * self.acceptance(name) > len(chances) * max(self.promise(name), self.plain) * extra

    def tried(self, name: str, accepted: int) -> None:
        """A cycle with drafts of one source, `accepted` of all rows. One more failure after a rest is enough."""
        if name == PROMPT:
            return  # lookups tell more
        if accepted:
            self.agreed.add(name)
            self.rejected[name], self.gap[name] = 0, GAP
            return
        self.rejected[name] += 1
        if self.rejected[name] >= REJECTED[name in self.agreed]:
            self._rest(name, self.cycles + 1)

    def foresaw(self, name: str, agreed: int, seen: int) -> None:
        """On the prompt a source said at `agreed` of `seen` positions what the final layer said."""
        learned = self.known.learned(name)
        worth = PROMPTED if learned else 1.0
        self.counts[name] = [worth * agreed, worth * (seen - agreed)]
        if seen >= SEEN and not agreed and not learned:
            self.rejected[name] = REJECTED[0]
            self._rest(name, self.cycles)

    def _rest(self, name: str, start: int) -> None:
        self.rests_until[name] = start + self.gap[name]
        self.gap[name] *= 2

    def fared(self, name: str, confidences: Sequence[float], accepted: int) -> None:
        """One row's drafts: the first `accepted` were right, the one after them wrong, the rest says nothing.

        Old observations fade as new ones come.
        """
        for index, confidence in enumerate(confidences[: accepted + 1]):
            good = float(index < accepted)
            self._saw(name, good)
            for cell in self.bins[name]:
                cell[:] = [DECAY * count for count in cell]
            cell = self.bins[name][_bin(confidence)]
            cell[0] += good
            cell[1] += 1

    def looked_up(self, match: int, right: bool) -> None:
        """The next token of a text is known, and whether it stood behind a match of so many tokens."""
        self._saw(f"{PROMPT} {min(match, MATCHES)}", float(right))

    def rehearsed(self) -> None:
        """Lookups in prompts are over; what is written next may be another kind of text."""
        for name in LOOKUPS:
            self._refresh(name)

    def _saw(self, name: str, good: float) -> None:
        right, wrong = self.counts[name]
        self.counts[name] = [DECAY * right + good, DECAY * wrong + 1 - good]
        known, seen = self.known, self.known.seen.get(name, 0)
        usual, rate = known.usual(name), max(1 - DECAY, 1 / (seen + PRIOR + 1))
        known.share[name], known.seen[name] = usual + rate * (good - usual), seen + 1

    def took(self, name: str, drafts: int, early: float, checks: float, late: float, tail: float) -> None:
        """Seconds of one cycle: passes of the source, its looks at them, the model's other layers, everything else."""
        known, shared = self.known, self.priced[name].shared if drafts else 0
        behind = self.num_layers - shared
        layer = early / ((drafts + 1) * shared) if shared else (early + late) / behind
        if shared or not drafts:
            if known.layer.count == 0:
                known.tail.one, known.check = tail, 2 * layer
            known.layer.saw(1, layer)
        if drafts and behind and known.layer.count:
            known.layer.saw(drafts + 1, late / behind)
        known.tail.saw(drafts + 1, tail)
        if shared:
            known.check = mixed(known.check, checks / drafts, known.drafts)
        elif drafts:
            each = (early + checks) / drafts
            known.each[name] = mixed(known.each.get(name, each), each, known.drafts)
        known.drafts += drafts > 0
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
            name = PROMPT if self.planned else self.current
            usual = 3 * self.cycle(name, self.drafted)  # all that is longer is not the drafts' fault
            known.debt += min(seconds, usual) / (known.plain * step) - tokens / rows
            if self.planned:
                pass  # seen by lookups at every token, so never tried
            elif self._pays(self.current):
                known.gap = GAP
            elif not (self.trying and tokens > 1.5 * rows):  # one that was right is followed by another
                known.due, known.gap = known.gap, 2 * known.gap
                self.turn += 1
        known.debt = max(known.debt, -CREDIT)
        known.stopped = known.debt > (0 if known.stopped else LIMIT)


def _bin(confidence: float) -> int:
    return min(BINS - 1, max(0, int(confidence * BINS)))
