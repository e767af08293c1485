"""Which subnets train in a step: the same at every grid, full first, weighted by their size."""

from collections import Counter

import pytest

from ee_scale.config.supernet import SamplingConfig
from ee_scale.elastic.sampling import FULL, RANDOM, SMALLEST, Draw, draw_stream
from ee_scale.elastic.subnet import AXES, ElasticShape, SearchSpace, SubnetSpec

SHAPE = ElasticShape(64, 4, 128, 4, 16, 2, head_dim_is_derived=False)
KEPT = {4: (0, 1, 2, 3), 3: (0, 1, 3), 2: (0, 3)}


PALETTE = ((64, 4, 128, 4), (64, 2, 64, 3), (48, 4, 128, 2), (48, 4, 64, 2))


def space(exits: tuple[int, ...] = (), palette=()) -> SearchSpace:
    return SearchSpace(SHAPE, (64, 48, 32), (4, 2), (128, 64), (4, 3, 2), KEPT, exits, palette)


def size(spec: SubnetSpec) -> int:
    """Stands for the number of trainable parameters."""
    return spec.depth * (spec.hidden + 10 * spec.groups + spec.ffn)


def stream(
    step: int = 0, micro_batches: int = 1, axes=AXES, exits=(), seed: int = 1234, palette=(), **settings
) -> list[Draw]:
    return draw_stream(space(exits, palette), axes, step, micro_batches, SamplingConfig(**settings), seed, size)


def specs(draws: list[Draw]) -> list[tuple[str, SubnetSpec]]:
    return [(draw.role, draw.spec) for draw in draws]


@pytest.mark.parametrize("micro_batches", [2, 3, 8])
def test_every_micro_batch_goes_through_the_same_subnets(micro_batches: int) -> None:
    """So a replica's share of the samples meets the same subnets as all samples in one process."""
    for step in range(20):
        alone, together = stream(step, 1), stream(step, micro_batches)
        assert len(together) == micro_batches * len(alone)
        for i in range(micro_batches):
            mine = [draw for draw in together if draw.micro_batch == i]
            assert specs(mine) == specs(alone)
            assert [draw.weight * micro_batches for draw in mine] == pytest.approx([draw.weight for draw in alone])


def test_the_full_net_comes_first_then_deep_to_shallow() -> None:
    for step in range(50):
        draws = stream(step, 3, randoms=4)
        assert [draw.role for draw in draws[:3]] == [FULL] * 3
        assert {draw.spec for draw in draws[:3]} == {SHAPE.full}
        assert [draw.micro_batch for draw in draws[:3]] == [0, 1, 2]
        depths = [draw.spec.depth for draw in draws[3:]]
        assert depths == sorted(depths, reverse=True)
        assert Counter(draw.role for draw in draws) == {FULL: 3, SMALLEST: 3, RANDOM: 12}


def test_the_smallest_net_is_that_of_the_axes_and_can_be_left_out() -> None:
    (smallest,) = {draw.spec for draw in stream() if draw.role == SMALLEST}
    assert smallest == SubnetSpec(32, 2, 64, (0, 3))
    (narrow,) = {draw.spec for draw in stream(axes=("ffn",)) if draw.role == SMALLEST}
    assert narrow == SubnetSpec(64, 4, 64, (0, 1, 2, 3))
    assert Counter(draw.role for draw in stream(smallest=False, randoms=3)) == {FULL: 1, RANDOM: 3}
    assert Counter(draw.role for draw in stream(randoms=0)) == {FULL: 1, SMALLEST: 1}


def test_without_axes_only_the_full_net_trains() -> None:
    assert stream(axes=(), micro_batches=2) == [Draw(0, FULL, SHAPE.full, 0.5), Draw(1, FULL, SHAPE.full, 0.5)]


def test_axes_that_may_not_shrink_stay_full() -> None:
    drawn = {draw.spec for step in range(100) for draw in stream(step, axes=("hidden",))}
    assert drawn == {SubnetSpec(width, 4, 128, (0, 1, 2, 3)) for width in (64, 48, 32)}


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, -0.5])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_weights(gamma: float, micro_batches: int) -> None:
    draws = stream(3, micro_batches, gamma=gamma, randoms=3)
    assert len(draws) == 5 * micro_batches
    for draw in draws:
        assert draw.weight == pytest.approx((size(SHAPE.full) / size(draw.spec)) ** gamma / len(draws))
    full, *rest = [draw.weight for draw in draws if draw.micro_batch == 0]
    assert full == pytest.approx(1 / len(draws))
    if gamma == 0:
        assert set(rest) == {full}
    small = next(draw.weight for draw in draws if draw.role == SMALLEST)
    assert (small > full, small < full) == (gamma > 0, gamma < 0)


def test_exits_are_drawn_as_often_as_depths() -> None:
    exits = tuple(SubnetSpec(64, 4, 128, tuple(range(k))) for k in (1, 3))
    randoms = [d.spec for step in range(1500) for d in stream(step, exits=(1, 3)) if d.role == RANDOM]
    for spec in exits:
        assert randoms.count(spec) / len(randoms) == pytest.approx(1 / 5, abs=0.03)  # three depths, two exits
    assert not set(exits) & {d.spec for step in range(300) for d in stream(step)}
    sideways = {d.spec for step in range(300) for d in stream(step, axes=("ffn", "hidden"), exits=(1, 3))}
    assert not set(exits) & sideways


def test_draws_depend_on_step_and_seed_and_nothing_else() -> None:
    assert [stream(step) for step in range(20)] == [stream(step) for step in range(20)]
    by_step = {tuple(specs(stream(step))) for step in range(40)}
    by_seed = {tuple(specs(stream(seed=seed))) for seed in range(40)}
    assert len(by_step) > 30
    assert len(by_seed) > 30
    drawn = Counter(d.spec for step in range(400) for d in stream(step, randoms=1) if d.role == RANDOM)
    assert set(drawn) == set(space().members())  # 36 of them: what one step draws says nothing about the next


@pytest.mark.parametrize("full_every", [1, 3])
def test_the_full_net_in_a_share_of_the_steps(full_every: int) -> None:
    for step in range(12):
        draws = stream(step, 2, full_every=full_every)
        counts = Counter(draw.role for draw in draws)
        assert counts == ({FULL: 2} if step % full_every == 0 else {}) | {SMALLEST: 2, RANDOM: 4}
        assert draws[-1].weight == pytest.approx((size(SHAPE.full) / size(draws[-1].spec)) ** 0.5 / len(draws))
        assert specs(stream(step, axes=(), full_every=full_every)) == [(FULL, SHAPE.full)]
        same = [draw.spec for draw in stream(step) if draw.role == RANDOM]  # what else is drawn does not depend on it
        assert [draw.spec for draw in stream(step, full_every=full_every) if draw.role == RANDOM] == same


def test_sizes_that_will_be_shipped_are_drawn_most() -> None:
    shipped = {space().member(*sizes) for sizes in PALETTE[1:]}
    for share in (1.0, 0.75):
        drawn = [stream(s, palette=PALETTE, palette_share=share, smallest=False, randoms=4) for s in range(500)]
        randoms = Counter(draw.spec for draws in drawn for draw in draws if draw.role == RANDOM)
        others = (1 - share) * 3 / 36  # those that the whole space hits by chance
        assert sum(randoms[spec] for spec in shipped) / 2000 == pytest.approx(share + others, abs=0.03)
        assert all(randoms[spec] / 2000 == pytest.approx(share / 3 + others / 3, abs=0.04) for spec in shipped)
        assert (set(randoms) <= shipped) == (share == 1)
    narrow = {d.spec for s in range(60) for d in stream(s, axes=("ffn",), palette=PALETTE, palette_share=1.0)}
    assert narrow == {SHAPE.full, SubnetSpec(64, 4, 64, (0, 1, 2, 3))}


def test_the_smallest_net_of_the_palette() -> None:
    (smallest,) = {draw.spec for draw in stream(palette=PALETTE) if draw.role == SMALLEST}
    assert smallest == SubnetSpec(48, 4, 64, (0, 3))
    (of_space,) = {draw.spec for draw in stream(palette=PALETTE, palette_share=0.0) if draw.role == SMALLEST}
    assert of_space == space().smallest()


@pytest.mark.parametrize("randoms", [1, 2])
def test_sizes_of_the_palette_are_dealt_in_turn(randoms: int) -> None:
    """Every three draws meet each of the three once, in an order that changes."""
    drawn = [
        [d.spec for d in stream(step, palette=PALETTE, palette_share=1.0, smallest=False, randoms=randoms)][1:]
        for step in range(60)
    ]
    shipped = {space().member(*sizes) for sizes in PALETTE[1:]}
    met = Counter(spec for specs in drawn for spec in specs)
    assert met == dict.fromkeys(shipped, 20 * randoms)
    deals = [tuple(spec for specs in drawn[i : i + 3] for spec in specs) for i in range(0, 60, 3)]
    assert all(Counter(deal) == dict.fromkeys(shipped, randoms) for deal in deals)
    assert len(set(deals)) > 3
