"""How far to draft and from which exit, as costs and acceptance say."""

import random
from dataclasses import dataclass

import pytest

from ee_scale.modeling.costs import Costs, RowTime, best_draft_length
from ee_scale.modeling.drafting import DECAY, GAP, LIMIT, MEASURED, REJECTED, SEEN, SPEND, Drafting, Known, known_of


class Exit:
    """What the controller sees of an exit that shares k layers; here its name is k."""

    each = 0.0

    def __init__(self, k: int):
        self.name = self.shared = k


def _drafting(layers=(2, 6), num_layers=8, max_draft=12, length=None, known=None) -> Drafting:
    """One that has measured what a cycle without drafts takes."""
    drafting = Drafting(num_layers, max_draft, length, known or Known(cycles=MEASURED))
    return drafting.meet([Exit(k) for k in layers])


def _fares(drafting: Drafting, k: int, good: int, bad: int) -> None:
    for _ in range(good):
        drafting.fared(k, [0.5], 1)
    for _ in range(bad):
        drafting.fared(k, [0.5], 0)


def _drafts(drafting: Drafting, chance: float = 1.0) -> int:
    """Drafts of a cycle (not one that tries in any case) whose every draft is accepted with this probability."""
    count = 0
    while drafting.goes_on(count, [chance**count]):
        count += 1
    return count


@pytest.mark.parametrize("length", [0, 1, 5])
def test_fixed_length(length):
    assert _drafts(_drafting(length=length)) == length


def test_never_more_than_the_cap():
    drafting = _drafting(max_draft=3)
    _fares(drafting, 2, 100, 0)
    drafting.start()
    assert _drafts(drafting) <= 3
    assert _drafts(_drafting(max_draft=3, length=9)) == 3


def test_acceptance_counts_up_to_the_first_rejection():
    drafting = _drafting()
    before = drafting.acceptance(2)
    drafting.fared(2, [0.9, 0.9, 0.9, 0.9], 2)  # two good, one bad, the last says nothing
    assert drafting.counts[2] == pytest.approx([(DECAY + 1) * DECAY, 1])  # older ones fade
    assert drafting.acceptance(2) != before
    assert drafting.counts[6] == [0.0, 0.0]


def test_experience_moves_the_choice_of_exit():
    drafting = _drafting()
    _fares(drafting, 2, 0, 50)
    _fares(drafting, 6, 50, 0)
    drafting.known.check = 0.1
    assert drafting.start() == 6
    _fares(drafting, 2, 200, 0)  # the old counts fade
    assert drafting.start() == 2


def test_a_small_advantage_does_not_switch():
    drafting = _drafting(layers=(2, 3))
    drafting.current = 2
    promise = {2: 1.0, 3: 1.08}
    drafting.promise = promise.__getitem__
    assert drafting.start() == 2
    promise[3] = 1.12
    assert drafting.start() == 3


def test_promise_is_the_best_of_tokens_per_second():
    drafting = _drafting()
    a = drafting.acceptance(2)
    best = max((1 - a ** (g + 1)) / (1 - a) / drafting.cycle(2, g) for g in range(1, 13))
    assert drafting.promise(2) == pytest.approx(best)
    # A draft and two passes of two layers, six deep layers over two rows, the rest: in layers.
    assert drafting.cycle(2, 1) == pytest.approx(2 * 2 + 2.0 + 6 * 1.15 + 2.0 * 1.15)


def test_hopeless_drafts_are_not_made_and_sure_ones_are():
    drafting = _drafting(layers=(2,))
    _fares(drafting, 2, 0, 400)
    assert _drafts(drafting, 0.01) == 0
    drafting = _drafting(layers=(2,))
    _fares(drafting, 2, 400, 0)
    assert _drafts(drafting, 0.999) == 1  # none was right yet
    drafting.tried(2, 1)
    assert _drafts(drafting, 0.999) == 12
    assert 0 < _drafts(drafting, 0.7) < 12


def test_what_promises_nothing_is_tried_in_doubling_spells():
    drafting, tried = _drafting(layers=(2,)), []
    _fares(drafting, 2, 0, 400)
    for cycle in range(400):
        drafting.start()
        if drafted := drafting.goes_on(0, [1.0]):
            tried.append(cycle)
            assert not drafting.goes_on(1, [0.01])
            drafting.fared(2, [0.5], 0)
        drafting.took(2, int(drafted), (1 + drafted) * 2e-3, drafted * 1e-3, 6e-3, 1e-3)
        drafting.cycle_done(1, 1, 9e-3)  # as if they cost nothing
    assert tried == [0, GAP + 1, 3 * GAP + 2, 7 * GAP + 3, 15 * GAP + 4]


def test_tried_exits_take_turns():
    drafting, tried = _drafting(layers=(2, 3, 6)), []
    for k in (2, 3, 6):
        _fares(drafting, k, 0, 400)
    for _ in range(200):
        k = drafting.start()
        if drafted := drafting.goes_on(0, [1.0]):
            tried.append(k)
        drafting.took(k, int(drafted), (1 + drafted) * k * 1e-3, drafted * 1e-3, (8 - k) * 1e-3, 1e-3)
        drafting.cycle_done(1, 1, 9e-3)
    assert tried == [2, 3, 6, 2]


def test_a_try_that_was_right_is_followed_by_another():
    drafting = _drafting(layers=(2,))
    _fares(drafting, 2, 0, 400)
    known = drafting.known
    for right in (True, True, False):
        drafting.start()
        assert drafting.trying
        drafting.fared(2, [0.5], int(right))
        drafting.took(2, 1, 4e-3, 50e-3, 6e-3, 1e-3)  # so dear that it never pays
        known.debt = 0.0
        drafting.cycle_done(1 + right, 1, 9e-3)
        known.debt = 0.0
    drafting.start()
    assert not drafting.trying


def test_losses_are_paid_back_before_the_next_draft():
    """A promise that is wrong, as the measured seconds of whole cycles say."""
    drafting, drafts = _drafting(layers=(2,)), []
    drafting.promise = lambda k: 1e9
    for _ in range(1000):
        drafting.start()
        drafted = drafting.goes_on(0, [1.0])
        drafts.append(drafted)
        drafting.took(2, int(drafted), (1 + drafted) * 2e-3, 0.0, 6e-3, 2e-3)
        drafting.cycle_done(1, 1, 15e-3 if drafted else 10e-3)
    assert sum(drafts[:20]) == 9  # half a token each
    assert sum(drafts) <= 2 * (LIMIT + 1000 * SPEND) + 1


def test_nothing_is_drafted_before_a_plain_cycle_is_measured():
    drafting = Drafting(8, 12).meet([Exit(2)])
    _fares(drafting, 2, 400, 0)
    for _ in range(MEASURED):
        drafting.start()
        assert not drafting.goes_on(0, [1.0])
        drafting.took(2, 0, 2e-3, 0.0, 6e-3, 1e-3)
        drafting.cycle_done(1, 1, 9e-3)
    drafting.start()
    assert drafting.goes_on(0, [1.0])


def test_calls_of_one_kind_share_what_they_know():
    class Model:
        pass

    model, other = Model(), Model()
    known = known_of(model, "cpu", 1)
    known.debt = 7.0
    assert known_of(model, "cpu", 1) is known
    assert known_of(model, "cpu", 8).debt == known_of(other, "cpu", 1).debt == 0
    first = Drafting(8, 12, known=known).meet([Exit(2)])
    _fares(first, 2, 0, 300)
    assert Drafting(8, 12, known=known).meet([Exit(2)]).acceptance(2) < 0.1


@pytest.mark.parametrize(("jump", "slope"), [(0.0, 0.0), (1.5, 0.02), (0.1, 0.3), (0.0, 0.05)])
def test_rows_are_a_jump_and_a_line(jump, slope):
    time = RowTime(1.0)
    for _ in range(30):
        for rows in (1, 2, 4, 9):
            time.saw(rows, 2e-3 * (1 + (jump + slope * (rows - 1) if rows > 1 else 0)))
    assert time.one == pytest.approx(2e-3)
    for rows in (2, 3, 6, 13):
        assert time.at(rows) == pytest.approx(2e-3 * (1 + jump + slope * (rows - 1)), rel=0.03)


def test_one_interrupted_pass_does_not_make_rows_dear():
    """Where drafts look dear none are made, so nothing would correct it."""
    time = RowTime(1e-3)
    for _ in range(20):
        time.saw(1, 1e-3)
        time.saw(2, 1.06e-3)
    time.saw(2, 4e-3)
    assert time.at(2) < 1.08e-3
    for _ in range(30):  # but what lasts is believed
        time.saw(2, 2e-3)
    assert time.at(2) == pytest.approx(2e-3, rel=0.05)


def test_rows_of_one_number_say_what_they_cost():
    time = RowTime(1e-3)
    for _ in range(40):
        time.saw(1, 1e-3)
        time.saw(2, 2.5e-3)
    assert time.at(2) == pytest.approx(2.5e-3, rel=0.02)
    assert time.at(13) >= time.at(2)


def test_dear_checks_shorten_drafts():
    cheap, dear = _drafting(layers=(2,)), _drafting(layers=(2,))
    for drafting, seconds in ((cheap, 0.0001), (dear, 0.05)):
        _fares(drafting, 2, 40, 10)
        for _ in range(50):
            drafting.took(2, 4, early=0.010, checks=4 * seconds, late=0.006, tail=0.001)
            drafting.cycle_done(3, 1, 0.02)
        assert drafting.known.layer.one == pytest.approx(0.001, rel=0.05)
        assert drafting.known.check == pytest.approx(seconds, rel=0.1)
    assert _drafts(cheap, 0.8) > _drafts(dear, 0.8)


def test_one_interrupted_measurement_counts_for_little():
    drafting = _drafting(layers=(2,))
    for _ in range(20):
        drafting.took(2, 4, 0.010, 0.004, 0.006, 0.001)
    before = drafting.known.layer.one
    drafting.took(2, 4, 10.0, 0.004, 0.006, 0.001)
    assert drafting.known.layer.one < 1.3 * before


def test_confidence_bins_learn():
    drafting = _drafting()
    for _ in range(100):
        drafting.fared(2, [0.95], 1)
        drafting.fared(2, [0.15], 0)
    assert drafting.calibrated(2, 0.93) > 0.95
    assert drafting.calibrated(2, 0.12) < 0.1
    assert 0.2 < drafting.calibrated(2, 0.5) < 0.8  # never seen: between the confidence and the exit's mean
    assert drafting.calibrated(2, 1.0) > 0.9  # the upper edge belongs to the last bin


@pytest.mark.parametrize("length", [None, 3])
def test_an_exit_that_never_agrees_rests_for_growing_spells(length):
    drafting, tried = _drafting(layers=(2,), length=length), []
    drafting.promise = lambda k: 1e9  # a draft always seems to pay
    for cycle in range(300):
        if drafting.goes_on(0, [1.0]):
            tried.append(cycle)
            drafting.tried(2, 0)
        drafting.cycle_done(1, 1, 1.0)
        if length:  # after that one draft at a time
            assert drafting.goes_on(1, [1.0]) == (cycle < 2)
    assert tried == [0, 1, 2, 19, 52, 117, 246]


def test_an_exit_that_never_agreed_on_the_prompt_rests_at_once():
    drafting, tried = _drafting(layers=(2,)), []
    drafting.promise = lambda k: 1e9
    drafting.foresaw(2, 0, SEEN)
    for cycle in range(300):
        if drafting.goes_on(0, [1.0]):
            tried.append(cycle)
            drafting.tried(2, 0)
        drafting.cycle_done(1, 1, 1.0)
    assert tried == [16, 49, 114, 243]
    for agreed, seen in ((0, SEEN - 1), (1, SEEN)):
        drafting = _drafting(layers=(2,))
        drafting.foresaw(2, agreed, seen)
        drafting.start()
        assert drafting.goes_on(0, [1.0])


def test_one_accepted_draft_ends_the_spells():
    drafting = _drafting(length=1)
    for _ in range(REJECTED[0]):
        assert drafting.goes_on(0, [1.0])
        drafting.tried(drafting.current, 0)
    assert not drafting.goes_on(0, [1.0])
    drafting.cycles += GAP + 1
    assert drafting.goes_on(0, [1.0])
    drafting.tried(drafting.current, 1)
    for _ in range(REJECTED[1] - 1):
        drafting.tried(drafting.current, 0)
        drafting.cycles += 1
        assert drafting.goes_on(0, [1.0])
    drafting.tried(drafting.current, 0)
    assert drafting.rests_until[drafting.current] == drafting.cycles + 1 + GAP
    other = next(k for k in drafting.sources if k != drafting.current)
    assert drafting.rests_until[other] == 0


# -- a whole text, on a machine whose costs are given ------------------------------------------------------------------


@dataclass
class Machine:
    """Decodes `tokens` per row at known costs: an exit is right with its probability, which its confidence tells.

    Attributes:
        on_prompts: how much rarer it is right on prompts than on the model's own text.
        seconds, plain: what that took, and what as many cycles without drafts take.
        tries: cycles that drafted though it promised nothing.
    """

    costs: Costs
    rights: dict[int, float]
    rows: int
    on_prompts: float = 1.0
    seconds: float = 0.0
    plain: float = 0.0
    tries: int = 0

    def decode(self, tokens: int, seed: int, known: Known | None = None, shift: dict[int, float] | None = None) -> None:
        luck, costs, made = random.Random(seed), self.costs, [0] * self.rows
        drafting = Drafting(costs.num_layers, 12, known=known).meet([Exit(k) for k in self.rights])
        for k, right in self.rights.items():
            drafting.foresaw(k, sum(luck.random() < self.on_prompts * right for _ in range(SEEN)), SEEN)
        while min(made) < tokens:
            rights = shift if shift and min(made) > tokens / 2 else self.rights
            k, confidences, chances = drafting.start(), [], [1.0] * self.rows
            while drafting.goes_on(len(confidences), chances):
                confidences.append([luck.betavariate(4 * rights[k] + 0.01, 4.01 - 4 * rights[k]) for _ in made])
                chances = [c * drafting.calibrated(k, x) for c, x in zip(chances, confidences[-1], strict=True)]
            drafts, new, accepted = len(confidences), 0, 0
            for row in range(self.rows):
                own = [values[row] for values in confidences]
                m = next((i for i, value in enumerate(own) if luck.random() >= value), drafts)
                drafting.fared(k, own, m)
                made[row] += m + 1
                new, accepted = new + m + 1, accepted + m
            if drafts:
                drafting.tried(k, accepted)
            late, tail = costs.layers(costs.num_layers - k, drafts + 1), costs.final_head(drafts + 1)
            parts = [(drafts + 1) * costs.layers(k), drafts * costs.checks[k], late, tail]
            parts = [part * luck.lognormvariate(0, 0.05) * (4 if luck.random() < 0.003 else 1) for part in parts]
            drafting.took(k, drafts, *parts)
            drafting.cycle_done(new, self.rows, sum(parts))
            # Noise is the same with drafts and without: it counts for both, or for neither.
            self.seconds += costs.cycle(k, drafts)
            self.plain += new / self.rows * costs.step
            self.tries += drafting.trying


def _machine(jump: float, slope: float, check: float, rights: dict[int, float], rows: int) -> Machine:
    times = {n: 1 + (jump + slope * (n - 1) if n > 1 else 0) for n in range(1, 14)}
    head = {n: 4 * time for n, time in times.items()}
    return Machine(Costs(30, times, head, dict.fromkeys(rights, check)), rights, rows)


DEVICES = {"dear second row": (1.0, 0.05), "nearly flat": (0.1, 0.02), "flat": (0.0, 0.0), "steep": (0.0, 0.3)}


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rights", [{5: 0.0}, {5: 0.1, 10: 0.2}, {5: 0.05, 10: 0.15, 20: 0.3}])
def test_exits_that_never_pay_cost_next_to_nothing(device, rows, rights):
    machine = _machine(*DEVICES[device], 5.0, rights, rows)
    assert all(best_draft_length(machine.costs, k, right)[0] == 0 for k, right in rights.items())
    for seed in range(4):
        machine.decode(128, seed)  # nothing is known from earlier calls: the worst case
    assert machine.plain / machine.seconds >= 0.98
    assert machine.tries <= 4 * 5
    known, long = Known(), _machine(*DEVICES[device], 5.0, rights, rows)
    for seed in range(16):
        long.decode(64, seed, known)
    assert long.plain / long.seconds >= 0.985
    assert 1 <= long.tries <= 16


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(
    ("device", "rights", "share"),
    [("nearly flat", {5: 0.85}, 0.9), ("flat", {5: 0.6, 10: 0.7}, 0.9), ("dear second row", {5: 0.9}, 0.85)],
)
def test_exits_that_pay_are_used(device, rows, rights, share):
    machine, known = _machine(*DEVICES[device], 5.0, rights, rows), Known()
    for seed in range(6):
        machine.decode(256, seed, known)
    best = max(best_draft_length(machine.costs, k, right)[1] for k, right in rights.items())
    assert best > 1.15
    assert machine.plain / machine.seconds >= share * best


def test_a_text_that_becomes_easy_is_noticed():
    machine = _machine(*DEVICES["nearly flat"], 5.0, {5: 0.1}, 1)
    for seed in range(4):
        machine.decode(2000, seed, shift={5: 0.95})
    assert machine.plain / machine.seconds > 1.2


def test_prompts_that_are_harder_than_own_text_do_not_hide_an_exit():
    """What earlier calls saw says more than a few positions of a prompt."""
    machine, known = _machine(0.05, 0.01, 2.0, {5: 0.45}, 1), Known()
    machine.on_prompts = 0.3
    for seed in range(40):
        machine.decode(64, seed, known)
    best = best_draft_length(machine.costs, 5, 0.45)[1]
    assert best > 1.1
    assert machine.plain / machine.seconds > 1 + 0.5 * (best - 1)
