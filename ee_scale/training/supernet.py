"""The recipe `supernet`: factors of a weight-sharing supernet, phase after phase."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.config.supernet import SupernetConfig
from ee_scale.data.builtin import training_model
from ee_scale.elastic.divergence import divergence_order
from ee_scale.elastic.factors import FactorSet
from ee_scale.elastic.importance import measure_order
from ee_scale.elastic.order import DIVERGENCE, UnitOrder
from ee_scale.elastic.sampling import ROLES
from ee_scale.elastic.stage import ElasticStage, base_tensors
from ee_scale.elastic.subnet import SearchSpace
from ee_scale.elastic.teacher import TeacherCache
from ee_scale.engine.clipping import TOGETHER
from ee_scale.engine.supernet import SupernetEngine
from ee_scale.errors import UserError
from ee_scale.files import sync
from ee_scale.grid import Grid
from ee_scale.log import log
from ee_scale.planning.estimates import uses_bf16
from ee_scale.planning.phase_costs import kept_teacher
from ee_scale.planning.supernet import SupernetPlan, phase_rows, plan_supernet, task_of
from ee_scale.training.metrics import MetricsStream, StepMetrics
from ee_scale.training.recipe import Named, Recipe, Run, SavedPart, Step, Words, check_frozen
from ee_scale.training.schedules import LearningRate
from ee_scale.training.supernet_data import Data, prepare_data, read_labels

MEASURES = ("loss", "kl", "features")
ORDER = "order.safetensors"


class Supernet(Recipe[SupernetConfig, SupernetPlan]):
    """Train a supernet."""

    verb, next_verb, keyed_by = "supernet", "palette", "subnet"
    identity = (
        *("task", "space", "stages", "factors", "sampling", "distill", "importance"),
        *("data", "optim", "train.global_batch_size", "train.seed"),
    )

    @classmethod
    def of(cls, config: SupernetConfig) -> Self:
        folder = training_model(config.model.path)
        model_config, labels = ModelFolder(folder).config, []
        if task_of(config, model_config) == "classify":
            labels = read_labels(config)
        plan = plan_supernet(config, folder, model_config, labels)
        base_tensors(folder, plan.map)  # weights that do not fit are said now, not by a rank
        return cls(plan)

    @property
    def last_phase_steps(self) -> int:
        return self.plan.phases[-1].steps

    def prepare(self, *, progress: bool) -> dict[str, Any]:
        return prepare_data(self.plan, progress=progress)

    def facts(self) -> dict[str, Any]:
        return {"task": self.plan.task, "labels": list(self.plan.labels), "parts": self.plan.parts}

    def check_folder(self, out: Path, *, resumes: bool) -> None:
        """The checkpoint was trained in one order of units."""
        path = out / ORDER
        if path.is_file():
            UnitOrder.load(path, self.plan.map.shape)
        elif resumes:
            raise UserError(f"{path}: missing; the checkpoints beside it mean nothing without the order of their units")

    def build(self, grid: Grid, out: Path, scratch: Path | None = None) -> "SupernetRun":
        data, stage, path = Data(self.plan, grid), build_stage(self.plan, grid), out / ORDER
        if scratch is not None and not grid.from_rank_0(path.is_file()):
            path = scratch / ORDER
        run = start_run(self.plan, grid, stage, unit_order(self.plan, stage, data, path), data)
        if scratch is not None and grid.rank == 0:
            (scratch / ORDER).unlink(missing_ok=True)
        return run

    def words(self) -> Words:
        columns = ("stage", "may shrink", "steps", "rank", "trained parameters", "smallest subnet")
        title = f"{self.plan.map.config.model_type}, {self.plan.map.shape.num_layers} layers, {self.plan.task}"
        return Words(title, columns, phase_rows(self.plan), left=columns[:2])


@dataclass
class SupernetRun(Run[SupernetConfig, SupernetPlan]):
    """One rank's live run over all phases; without data its engine can be stepped by hand.

    cache: what the teacher said, for all phases.
    roles: rank 0: step -> those of the subnets that were drawn, until they are told.
    frozen: digest of what must not change, from before the phase.
    """

    plan: SupernetPlan
    grid: Grid
    stage: ElasticStage
    order: UnitOrder
    space: SearchSpace
    data: Data | None = None
    factors: list[FactorSet] = field(default_factory=list)
    engine: SupernetEngine | None = None
    step: int = 0
    roles: dict[int, list[str]] = field(default_factory=dict)
    frozen: str = ""
    cache: TeacherCache | None = None

    @property
    def index(self) -> int:
        """The phase whose factors train."""
        return len(self.factors) - 1

    @property
    def optimizer_steps(self) -> int:
        return self.step - self.plan.phases.start(self.index)

    @property
    def flops_per_token(self) -> float:
        return self.plan.phase_flops(self.index)

    @cached_property
    def _micro_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        assert self.data is not None  # stepped by hand without any
        return self.data.micro_batches(self.consumed_samples)

    def ready(self) -> SupernetEngine:
        due = self.plan.phases.index_at(self.step)
        if self.engine is None or due != self.index:
            self.close_engine()
            open_phases(self, due)
            self.start_engine()
        if self.config.train.verify_frozen and not self.frozen:
            self.frozen = self.stage.frozen_digest()
        return self._live_engine

    @property
    def _live_engine(self) -> SupernetEngine:
        assert self.engine is not None  # `ready` comes before
        return self.engine

    def train_step(self) -> Step:
        learning_rate = self.rate.at(self.optimizer_steps)
        self._live_engine.set_lr(learning_rate)
        draws = self.plan.draws(self.space, self.index, self.step, self.trainable)
        if self.grid.rank == 0:
            self.roles[self.step + 1] = [role for role in ROLES if any(draw.role == role for draw in draws)]
        losses = self._live_engine.train_step(self._micro_batches, draws)
        last = self.step + 1 == self.plan.phases.ends[self.index]
        if last and self.frozen:
            digest = check_frozen(self.frozen, self.stage.frozen_digest(), self.grid.stage)
            name = self.plan.phases[self.index].name
            log.info("stage '%s' done; backbone unchanged (digest %s)", name, digest)
        return Step(learning_rate, dict(zip(ROLES, losses, strict=True)), last)

    def close_engine(self) -> None:
        """Master copies, moments and gradients of a finished phase are nothing that the next one needs."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None

    def start_engine(self) -> None:
        """Of the last opened phase. What the frozen teacher consists of is merged into the backbone."""
        teacher, phase = self.plan.phases.of_teacher, self.plan.phases[self.index]
        for module in self.stage.elastic.values():
            for index in range(min(teacher, self.index)):
                module.merge(index)
        teaches = teacher if phase.axes else None
        if phase.axes and self.plan.keeps_teacher and self.cache is None:
            kept = kept_teacher(self.plan, self.stage.dtype.itemsize)
            log.info("the teacher is kept: %s", kept.words)
            self.cache = TeacherCache(kept.most_tokens)
        self.engine = SupernetEngine.build(self.stage, self.factors[-1], self.grid, self.config, teaches, self.cache)
        self.rate = LearningRate(replace(self.config.optim, lr=self.plan.learning_rate(self.index)), phase.steps)
        self.trainable, self.frozen = self.plan.factors(self.index, self.stage.new).parameters, ""

    def reopen(self, state: Mapping[str, Any]) -> None:
        open_phases(self, state["recipe_stage"])

    def start_last_phase(self) -> None:
        """It draws along every axis, with the teacher that it learns from."""
        index = len(self.plan.phases) - 1
        open_phases(self, index)
        self.step = self.plan.phases.start(index)
        self.start_engine()

    def metrics_stream(self) -> MetricsStream:
        """Losses by role of the subnet."""
        width = self.plan.map.shape.hidden
        return self._stream(ROLES, MEASURES, norm_keys=[TOGETHER], width=width, dtype=self.stage.dtype)

    def shown(self, metrics: StepMetrics) -> StepMetrics:
        return metrics.only(self.roles.pop(metrics.step))

    def facts(self) -> dict[str, Any]:
        return {"recipe_stage": self.index, "new": sorted(self.stage.new)}

    def saved_parts(self) -> list[SavedPart]:
        """One pair of files per pipeline stage, with the factors of all phases so far."""
        frozen: Named = [pair for factors in self.factors[:-1] for pair in factors.named.items()]
        training: Named = list(self.factors[-1].named.items())
        number = f"{self.grid.stage:03d}"
        return [SavedPart(f"factors_{number}.safetensors", f"optimizer_{number}.safetensors", training, frozen)]

    def gather(self, name: str, parameter: nn.Parameter, part: torch.Tensor) -> torch.Tensor:
        """The whole, sorted tensor from this rank's part. A collective over the tensor group."""
        return self._set_of(name).gather(name, part)

    def local(self, name: str, parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
        return self._set_of(name).local(name, whole)

    def _set_of(self, name: str) -> FactorSet:
        return self.factors[int(name.split(".", 1)[0])]


def build_stage(plan: SupernetPlan, grid: Grid) -> ElasticStage:
    """This rank's stage with empty tensors. All ranks call it."""
    dtype = torch.bfloat16 if uses_bf16(plan.config.train.precision, grid.device) else torch.float32
    return ElasticStage(plan.map, plan.stages, grid, dtype, plan.config.model.attn_implementation)


def unit_order(plan: SupernetPlan, stage: ElasticStage, data: Data, path: Path) -> UnitOrder:
    """The stored order of the run, or one that is measured now and stored by rank 0. All ranks call it."""
    if stage.grid.from_rank_0(path.is_file()):
        return UnitOrder.load(path, plan.map.shape)
    stage.load(base_tensors(plan.model_dir, plan.map), UnitOrder.identity(plan.map.shape))
    log.info("measuring the importance of heads, MLP units, widths and layers")
    importance = plan.config.importance
    order = measure_order(stage, data.sample(importance.samples), plan.parts)
    if plan.layers_by == DIVERGENCE:
        few = min(importance.layer_samples, importance.samples)
        drops = plan.map.shape.num_layers - plan.space(order).depth[-1]
        order = replace(order, drop=torch.tensor(divergence_order(stage, list(data.sample(few)), plan.parts, drops)))
    if stage.grid.rank == 0:
        temporary = path.with_name(f".{path.name}.tmp")
        order.save(temporary)
        sync(temporary)
        temporary.replace(path)
    return stage.grid.from_rank_0(order)


def start_run(
    plan: SupernetPlan, grid: Grid, stage: ElasticStage, order: UnitOrder, data: Data | None = None
) -> SupernetRun:
    """Load this rank's slices, sorted. No phase has begun yet: see `open_phases`."""
    stage.load(base_tensors(plan.model_dir, plan.map), order)
    return SupernetRun(plan, grid, stage, order, plan.space(order), data)


def open_phases(run: SupernetRun, upto: int) -> None:
    """Add the factors of phases up to and including `upto`; only the last one's train."""
    while run.index < upto:
        for factors in run.factors:
            factors.freeze()
        index = run.index + 1
        plan = run.plan.factors(index, run.stage.new)
        run.factors.append(FactorSet(run.stage, plan, index, run.config.train.seed))
