"""A way of training: what is decided before any process starts, and what each rank then does.

`launching.job` drives every recipe through its run: prepare once, build on each rank, step, save, go on. `ee-scale
check` and `ee-scale trace` ask the same objects. A recipe is added in `config.schema.RECIPES`.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import nn

from ee_scale.config.schema import RECIPES, TrainingConfig
from ee_scale.engine.observed import ObservedEngine
from ee_scale.grid import Grid
from ee_scale.planning.estimates import Plan
from ee_scale.training.meter import StageMeter, peak_flops
from ee_scale.training.metrics import Key, MetricsStream, StepMetrics

BEST = "best"  # in the state of a run with held-out text: the step with the lowest loss on it, and that loss
Named = list[tuple[str, nn.Parameter]]
ConfigType = TypeVar("ConfigType", bound=TrainingConfig)
PlanType = TypeVar("PlanType", bound=Plan[Any])


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


@dataclass(frozen=True)
class Step:
    """One optimizer step; `last`: of a phase, whose checkpoint is written in any case."""

    learning_rate: float
    losses: Mapping[Key, torch.Tensor]
    last: bool


class Run(ABC, Generic[ConfigType, PlanType]):
    """One rank's live run.

    Attributes:
        step: finished optimizer steps.
        engine: of the phase that trains now; None before the first `ready` or `start_engine` of some recipes.
        flops_per_token: forward and backward, of a whole replica, in the phase that trains now.
    """

    plan: PlanType
    grid: Grid
    engine: Any
    step: int

    @property
    def config(self) -> ConfigType:
        return self.plan.config

    @property
    @abstractmethod
    def flops_per_token(self) -> float: ...

    @property
    def consumed_samples(self) -> int:
        return self.step * self.config.train.global_batch_size

    @property
    def optimizer_steps(self) -> int:
        """Finished steps of the live optimizer."""
        return self.step

    @abstractmethod
    def ready(self) -> ObservedEngine:
        """Make whatever the next step needs, and return the engine that takes it. All ranks call it."""

    @abstractmethod
    def train_step(self) -> Step:
        """One optimizer step (`step` is counted by the caller). Raises RuntimeError if something frozen changed."""

    @abstractmethod
    def metrics_stream(self) -> MetricsStream:
        """Where losses are collected, and how well the devices are used."""

    def _stream(
        self, keys: Sequence[Key], measures: Sequence[str], *, norm_keys: Sequence[Key], width: int, dtype: torch.dtype
    ) -> MetricsStream:
        """A stream of `measures` for each of `keys`. width, dtype: of the matrices that the device's peak is for."""
        config, grid = self.config, self.grid
        peak = config.logging.peak_tflops
        return MetricsStream(
            grid,
            keys,
            config.train.global_batch_size * config.data.seq_length,
            measures,
            meter=StageMeter(grid.device),
            norm_keys=norm_keys,
            peak_flops=peak_flops(grid.device, peak, width, dtype) if grid.rank == 0 else None,
        )

    def shown(self, metrics: StepMetrics) -> StepMetrics:
        """What a person is told of a step."""
        return metrics

    def facts(self) -> dict[str, Any]:
        """What goes into a checkpoint's state.json."""
        return {}

    def measure(self) -> None:
        """What is measured after a step, before its checkpoint is written. All ranks call it."""

    @property
    def ended(self) -> bool:
        """Whether the run is over before its steps are through; the same on all ranks."""
        return False

    def reopen(self, state: Mapping[str, Any]) -> None:
        """Make the parameters that a checkpoint with this state.json has, before they are read."""

    def start_engine(self) -> None:
        """The engine of a run that goes on: its frozen parameters are read, those that train are not yet."""

    def start_last_phase(self) -> None:
        """Go to the start of the last phase, untrained: what `ee-scale trace` looks at."""

    @abstractmethod
    def saved_parts(self) -> list[SavedPart]:
        """What this stage saves, in an order that its ranks share."""

    @abstractmethod
    def gather(self, name: str, parameter: nn.Parameter, part: torch.Tensor) -> torch.Tensor:
        """The whole tensor from this rank's part. A collective over the tensor group."""

    @abstractmethod
    def local(self, name: str, parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole tensor."""


def check_frozen(before: str, after: str, stage: int) -> str:
    """Compare two digests of what is frozen in a stage; the start of it. Raises RuntimeError if they differ."""
    if after != before:
        raise RuntimeError(f"a frozen tensor of stage {stage} changed: {before[:12]} -> {after[:12]}")
    return after[:12]


@dataclass(frozen=True)
class Words:
    """A table for people; `left`: its columns of text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[str] = ()


class Recipe(ABC, Generic[ConfigType, PlanType]):
    """A command that trains, with its config checked against its model and its data.

    Attributes:
        verb: the command; next_verb: what a person runs on the result.
        keyed_by: what losses belong to, in a word.
        identity: keys of the config that make a run that run; everything else may change when it goes on.
    """

    verb: ClassVar[str]
    next_verb: ClassVar[str]
    keyed_by: ClassVar[str]
    identity: ClassVar[tuple[str, ...]]

    def __init__(self, plan: PlanType):
        self.plan = plan

    @property
    def config(self) -> ConfigType:
        return self.plan.config

    @classmethod
    @abstractmethod
    def of(cls, config: ConfigType) -> Self:
        """Find and read the model, and check the config against it. Raises `UserError`."""

    @property
    def last_phase_steps(self) -> int:
        return self.plan.total_steps

    @abstractmethod
    def prepare(self, *, progress: bool) -> dict[str, Any]:
        """Tokenise what is not cached, check it against the model, and say which data it is. Raises `UserError`."""

    def facts(self) -> dict[str, Any]:
        """What run.json says besides settings, model and data."""
        return {}

    def check_folder(self, out: Path, *, resumes: bool) -> None:
        """Refuse (`UserError`) an output folder that lacks what its checkpoints need."""

    @abstractmethod
    def build(self, grid: Grid, out: Path, scratch: Path | None = None) -> Run[ConfigType, PlanType]:
        """This rank's run, untrained. All ranks call it.

        out: the run's folder; scratch: where to put what belongs there, for a run that must not leave anything.
        """

    @abstractmethod
    def words(self) -> Words:
        """The plan, for a person."""


def recipe_of(verb: str) -> type[Recipe[Any, Any]]:
    """The recipe that a command runs."""
    module, _, name = RECIPES[verb].rpartition(".")
    return getattr(importlib.import_module(module), name)
