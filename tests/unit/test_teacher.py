"""What is kept of the teacher: the same as was said, within its bound, whatever a text is batched with."""

import torch

from ee_scale.elastic.teacher import Taught, TeacherCache

CPU = torch.device("cpu")


def said(lengths: list[int], longest: int, *, classes: bool) -> Taught:
    """Random; behind the end of a text is what nobody may see."""
    features = {i: torch.randn(len(lengths), longest, 3) for i in (0, 2)}
    for state in features.values():
        for row, length in enumerate(lengths):
            state[row, length:] = torch.nan
    if classes:
        return Taught(features, torch.randn(len(lengths), 8), torch.randn(len(lengths), 5))
    tokens = torch.randint(99, (len(lengths), longest, 4), dtype=torch.int32)
    return Taught(features, tokens=tokens, negentropy=torch.randn(len(lengths), longest))


def test_texts_come_back_in_other_company() -> None:
    for classes in (True, False):
        cache, lengths = TeacherCache(100), [4, 8, 6]
        first = said(lengths, 8, classes=classes)
        assert not cache.holds([5])
        cache.keep([5, 7, 9], lengths, first)
        assert cache.holds([9, 5])
        found = cache.read([9, 5], 16, CPU)
        for i, state in found.features.items():
            assert state.shape == (2, 16, 3)
            assert torch.equal(state[0, :6], first.features[i][2, :6])
            assert torch.equal(state[1, :4], first.features[i][0, :4])
            assert not state[0, 6:].any()
            assert not state[1, 4:].any()
        if classes:
            assert torch.equal(found.logits, first.logits[[2, 0]])
            assert found.tokens is None
            assert found.final is None
        else:
            assert torch.equal(found.tokens[0, :6], first.tokens[2, :6])
            assert torch.equal(found.negentropy[1, :4], first.negentropy[0, :4])
            assert found.logits is None


def test_a_stage_without_features_keeps_that_it_knows_a_text() -> None:
    cache = TeacherCache(10)
    cache.keep([1, 2], [3, 3], Taught())
    assert cache.holds([2, 1])
    assert cache.read([2, 1], 8, CPU) == Taught()


def test_the_bound() -> None:
    cache = TeacherCache(10)
    cache.keep([1, 2, 3], [4, 8, 5], said([4, 8, 5], 8, classes=True))
    assert [cache.holds([text]) for text in (1, 2, 3)] == [True, False, True]
    assert cache.left == 1
    cache.keep([1, 2], [4, 8], said([4, 8], 8, classes=True))  # a text that is there is not counted again
    assert cache.left == 1
    assert not cache.holds([1, 2])
