"""Everything about a supernet run that follows from config, model and data, decided before any process starts."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path

from transformers import PreTrainedConfig

from ee_scale.backbone.stages import StagePlan, plan_stages
from ee_scale.config.checks import check_batch, check_supernet
from ee_scale.config.supernet import RecipeStage, SupernetConfig
from ee_scale.elastic.architecture import ElasticMap
from ee_scale.elastic.factors import FactorPlan
from ee_scale.elastic.order import UnitOrder
from ee_scale.elastic.sampling import Draw, draw_stream
from ee_scale.elastic.subnet import AXES, SearchSpace, SubnetSpec, resolve_space
from ee_scale.errors import UserError
from ee_scale.families.registry import elastic_family
from ee_scale.grid import Layout
from ee_scale.training.plan import check_fits


@dataclass(frozen=True)
class Recipe:
    """The stages of a run, as the config gives them, end to end."""

    stages: Sequence[RecipeStage]

    @property
    def ends(self) -> list[int]:
        """Steps of the run when each stage is over."""
        return list(accumulate(stage.steps for stage in self.stages))

    @property
    def total_steps(self) -> int:
        return self.ends[-1]

    def index_at(self, step: int) -> int:
        """The stage that step `step` (0-based) belongs to."""
        return next(i for i, end in enumerate(self.ends) if step < end)

    def start(self, index: int) -> int:
        """Steps of the run before a stage."""
        return self.ends[index] - self.stages[index].steps

    @property
    def teacher_stages(self) -> int:
        """Leading stages without axes: what the frozen teacher consists of."""
        return next((i for i, stage in enumerate(self.stages) if stage.axes), len(self.stages))


@dataclass(frozen=True)
class SupernetPlan:
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
    recipe: Recipe
    stages: StagePlan
    layout: Layout
    parts: int
    num_micro_batches: int

    @property
    def task(self) -> str:
        return self.map.family.task

    def space(self, order: UnitOrder) -> SearchSpace:
        """The search space, once it is known which layers matter least."""
        return resolve_space(self.config.space, self.map.shape, order.drop.tolist(), self.layout.tp)

    def learning_rate(self, index: int) -> float:
        """Peak learning rate of a recipe stage."""
        lr = self.recipe.stages[index].lr
        return self.config.optim.lr if lr is None else lr

    def factors(self, index: int, new: Collection[str] = ()) -> FactorPlan:
        """What a recipe stage trains; `new`: modules that the base folder lacks."""
        return FactorPlan(self.map, self.config.factors, self.recipe.stages[index].rank, new)

    def draws(self, space: SearchSpace, index: int, step: int, trainable: Callable[[SubnetSpec], int]) -> list[Draw]:
        """What trains in step `step` of the run, which lies in recipe stage `index`; see `draw_stream`."""
        sampling, seed = self.config.sampling, self.config.train.seed
        axes = self.recipe.stages[index].axes
        return draw_stream(space, axes, step, self.num_micro_batches, sampling, seed, trainable)


def task_of(config: SupernetConfig, model_config: PreTrainedConfig) -> str:
    """The task of a run: as given, or by architecture. Raises `UserError`, also for an architecture of another task."""
    return elastic_family(model_config, config.task).task


def plan_supernet(
    config: SupernetConfig, model_dir: Path, model_config: PreTrainedConfig, labels: Sequence[str] = ()
) -> SupernetPlan:
    """Check the config against model and data. Raises `UserError`."""
    check_supernet(config)
    task, parallel = task_of(config, model_config), config.parallel
    if labels:
        model_config.num_labels = len(labels)
        model_config.id2label = dict(enumerate(labels))
        model_config.label2id = {label: i for i, label in enumerate(labels)}
        model_config.problem_type = "single_label_classification"
    elastic_map = ElasticMap(model_config, task)
    shape = elastic_map.shape
    check_fits(config, model_config.max_position_embeddings, shape.num_layers)
    heads = "num_key_value_heads" if hasattr(model_config, "num_key_value_heads") else "num_attention_heads"
    for name, size in ((heads, shape.groups), ("intermediate_size", shape.ffn)):
        if size % parallel.tp:
            raise UserError(f"parallel.tp={parallel.tp} does not divide {name}={size} of the model")
    parts = parallel.pp if config.space.depth_parts is None else config.space.depth_parts
    if not 1 <= parts <= shape.num_layers:
        raise UserError(f"space.depth_parts={parts}: give 1 to {shape.num_layers}, the model's layers")
    plan = SupernetPlan(
        config=config,
        model_dir=model_dir,
        map=elastic_map,
        labels=tuple(labels),
        recipe=Recipe(config.stages),
        stages=plan_stages(shape.num_layers, parallel.pp, [shape.num_layers], given=parallel.stages, whole_model=True),
        layout=Layout(parallel.tp, parallel.pp, parallel.dp),
        parts=parts,
        num_micro_batches=check_batch(config.train.global_batch_size, config.train.micro_batch_size, parallel.dp),
    )
    space = plan.space(UnitOrder.identity(shape))
    _check_axes(plan, space)
    return plan


def _check_axes(plan: SupernetPlan, space: SearchSpace) -> None:
    for stage in plan.recipe.stages:
        if unknown := [axis for axis in stage.axes if axis not in AXES]:
            raise UserError(f"stages: '{stage.name}' has axes={unknown}; known: {', '.join(AXES)}")
        if stage.axes and all(spec == plan.map.shape.full for spec in islice(space.members(stage.axes), 2)):
            raise UserError(
                f"stages: nothing can shrink in '{stage.name}': space.* has the full size alone for {stage.axes}"
            )


def recipe_rows(plan: SupernetPlan) -> list[tuple[str, ...]]:
    """The recipe table: stage, what may shrink, steps, rank, trained parameters of the full and the smallest net."""
    space, full = plan.space(UnitOrder.identity(plan.map.shape)), plan.map.shape.full
    rows = []
    for index, stage in enumerate(plan.recipe.stages):
        factors = plan.factors(index)
        smallest = space.smallest(stage.axes)
        rows.append(
            (
                stage.name,
                ", ".join(stage.axes) or "nothing",
                str(stage.steps),
                str(stage.rank) if stage.rank else "whole",
                f"{factors.parameters(full):,}",
                f"{plan.map.parameters(smallest):,} of {plan.map.parameters(full):,}",
            )
        )
    return rows
