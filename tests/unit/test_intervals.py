"""Intervals: against numbers from the literature, and as often right as they say."""

import pytest
import torch

from ee_scale.palettes.intervals import Scores, interval, is_seen, standard_error, wilson


def scores(sums: list[float], counts: list[float] | None = None) -> Scores:
    ones = [1.0] * len(sums) if counts is None else counts
    return Scores(torch.tensor(sums, dtype=torch.float64), torch.tensor(ones, dtype=torch.float64))


def test_wilson_as_published() -> None:
    """Newcombe (Statistics in Medicine 1998, table I): 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for right, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
                                    (1, 29, 0.0061, 0.1718)):  # fmt: skip
        assert wilson(right / count, count) == pytest.approx((low, high), abs=6e-5)


def test_a_mean_of_equal_texts() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    found = scores(values.tolist())
    assert found.mean == 4.0
    assert standard_error(found) == pytest.approx(float(values.std() / 2))
    low, high = interval(found)
    assert (low + high) / 2 == pytest.approx(4.0)
    assert high - low == pytest.approx(2 * 1.96 * float(values.std() / 2), rel=1e-4)
    assert interval(scores([3.0])) is None


def test_tokens_of_a_text_are_not_independent() -> None:
    """Texts of one loss each: as many facts as texts, however many tokens they have."""
    short, long = scores([2.0, 3.0, 4.0], [1.0] * 3), scores([200.0, 300.0, 400.0], [100.0] * 3)
    assert interval(long) == pytest.approx(interval(short))
    assert scores([10.0, 1.0], [10.0, 2.0]).mean == pytest.approx(11 / 12)


def test_intervals_hold_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    right = torch.rand(1000, 200, generator=generator) < 0.9
    held = [low <= 0.9 <= high for low, high in (wilson(float(row.double().mean()), 200) for row in right)]
    assert sum(held) / 1000 == pytest.approx(0.95, abs=0.02)
    lengths = torch.randint(5, 50, (1000, 200), generator=generator).double()
    nats = lengths * (3 + torch.randn(1000, 200, generator=generator, dtype=torch.float64))
    spans = [interval(Scores(*pair)) for pair in zip(nats, lengths, strict=True)]
    assert sum(low <= 3 <= high for low, high in spans) / 1000 == pytest.approx(0.95, abs=0.02)


def test_the_same_texts_tell_more() -> None:
    generator = torch.Generator().manual_seed(1)
    one = (torch.rand(1000, generator=generator) < 0.8).double()
    other = one.clone()
    other[one.nonzero()[:25]] = 0  # 25 more that are wrong
    full, small = (Scores(values, torch.ones(1000, dtype=torch.float64)) for values in (one, other))
    difference = small.minus(full)
    assert difference.mean == pytest.approx(-0.025)
    assert is_seen(*interval(difference))
    assert not is_seen(small.mean - wilson(full.mean, 1000)[1], wilson(small.mean, 1000)[1] - full.mean)
    assert not is_seen(*interval(full.minus(full)))
