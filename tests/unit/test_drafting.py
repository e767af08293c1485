"""How far to draft and from which exit, as costs and acceptance say."""

from dataclasses import replace

import pytest

from ee_scale.modeling.drafting import GAP, REJECTED, SEEN, Drafting


def _drafting(layers=(2, 6), num_layers=8, max_draft=12, length=None) -> Drafting:
    return Drafting(layers, num_layers, max_draft, length)


def _fares(drafting: Drafting, k: int, good: int, bad: int) -> None:
    for _ in range(good):
        drafting.fared(k, [0.5], 1)
    for _ in range(bad):
        drafting.fared(k, [0.5], 0)


def _drafts(drafting: Drafting, chance: float = 1.0) -> int:
    """Drafts of a cycle (not one that tries in any case) whose every draft is accepted with this probability."""
    drafting.cycles, count = 3, 0
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
    assert drafting.counts[2] == [2.0, 1.0]
    assert drafting.acceptance(2) != before
    assert drafting.counts[6] == [0.0, 0.0]


def test_experience_moves_the_choice_of_exit():
    drafting = _drafting()
    _fares(drafting, 2, 0, 50)
    _fares(drafting, 6, 50, 0)
    drafting.costs = replace(drafting.costs, checks={2: 0.1, 6: 0.1})
    assert drafting.start() == 6
    for _ in range(200):
        drafting.cycle_done(1, 1, 1.0)  # the old counts fade
    _fares(drafting, 2, 200, 0)
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
    best = max((1 - a ** (g + 1)) / (1 - a) / drafting.costs.cycle(2, g) for g in range(13))
    assert drafting.promise(2) == pytest.approx(best)
    # A draft and two passes of two layers, six deep layers over two rows, the rest: in layers.
    assert drafting.costs.cycle(2, 1) == pytest.approx(2 * 2 + 2.0 + 6 * 1.05 + 2.0)


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


def test_what_is_never_tried_is_never_measured():
    drafting, drafted = _drafting(layers=(2,)), []
    _fares(drafting, 2, 0, 400)
    for _ in range(40):
        drafted.append(drafting.goes_on(0, [1.0]))
        assert not drafting.goes_on(1, [0.01])
        drafting.fared(2, [0.5], 0)
        drafting.cycle_done(1, 1, 1.0)
    assert [i for i, tried in enumerate(drafted) if tried] == [0, 1, 16, 32]


def test_dear_checks_shorten_drafts():
    cheap, dear = _drafting(layers=(2,)), _drafting(layers=(2,))
    for drafting, seconds in ((cheap, 0.0001), (dear, 0.05)):
        _fares(drafting, 2, 40, 10)
        for _ in range(50):
            drafting.took(2, 4, early=0.010, checks=4 * seconds, late=0.006, tail=0.001)
            drafting.cycle_done(3, 1, 0.02)
        assert drafting.layer == pytest.approx(0.001, rel=0.05)
        assert drafting.check == pytest.approx(seconds, rel=0.1)
    assert _drafts(cheap, 0.8) > _drafts(dear, 0.8)


def test_one_interrupted_measurement_counts_for_little():
    drafting = _drafting(layers=(2,))
    for _ in range(20):
        drafting.took(2, 4, 0.010, 0.004, 0.006, 0.001)
    before = drafting.layer
    drafting.took(2, 4, 10.0, 0.004, 0.006, 0.001)
    assert drafting.layer < 1.3 * before


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
    drafting.rate = 1e-9  # a draft always seems to pay
    drafting.measured = True
    for cycle in range(300):
        drafting.rate = 1e-9
        if drafting.goes_on(0, [1.0]):
            tried.append(cycle)
            drafting.tried(2, 0)
        drafting.cycle_done(1, 1, 1.0)
        if length:  # after that one draft at a time
            assert drafting.goes_on(1, [1.0]) == (cycle < 2)
    assert tried == [0, 1, 2, 19, 52, 117, 246]


def test_an_exit_that_never_agreed_on_the_prompt_rests_at_once():
    drafting, tried = _drafting(layers=(2,)), []
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
    other = next(k for k in drafting.layers if k != drafting.current)
    assert drafting.rests_until[other] == 0
