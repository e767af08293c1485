"""Lossless decoding over pipeline stages: an early stage drafts while later stages verify (PPSD, arXiv 2509.19368).

Every token runs through every stage, as in plain decoding. But the first stage does not wait for the final layer to say
what follows: an exit proposes a token as soon as its layer has run, and the first stage sets out on that one. The last
stage says of each position what really follows. Where that is the draft, its position is in flight already; else what
is in flight behind it is void: it is heard and ignored, and the next position that sets out tells every stage where to
go on from (`Token.start`), so that nobody has to be called back.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ee_scale.inference.pipeline_messages import Decision, Token
from ee_scale.inference.pipeline_rows import Draft, Row
from ee_scale.modeling.drafting import DECAY, EDGE, GUESS, PRIOR

Launch = Callable[[int, torch.Tensor, int], tuple[Token, Decision | None]]


@dataclass(frozen=True)
class Reach:
    """How far drafts may run ahead.

    Attributes:
        stage: the one that drafts; stages: how many there are.
        of_row: drafts in flight behind a text, at most.
        in_flight: positions of all texts in flight, at most.
        times: with 1, 2, ... positions of one text in flight, the time between two answers of the last stage where the
            draft between them was right, and where it was wrong; () where the number of drafts is given.
    """

    stage: int
    stages: int
    of_row: int
    in_flight: int
    times: tuple[tuple[float, float], ...] = ()

    def positions(self, acceptance: float) -> int:
        """Drafts set out while fewer positions than these are in flight: so many pay best at this share of right ones.

        Texts that fill the pipeline so need no drafts.
        """
        if not self.times:
            return self.in_flight
        mean = [acceptance * right + (1 - acceptance) * wrong for right, wrong in self.times]
        best = min(range(len(mean)), key=mean.__getitem__)
        return best + 1 if mean[best] * EDGE < mean[0] else 1


def reach(stage: int, costs: Sequence[float], rows: int, length: int | None) -> Reach:
    """costs: time of each stage for a position, in any unit; length: drafts in flight behind a text; None: as pays.

    A stage works at one position at a time, so that more of them than stages would only queue up.
    """
    stages = len(costs)
    if length is not None:
        return Reach(stage, stages, length, rows * (length + 1))
    counts = range(1, stages + 1)
    slowest, way = max(*costs, sum(costs[: stage + 1])), sum(costs)
    times = tuple((max(slowest, way / count), _time_of_rejections(stage, costs, count)) for count in counts)
    return Reach(stage, stages, stages - 1, max(rows, stages), times)


def _time_of_rejections(stage: int, costs: Sequence[float], count: int) -> float:
    """Time from answer to answer where all drafts are wrong: those in flight are in the way of what follows."""
    free, answers = [0.0] * len(costs), [0.0]
    for _ in range(3):  # from the second on, each begins as the one before
        start = max(answers[-1], free[0])
        for number in range(count):
            arrives = start
            for place, cost in enumerate(costs):
                free[place] = arrives = max(free[place], arrives) + cost
                if place == stage:
                    word = arrives
            if number == 0:
                answers.append(arrives)
            start = max(free[0], word)
    return answers[-1] - answers[-2]


def speedup(stages: int, stage: int, acceptance: float) -> float:
    """How many times as fast one text is decoded as without drafts, if all stages take as long and messages no time.

    A rejection waits for a whole way through the stages; a draft that is accepted comes one after the other, as often
    as the drafting stage `stage` (from 0) can say one.
    """
    return stages / (stages * (1 - acceptance) + (stage + 1) * acceptance)


@dataclass
class Flown:
    """A position in flight. `live`: nothing before it was rejected; `drafted`: the exit's word on it has been heard."""

    row: int
    live: bool = True
    drafted: bool = False


@dataclass
class Ahead:
    """What runs ahead of one text.

    Attributes:
        drafts: proposed behind the text; the first `launched` of them are in flight.
        newest: the live position that set out last.
    """

    drafts: deque[Draft] = field(default_factory=deque)
    launched: int = 0
    newest: Flown = field(default_factory=lambda: Flown(0))


class PipelineSpeculation:
    """The first stage's part: what sets out, and what is made of the answers.

    Everything follows from tokens and the order of positions, never from what arrives first: the ranks of a tensor
    group must do the same.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        exit_layer: int,
        num_layers: int,
        reach: Reach,
        launch: Launch,
        hear: Callable[[int], Decision],
        tell: Callable[[Row], None],
    ):
        """launch(row, ids [1, S], start) runs this stage and returns also what its exit says, if that is here;
        hear(stage) is the next answer of a stage; tell(row) is called after each new token."""
        self.rows, self.exit_layer, self.num_layers, self.reach = rows, exit_layer, num_layers, reach
        self.launch, self.hear, self.tell = launch, hear, tell
        self.ahead = [Ahead() for _ in rows]
        self.flight: deque[Flown] = deque()
        self.unheard: deque[Flown] = deque()  # in flight, and the exit's word is still to come
        self.drafted = self.accepted = 0
        self.right, self.judged = GUESS * PRIOR, PRIOR

    def run(self) -> tuple[int, int]:
        """Until every text is finished and nothing is in flight: (drafts that set out, those accepted of them)."""
        for number, row in enumerate(self.rows):
            self._set_out(number, row.ids, 0)
        while self.flight:
            self._launch_drafts()
            self._land()
        return self.drafted, self.accepted

    def _set_out(self, number: int, ids: torch.Tensor, start: int) -> None:
        flown = self.ahead[number].newest = Flown(number)
        self.flight.append(flown)
        self.unheard.append(flown)
        _, said = self.launch(number, ids, start)
        if said is not None:
            self._take_word(said)

    def _launch_drafts(self) -> None:
        """While stages would idle: the draft with the fewest others before it, of the shortest text."""
        most = self.reach.positions(self.right / self.judged)
        while len(self.flight) < most:
            ready = [number for number in range(len(self.rows)) if self._may_launch(number)]
            if not ready:
                return
            number = min(ready, key=lambda n: (self.ahead[n].launched, len(self.rows[n].tokens)))
            row, ahead = self.rows[number], self.ahead[number]
            self._hear_word(ahead.newest)
            draft = ahead.drafts[ahead.launched]
            if row.ends(draft.token):
                continue
            ahead.launched += 1
            self.drafted += 1
            ids = torch.full_like(row.ids[:, -1:], draft.token)
            self._set_out(number, ids, row.ids.shape[1] + ahead.launched - 1)

    def _may_launch(self, number: int) -> bool:
        """Whether a draft may set out; not behind an end mark, and not if nothing may follow it."""
        row, ahead = self.rows[number], self.ahead[number]
        if row.ended or ahead.launched >= self.reach.of_row:
            return False
        if len(row.tokens) + ahead.launched + 1 >= row.settings.max_new_tokens:
            return False
        waits = len(ahead.drafts) > ahead.launched
        return not (waits and row.ends(ahead.drafts[ahead.launched].token))

    def _hear_word(self, flown: Flown) -> None:
        """The exit's word on a position: it speaks in the order of positions."""
        while not flown.drafted:
            self._take_word(self.hear(self.reach.stage))

    def _take_word(self, decision: Decision) -> None:
        flown = self.unheard.popleft()
        flown.drafted = True
        if flown.live:
            drafts = self.ahead[flown.row].drafts
            drafts.append(self.rows[flown.row].draft(decision, [draft.token for draft in drafts]))

    def _land(self) -> None:
        """The last stage's answer about the oldest position in flight."""
        flown = self.flight.popleft()
        self._hear_word(flown)
        decision = self.hear(self.reach.stages - 1)
        if not flown.live:
            return
        row, ahead = self.rows[flown.row], self.ahead[flown.row]
        draft = ahead.drafts.popleft()
        token = row.judge(decision, draft)
        right = token == draft.token
        self.right, self.judged = DECAY * self.right + right, DECAY * self.judged + 1  # in flight or not
        in_flight = right and ahead.launched > 0
        if in_flight:
            row.keep(token, self.exit_layer, draft.score)
            ahead.launched -= 1
            self.accepted += 1
        else:
            row.keep(token, self.num_layers, float("nan"))
        if row.ended or not in_flight:
            self._void(flown.row)
        self.tell(row)
        if not row.ended and not in_flight:
            self._set_out(flown.row, row.ids[:, -1:], row.ids.shape[1] - 1)

    def _void(self, number: int) -> None:
        """What is in flight of a text will be heard, and counts for nothing."""
        for flown in self.flight:
            if flown.row == number:
                flown.live = False
        self.ahead[number].drafts.clear()
        self.ahead[number].launched = 0
