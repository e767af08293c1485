"""Which subnets train in a step: the same on every rank, whatever the grid."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from ee_scale.config.supernet import SamplingConfig
from ee_scale.elastic.subnet import SearchSpace, SubnetSpec

FULL, SMALLEST, RANDOM = "full", "smallest", "random"
ROLES = (FULL, SMALLEST, RANDOM)


@dataclass(frozen=True)
class Draw:
    """One forward and backward: a micro-batch through a subnet.

    weight: of its loss in the step's sum, (n_full / n_sub)^gamma / number of draws.
    """

    micro_batch: int
    role: str
    spec: SubnetSpec
    weight: float


def draw_stream(
    space: SearchSpace,
    axes: Sequence[str],
    step: int,
    num_micro_batches: int,
    sampling: SamplingConfig,
    seed: int,
    trainable: Callable[[SubnetSpec], int],
) -> list[Draw]:
    """All draws of one optimizer step, from (seed, step) alone: every micro-batch goes through the same subnets.

    So the same samples meet the same subnets at every grid, however many micro-batches a replica has.

    The full net (the sandwich rule of US-Nets, as in MLFS; in every `full_every`-th step, or never) comes first (it may
    be the teacher), then deep to shallow: in a 1F1B pipeline the shallow ones then drain it. Gradient scaling: MLFS
    (arXiv 2404.01353) section 3, n counts trainable parameters; gamma may be negative.
    """
    full = space.shape.full
    every = sampling.full_every if axes else 1
    members = [(FULL, full)] if every and step % every == 0 else []
    if axes:
        random = Random(f"{seed}:{step}")
        members += [(SMALLEST, smallest_member(space, axes, sampling))] * sampling.smallest
        turns = range(step * sampling.randoms, (step + 1) * sampling.randoms)
        members += [(RANDOM, random_member(space, axes, sampling, random, seed, turn)) for turn in turns]
    members.sort(key=lambda member: (member[0] != FULL, -member[1].depth))
    drawn = [(micro_batch, role, spec) for role, spec in members for micro_batch in range(num_micro_batches)]
    most = trainable(full)
    return [
        Draw(micro_batch, role, spec, (most / trainable(spec)) ** sampling.gamma / len(drawn))
        for micro_batch, role, spec in drawn
    ]


def smallest_member(space: SearchSpace, axes: Sequence[str], sampling: SamplingConfig) -> SubnetSpec:
    """The subnet that trains beside the full one in every step."""
    if not (space.palette and sampling.palette_share):
        return space.smallest(axes)
    return min(shipped_members(space, axes), key=lambda spec: (space.shape.layer_weights(spec), spec))


def random_member(
    space: SearchSpace, axes: Sequence[str], sampling: SamplingConfig, random: Random, seed: int, turn: int
) -> SubnetSpec:
    """Any subnet, or mostly one that will be shipped: those are dealt like cards, so that none is met more often.

    turn: number of this draw in the run.
    """
    if space.palette and random.random() < sampling.palette_share:
        shipped = shipped_members(space, axes)
        deal, place = divmod(turn, len(shipped))
        return Random(f"{seed}:deal {deal}").sample(shipped, len(shipped))[place]
    return space.draw(random, axes)


def shipped_members(space: SearchSpace, axes: Sequence[str]) -> list[SubnetSpec]:
    """The sizes that will be shipped, beside the full net."""
    return [spec for spec in space.palette_members(axes) if spec != space.shape.full]
