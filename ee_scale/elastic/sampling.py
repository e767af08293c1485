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

    The full net always (the sandwich rule of US-Nets, as in MLFS) and first (it may be the teacher), then deep to
    shallow: in a 1F1B pipeline the shallow ones then drain it. Gradient scaling: MLFS (arXiv 2404.01353) section 3,
    n counts trainable parameters; gamma may be negative.
    """
    full = space.shape.full
    members = [(FULL, full)]
    if axes:
        random = Random(f"{seed}:{step}")
        members += [(SMALLEST, space.smallest(axes))] * sampling.smallest
        members += [(RANDOM, space.draw(random, axes)) for _ in range(sampling.randoms)]
    members.sort(key=lambda member: (member[0] != FULL, -member[1].depth))
    drawn = [(micro_batch, role, spec) for role, spec in members for micro_batch in range(num_micro_batches)]
    most = trainable(full)
    return [
        Draw(micro_batch, role, spec, (most / trainable(spec)) ** sampling.gamma / len(drawn))
        for micro_batch, role, spec in drawn
    ]
