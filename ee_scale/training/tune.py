"""The recipe `tune`: exits on a frozen backbone."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import Dataset

from ee_scale.backbone.shard import model_tensors
from ee_scale.config.schema import TuneConfig
from ee_scale.data.loader import batches
from ee_scale.engine.clipping import ALL, TOGETHER
from ee_scale.engine.frozen import FrozenPipelineEngine
from ee_scale.engine.joint import FINAL, JointPipelineEngine
from ee_scale.exits.joint import FULL, JointStage, output_copies
from ee_scale.exits.stage import TuningStage, build_stage, gather_whole, load_stage, local_slice
from ee_scale.grid import Grid
from ee_scale.log import log
from ee_scale.training.cost import flops_per_token
from ee_scale.training.loop import Loop
from ee_scale.training.meter import StageMeter, peak_flops
from ee_scale.training.metrics import MetricsStream
from ee_scale.training.parts import SavedPart
from ee_scale.training.plan import TunePlan, uses_bf16
from ee_scale.training.schedules import LearningRate, loss_weights_at


@dataclass
class TuneRun:
    """One rank's live run. `step` counts finished optimizer steps."""

    config: TuneConfig
    plan: TunePlan
    grid: Grid
    stage: TuningStage
    engine: FrozenPipelineEngine | JointPipelineEngine
    step: int = 0

    @property
    def consumed_samples(self) -> int:
        return self.step * self.config.train.global_batch_size

    @property
    def optimizer_steps(self) -> int:
        return self.step

    def saved_parts(self) -> list[SavedPart]:
        """A pair of files per exit, and one for what trains of the stage's backbone."""
        parts, together = [], self.plan.backbone.trains
        for k in self.stage.exit_layers:
            named = self.stage.exit_heads[str(k)].named_parameters()
            training = [(f"exit_heads.{k}.{name}", parameter) for name, parameter in named]
            parts.append(SavedPart(exits_name(k), optimizer_name(k), training, group=ALL if together else k))
        if together:
            trained = self.stage.trained
            copies = {} if self.stage.is_original else {self.stage.copied: trained[self.stage.copied]}
            own = [(name, parameter) for name, parameter in trained.items() if name not in copies]
            file, moments = f"backbone_{self.grid.stage:03d}.safetensors", f"backbone_moments_{self.grid.stage:03d}"
            parts.append(SavedPart(file, f"{moments}.safetensors", own, copies=list(copies.items()), group=ALL))
        return parts

    def gather(self, name: str, parameter: nn.Parameter, part: torch.Tensor) -> torch.Tensor:
        """The whole tensor from this rank's part. A collective over the tensor group."""
        return gather_whole(name, parameter, part, self.plan.shape.vocab_size, self.grid)

    def local(self, name: str, parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole tensor."""
        return local_slice(whole, parameter, self.grid.tp_rank)


def exits_name(k: int) -> str:
    """File with the parameters of the exit at layer k."""
    return f"exits_{k:03d}.safetensors"


def optimizer_name(k: int) -> str:
    """File with the AdamW moments of the exit at layer k."""
    return f"optimizer_{k:03d}.safetensors"


def start_run(config: TuneConfig, plan: TunePlan, grid: Grid) -> TuneRun:
    """Build and load this rank's stage and wrap it in the engine. All ranks call it."""
    bf16 = uses_bf16(config.train.precision, grid.device)
    stage = build_stage(
        plan.model_config,
        plan.stages,
        plan.spec,
        grid,
        torch.bfloat16 if bf16 else torch.float32,
        attn_implementation=config.model.attn_implementation,
        teacher=config.exits.kl_weight > 0,
        decoding=plan.backbone.trains,
        cls=JointStage if plan.backbone.trains else TuningStage,
    )
    tensors = model_tensors(plan.model_dir, plan.model_config)
    load_stage(stage, tensors, grid, init=config.exits.init, seed=config.train.seed)
    if not plan.backbone.trains:
        return TuneRun(config, plan, grid, stage, FrozenPipelineEngine.build(stage, grid, config))
    copies = output_copies(plan.stages, plan.spec, plan.shape.tied_embeddings)
    stage.train_backbone(plan.backbone, copies, grid, config.train.seed)
    return TuneRun(config, plan, grid, stage, JointPipelineEngine.build(stage, grid, config))


def metrics_stream(run: TuneRun) -> MetricsStream:
    """Losses by exit (and of the model itself, if it trains), and how well the devices are used."""
    config, plan, grid = run.config, run.plan, run.grid
    layers, dtype = list(plan.spec.layers), next(run.stage.backbone.parameters()).dtype
    tokens = config.train.global_batch_size * config.data.seq_length
    peak = config.logging.peak_tflops
    return MetricsStream(
        grid,
        [*layers, FINAL] if plan.backbone.trains else layers,
        tokens,
        ("loss", "kl") if config.exits.kl_weight > 0 else ("loss",),
        meter=StageMeter(grid.device),
        norm_keys=[TOGETHER] if plan.backbone.trains else layers,
        flops_per_token=sum(flops_per_token(plan, config)),
        peak_flops=peak_flops(grid.device, peak, plan.shape.hidden_size, dtype) if grid.rank == 0 else None,
    )


def train(run: TuneRun, dataset: Dataset, loop: Loop) -> None:
    """Run the remaining steps. Raises RuntimeError if the frozen part of the backbone changed, and what `loop` does."""
    config, engine = run.config, run.engine
    verifies = config.train.verify_frozen and run.plan.backbone.mode != FULL
    before = run.stage.frozen_digest() if verifies else ""
    rate = LearningRate(config.optim, config.train.steps)
    micro_batches = micro_batches_of(run, dataset)
    loop.watch(engine)
    with loop.running():
        while run.step < config.train.steps:
            loop.begin()
            learning_rate = rate.at(run.step)
            engine.set_lr(learning_rate)
            engine.loss_weights = loss_weights_at(run.step, run.plan.loss_weights, config.exits)
            losses = engine.train_step(micro_batches)
            last = run.step + 1 == config.train.steps
            if last and verifies:
                _check_frozen(run, before)
            loop.end(learning_rate, losses, last=last)


def micro_batches_of(run: TuneRun, dataset: Dataset) -> Iterator[dict[str, torch.Tensor]]:
    """This replica's, from where the run stands."""
    return batches(
        dataset,
        micro_batch_size=run.config.train.micro_batch_size,
        num_micro_batches=run.plan.num_micro_batches,
        dp_rank=run.grid.dp_rank,
        dp_size=run.grid.layout.dp,
        consumed_samples=run.consumed_samples,
        num_workers=run.config.data.num_workers,
    )


def _check_frozen(run: TuneRun, before: str) -> None:
    after = run.stage.frozen_digest()
    if after != before:
        raise RuntimeError(f"the frozen backbone of stage {run.grid.stage} changed: {before[:12]} -> {after[:12]}")
    log.info("backbone unchanged (digest %s)", after[:12])
