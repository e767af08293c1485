"""Which subnets train in a step: the same on every rank, whatever the grid."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

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


@dataclass(frozen=True)
class SamplingSettings:
    """Subnets beside the full net (the sandwich rule of US-Nets; MLFS: the full net always, first).

    Attributes:
        groups: runs of micro-batches of a step that each draw their own subnets. It divides the micro-batches of every
            grid, so that the same samples meet the same subnets whatever the grid.
    """

    smallest: bool = True
    randoms: int = 2
    groups: int = 1
    gamma: float = 0.5
    seed: int = 1234


def draw_stream(
    space: SearchSpace,
    axes: Sequence[str],
    step: int,
    num_micro_batches: int,
    settings: SamplingSettings,
    trainable: Callable[[SubnetSpec], int],
) -> list[Draw]:
    """All draws of one optimizer step, from (seed, step, group of micro-batches) alone.

    The full net's come first (it may be the teacher), then deep to shallow: in a 1F1B pipeline the shallow ones then
    drain it. Gradient scaling: MLFS (arXiv 2404.01353) section 3, n counts trainable parameters; gamma may be negative.
    """
    full = space.shape.full
    drawn: list[tuple[int, str, SubnetSpec]] = []
    for micro_batch in range(num_micro_batches):
        drawn.append((micro_batch, FULL, full))
        if not axes:
            continue
        random = Random(f"{settings.seed}:{step}:{micro_batch * settings.groups // num_micro_batches}")
        if settings.smallest:
            drawn.append((micro_batch, SMALLEST, space.smallest(axes)))
        drawn += [(micro_batch, RANDOM, space.draw(random, axes)) for _ in range(settings.randoms)]
    drawn.sort(key=lambda item: (item[1] != FULL, -item[2].depth))
    most = trainable(full)
    return [
        Draw(micro_batch, role, spec, (most / trainable(spec)) ** settings.gamma / len(drawn))
        for micro_batch, role, spec in drawn
    ]
