"""Lookups in the text itself: where an n-gram stood last, what came then, and how often that was right."""

import random

import pytest

from ee_scale.modeling.drafting import EDGE, MATCHES, MEASURED, Drafting, Known
from ee_scale.modeling.prompt_lookup import COMPARED, LONGEST, TextIndex


class Text:
    """What the controller sees of lookups."""

    name, shared, each = "prompt", 0, 0.0


class Exit:
    """What the controller sees of an exit after two layers."""

    name, shared, each = "exit 2", 2, 0.0


def _index(tokens) -> TextIndex:
    index = TextIndex()
    for token in tokens:
        index.append(token)
    return index


def _slow(tokens: list[int]) -> tuple[int, int]:
    """(match, place) by a search: the longest n-gram that stood before, where it stood last."""
    end = len(tokens)
    for n in range(min(LONGEST, end - 1), 0, -1):
        places = [i + n for i in range(end - n) if tokens[i : i + n] == tokens[end - n :]]
        if places:
            place, match = places[-1], n
            while match < COMPARED and match < place and tokens[place - match - 1] == tokens[end - match - 1]:
                match += 1
            return match, place
    return 0, 0


@pytest.mark.parametrize("words", [1, 2, 5, 40])
def test_the_same_as_a_search(words):
    luck, index, tokens = random.Random(words), TextIndex(), []
    for _ in range(300):
        match, place = _slow(tokens)
        token = luck.randrange(words)
        assert index.append(token) == (match, match > 0 and tokens[place] == token)
        tokens.append(token)
        match, place = _slow(tokens)
        assert index.match == match
        if match:
            assert index.continuation(4)[: len(tokens) - place] == tokens[place : place + 4]


def test_the_latest_place_counts_and_loops_go_on():
    assert _index([1, 2, 3, 9, 1, 2, 4, 8, 1, 2]).continuation(3) == [4, 8, 1]
    assert _index([5, 6, 7, 5, 6, 7, 5]).continuation(7) == [6, 7, 5, 6, 7, 5, 6]
    assert _index([4, 4]).continuation(3) == [4, 4, 4]


@pytest.mark.parametrize("tokens", [[], [7], [7, 8, 9]])
def test_nothing_found(tokens):
    assert _index(tokens).match == 0


def _drafting(*sources, length=None) -> Drafting:
    return Drafting(8, 12, length, Known(cycles=MEASURED)).meet(sources)


def test_drafts_from_the_text_as_far_as_they_promise_more():
    drafting = _drafting(Text())
    for match in range(1, MATCHES + 1):
        for _ in range(300):
            drafting.looked_up(match, match > 2)
    assert drafting.start([1]) == "prompt"
    assert not drafting.goes_on(0, [1.0])
    drafting.start([5])
    assert drafting.planned == 12  # rows cost little, and all are right
    drafting.start([5, 0, 0, 0, 0, 0, 0, 0])
    assert 0 < drafting.planned <= 12
    drafting.start([0, 0])
    assert drafting.planned == 0
    for _ in range(300):
        drafting.looked_up(5, False)
    drafting.start([5])
    assert drafting.planned == 0


def test_the_source_that_promises_more_drafts():
    drafting = _drafting(Exit(), Text())
    for _ in range(300):
        drafting.fared("exit 2", [0.9], 1)
        for match in range(1, MATCHES + 1):
            drafting.looked_up(match, match == MATCHES)
    assert drafting._pays("exit 2")
    assert drafting.start([MATCHES]) == "prompt"
    assert drafting.start([1]) == "exit 2"
    assert drafting.start([0]) == "exit 2"


def test_nothing_is_drafted_while_losses_are_paid_back():
    drafting = _drafting(Text())
    for _ in range(300):
        drafting.looked_up(MATCHES, True)
    drafting.start([MATCHES])
    assert drafting.planned
    drafting.known.stopped = True
    drafting.start([MATCHES])
    assert not drafting.planned


def test_a_number_of_drafts_that_is_given():
    for match, both, alone in ((1, "exit 2", 3), (2, "prompt", 3)):
        assert _drafting(Exit(), Text(), length=3).start([match, 0]) == both
        drafting = _drafting(Text(), length=3)
        drafting.start([match])
        assert drafting.planned == alone
    assert _drafting(Text(), length=0).start([9]) == "prompt"
    assert not _drafting(Text(), length=0).goes_on(0, [1.0])


def test_a_prompt_counts_for_little_when_the_text_is_another():
    drafting = _drafting(Text())
    for _ in range(300):
        drafting.looked_up(3, True)
    drafting.rehearsed()
    before = drafting.acceptance("prompt 3")
    for _ in range(6):
        drafting.looked_up(3, False)
    assert before > 0.9
    assert drafting.acceptance("prompt 3") < 0.7
    assert EDGE > 1
