"""The recipe `supernet`: factors of a weight-sharing supernet, stage after stage."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ee_scale.config.schema import SupernetConfig
from ee_scale.elastic.factors import FactorSet
from ee_scale.elastic.order import UnitOrder
from ee_scale.elastic.sampling import ROLES
from ee_scale.elastic.stage import ElasticStage, base_tensors
from ee_scale.elastic.subnet import SearchSpace
from ee_scale.engine.clipping import TOGETHER
from ee_scale.engine.supernet import SupernetEngine
from ee_scale.grid import Grid
from ee_scale.log import log
from ee_scale.training.cost import flops_per_token
from ee_scale.training.loop import Loop
from ee_scale.training.meter import StageMeter, peak_flops
from ee_scale.training.metrics import MetricsStream
from ee_scale.training.parts import Named, SavedPart
from ee_scale.training.plan import uses_bf16
from ee_scale.training.schedules import LearningRate
from ee_scale.training.supernet_plan import SupernetPlan

MEASURES = ("loss", "kl", "features")

# Called with the number of samples that are consumed already.
Batches = Callable[[int], Iterator[dict[str, torch.Tensor]]]


@dataclass
class SupernetRun:
    """One rank's live run. `step` counts finished optimizer steps over all recipe stages, `roles` were drawn last."""

    plan: SupernetPlan
    grid: Grid
    stage: ElasticStage
    order: UnitOrder
    space: SearchSpace
    factors: list[FactorSet] = field(default_factory=list)
    engine: SupernetEngine | None = None
    step: int = 0
    roles: Sequence[str] = ROLES

    @property
    def config(self) -> SupernetConfig:
        return self.plan.config

    @property
    def index(self) -> int:
        """The recipe stage whose factors train."""
        return len(self.factors) - 1

    @property
    def consumed_samples(self) -> int:
        return self.step * self.config.train.global_batch_size

    @property
    def optimizer_steps(self) -> int:
        return self.step - self.plan.recipe.start(self.index)

    def saved_parts(self) -> list[SavedPart]:
        """One pair of files per pipeline stage, with the factors of all recipe stages so far."""
        frozen: Named = [pair for factors in self.factors[:-1] for pair in factors.named.items()]
        training: Named = list(self.factors[-1].named.items())
        number = f"{self.grid.stage:03d}"
        return [SavedPart(f"factors_{number}.safetensors", f"optimizer_{number}.safetensors", training, frozen)]

    def gather(self, name: str, parameter: nn.Parameter, part: torch.Tensor) -> torch.Tensor:
        """The whole, sorted tensor from this rank's part. A collective over the tensor group."""
        return self._set_of(name).gather(name, part)

    def local(self, name: str, parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole tensor."""
        return self._set_of(name).local(name, whole)

    def _set_of(self, name: str) -> FactorSet:
        return self.factors[int(name.split(".", 1)[0])]


def build_stage(plan: SupernetPlan, grid: Grid) -> ElasticStage:
    """This rank's stage with empty tensors. All ranks call it."""
    dtype = torch.bfloat16 if uses_bf16(plan.config.train.precision, grid.device) else torch.float32
    return ElasticStage(plan.map, plan.stages, grid, dtype, plan.config.model.attn_implementation)


def start_run(plan: SupernetPlan, grid: Grid, stage: ElasticStage, order: UnitOrder) -> SupernetRun:
    """Load this rank's slices, sorted. No recipe stage has begun yet: see `open_stages`."""
    stage.load(base_tensors(plan.model_dir, plan.map), order)
    return SupernetRun(plan, grid, stage, order, plan.space(order))


def open_stages(run: SupernetRun, upto: int) -> None:
    """Add the factors of recipe stages up to and including `upto`; only the last one's train."""
    while run.index < upto:
        for factors in run.factors:
            factors.freeze()
        index = run.index + 1
        plan = run.plan.factors(index, run.stage.new)
        run.factors.append(FactorSet(run.stage, plan, index, run.config.train.seed))


def begin_stage(run: SupernetRun) -> None:
    """The engine of the last opened stage. What the frozen teacher consists of is merged into the backbone."""
    teacher, recipe = run.plan.recipe.teacher_stages, run.plan.recipe.stages[run.index]
    for module in run.stage.elastic.values():
        for index in range(min(teacher, run.index)):
            module.merge(index)
    teaches = teacher if recipe.axes else None
    run.engine = SupernetEngine.build(run.stage, run.factors[-1], run.grid, run.config, teaches)


def metrics_stream(run: SupernetRun) -> MetricsStream:
    """Losses by role of the subnet, and how well the devices are used."""
    config, grid = run.config, run.grid
    width, peak = run.plan.map.shape.hidden, config.logging.peak_tflops
    return MetricsStream(
        grid,
        ROLES,
        config.train.global_batch_size * config.data.seq_length,
        MEASURES,
        meter=StageMeter(grid.device),
        norm_keys=[TOGETHER],
        peak_flops=peak_flops(grid.device, peak, width, run.stage.dtype) if grid.rank == 0 else None,
    )


def train(run: SupernetRun, data: Batches, loop: Loop) -> None:
    """Run the remaining steps of all stages. Raises what `loop` does."""
    micro_batches = data(run.consumed_samples)
    if run.engine is not None:  # a resumed run
        loop.watch(run.engine)
    with loop.running():
        while run.step < run.plan.recipe.total_steps:
            if run.engine is None or run.plan.recipe.index_at(run.step) != run.index:
                open_stages(run, run.plan.recipe.index_at(run.step))
                begin_stage(run)
                loop.watch(run.engine)
            loop.stream.flops_per_token = sum(flops_per_token(run.plan, run.config, run.index))
            _train_stage(run, micro_batches, loop)


def _train_stage(run: SupernetRun, micro_batches: Iterator[dict[str, torch.Tensor]], loop: Loop) -> None:
    """The rest of the current recipe stage. Raises RuntimeError if something frozen changed."""
    config, stage, end = run.config, run.plan.recipe.stages[run.index], run.plan.recipe.ends[run.index]
    before = run.stage.frozen_digest() if config.train.verify_frozen else ""
    rate = LearningRate(replace(config.optim, lr=run.plan.learning_rate(run.index)), stage.steps)
    trainable = run.plan.factors(run.index, run.stage.new).parameters
    while run.step < end:
        loop.begin()
        learning_rate = rate.at(run.optimizer_steps)
        run.engine.set_lr(learning_rate)
        draws = run.plan.draws(run.space, run.index, run.step, trainable)
        run.roles = [role for role in ROLES if any(draw.role == role for draw in draws)]
        losses = run.engine.train_step(micro_batches, draws)
        last = run.step + 1 == end
        if last and config.train.verify_frozen:
            _check_frozen(run, before)
        loop.end(learning_rate, dict(zip(ROLES, losses, strict=True)), last=last)


def _check_frozen(run: SupernetRun, before: str) -> None:
    after = run.stage.frozen_digest()
    if after != before:
        raise RuntimeError(f"a frozen tensor of stage {run.grid.stage} changed: {before[:12]} -> {after[:12]}")
    log.info("stage '%s' done; backbone unchanged (digest %s)", run.plan.recipe.stages[run.index].name, after[:12])
