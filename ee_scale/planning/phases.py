"""What a supernet run is made of: its phases, one after another, and what each of them trains."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from transformers import PreTrainedConfig

from ee_scale.backbone.stages import StagePlan
from ee_scale.config.supernet import PhaseConfig, SupernetConfig
from ee_scale.elastic.architecture import ElasticMap
from ee_scale.elastic.distill import FROZEN
from ee_scale.elastic.factors import FactorPlan
from ee_scale.elastic.order import DIVERGENCE, INFLUENCE, UnitOrder
from ee_scale.elastic.sampling import Draw, draw_stream
from ee_scale.elastic.subnet import SearchSpace, SubnetSpec, resolve_space
from ee_scale.grid import Layout
from ee_scale.planning.estimates import Plan


class Phases(tuple[PhaseConfig, ...]):
    """`stages` of the config (phases here, beside the stages of a pipeline), end to end."""

    @property
    def ends(self) -> list[int]:
        """Steps of the run when each phase is over."""
        return list(accumulate(phase.steps for phase in self))

    @property
    def total_steps(self) -> int:
        return self.ends[-1]

    def index_at(self, step: int) -> int:
        """The phase that step `step` (0-based) belongs to."""
        return next(i for i, end in enumerate(self.ends) if step < end)

    def start(self, index: int) -> int:
        """Steps of the run before a phase."""
        return self.ends[index] - self[index].steps

    @property
    def of_teacher(self) -> int:
        """Leading phases without axes: what the frozen teacher consists of."""
        return next((i for i, phase in enumerate(self) if phase.axes), len(self))


@dataclass(frozen=True)
class SupernetSetup(Plan[SupernetConfig]):
    """What runs where.

    Attributes:
        labels: classes of a classifier, in the order of its outputs; empty for a causal LM.
        parts: equal runs of layers that lose layers in turn.
        num_micro_batches: per optimizer step and rank.
    """

    config: SupernetConfig
    model_dir: Path
    map: ElasticMap
    labels: tuple[str, ...]
    phases: Phases
    stages: StagePlan
    layout: Layout
    parts: int
    num_micro_batches: int

    @property
    def model_config(self) -> PreTrainedConfig:
        return self.map.config

    @property
    def task(self) -> str:
        return self.map.family.task

    @property
    def keeps_teacher(self) -> bool:
        """Whether what the frozen teacher says of a text is computed once. Labelled texts come again and again."""
        distill = self.config.distill
        if distill.cache is None:
            return self.task == "classify" and distill.teacher == FROZEN
        return distill.cache

    @property
    def layers_by(self) -> str:
        """What orders the layers. A classifier's logits mean nothing before training: its layers go by influence."""
        return self.config.importance.layers or (INFLUENCE if self.task == "classify" else DIVERGENCE)

    def space(self, order: UnitOrder) -> SearchSpace:
        """The search space, once it is known which layers matter least."""
        return resolve_space(self.config.space, self.map.shape, order.drop.tolist(), self.layout.tp)

    def learning_rate(self, index: int) -> float:
        """Peak learning rate of a phase."""
        lr = self.phases[index].lr
        return self.config.optim.lr if lr is None else lr

    def factors(self, index: int, new: Collection[str] = ()) -> FactorPlan:
        """What a phase trains; `new`: modules that the base folder lacks."""
        return FactorPlan(self.map, self.config.factors, self.phases[index].rank, new)

    def draws(self, space: SearchSpace, index: int, step: int, trainable: Callable[[SubnetSpec], int]) -> list[Draw]:
        """What trains in step `step` of the run, which lies in phase `index`; see `draw_stream`."""
        sampling, seed = self.config.sampling, self.config.train.seed
        axes = self.phases[index].axes
        return draw_stream(space, axes, step, self.num_micro_batches, sampling, seed, trainable)
