"""What a run of any kind offers to be saved and resumed."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from ee_scale.grid import Grid

Named = list[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class SavedPart:
    """Tensors of this pipeline stage that share a file.

    Attributes:
        training: parameters with moments, which go to `moments_file`.
        frozen: parameters that were trained before.
        copies: training ones that another stage saves.
        group: the clip group of `training`; its count of updates goes to `moments_file` too.
    """

    file: str
    moments_file: str
    training: Named
    frozen: Named = field(default_factory=list)
    copies: Named = field(default_factory=list)
    group: int = 0


class Run(Protocol):
    """One rank's live run. `step` counts finished optimizer steps, `optimizer_steps` those of the live optimizer."""

    step: int
    grid: Grid
    engine: Any

    @property
    def consumed_samples(self) -> int: ...

    @property
    def optimizer_steps(self) -> int: ...

    def saved_parts(self) -> list[SavedPart]:
        """What this stage saves, in an order that its ranks share."""

    def gather(self, name: str, parameter: nn.Parameter, part: torch.Tensor) -> torch.Tensor:
        """The whole tensor from this rank's part. A collective over the tensor group."""

    def local(self, name: str, parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole tensor."""
