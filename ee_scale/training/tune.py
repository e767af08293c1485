"""The recipe `tune`: exits on a frozen backbone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ee_scale.backbone.loading import TensorFolder
from ee_scale.data.loader import batches
from ee_scale.engine.frozen import EngineSettings, FrozenPipelineEngine
from ee_scale.engine.setup import OptimizerSettings
from ee_scale.exits.losses import LossSettings
from ee_scale.exits.stage import TuningStage, build_stage, gather_whole, load_stage, local_slice
from ee_scale.grid import Grid
from ee_scale.log import log
from ee_scale.training.metrics import MetricsStream, StepMetrics
from ee_scale.training.parts import SavedPart
from ee_scale.training.plan import TunePlan, uses_bf16
from ee_scale.training.schedules import LearningRate, loss_weights_at


@dataclass
class TuneRun:
    """One rank's live run. `step` counts finished optimizer steps."""

    config: Any
    plan: TunePlan
    grid: Grid
    stage: TuningStage
    engine: FrozenPipelineEngine
    step: int = 0

    @property
    def consumed_samples(self) -> int:
        return self.step * self.config.train.global_batch_size

    @property
    def optimizer_steps(self) -> int:
        return self.step

    def saved_parts(self) -> list[SavedPart]:
        """A pair of files per exit."""
        parts = []
        for k in self.stage.exit_layers:
            named = self.stage.exit_heads[str(k)].named_parameters()
            training = [(f"exit_heads.{k}.{name}", parameter) for name, parameter in named]
            parts.append(SavedPart(exits_name(k), optimizer_name(k), training))
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


def start_run(config: Any, plan: TunePlan, grid: Grid) -> TuneRun:
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
    )
    load_stage(stage, TensorFolder(plan.model_dir), grid, init=config.exits.init, seed=config.train.seed)
    engine = FrozenPipelineEngine.build(stage, grid, engine_settings(config, plan, bf16))
    return TuneRun(config, plan, grid, stage, engine)


def engine_settings(config: Any, plan: TunePlan, bf16: bool) -> EngineSettings:
    """The engine's view of the config."""
    optim, exits = config.optim, config.exits
    return EngineSettings(
        micro_batch_size=config.train.micro_batch_size,
        num_micro_batches=plan.num_micro_batches,
        losses=LossSettings(
            vocab_size=plan.shape.vocab_size,
            chunk_tokens=exits.loss_chunk_tokens,
            confidence_weighting=exits.confidence_weighting,
            kl_weight=exits.kl_weight,
            kl_temperature=exits.kl_temperature,
        ),
        optimizer=OptimizerSettings(optim.lr, tuple(optim.betas), optim.eps, optim.weight_decay, optim.clip_grad),
        bf16=bf16,
    )


def train(
    run: TuneRun,
    dataset: Dataset,
    report: Callable[[StepMetrics], None],
    save: Callable[[TuneRun], None],
) -> None:
    """Run the remaining steps. `report` is called on rank 0 for every step, `save` on all ranks when it is time.

    Raises RuntimeError if the frozen backbone changed.
    """
    config, grid, engine = run.config, run.grid, run.engine
    before = run.stage.frozen_digest() if config.train.verify_frozen else ""
    rate = LearningRate(config.optim, config.train.steps)
    stream = MetricsStream(
        grid,
        run.plan.spec.layers,
        config.train.global_batch_size * config.data.seq_length,
        ("loss", "kl") if config.exits.kl_weight > 0 else ("loss",),
    )
    micro_batches = _micro_batches(run, dataset)
    while run.step < config.train.steps:
        learning_rate = rate.at(run.step)
        engine.set_lr(learning_rate)
        engine.loss_weights = loss_weights_at(run.step, run.plan.loss_weights, config.exits)
        losses = engine.train_step(micro_batches)
        run.step += 1
        last = run.step == config.train.steps
        stream.add(run.step, learning_rate, losses)
        saves = last or run.step % config.train.save_every == 0
        if saves or run.step % config.logging.every == 0:
            stream.flush()
        for metrics in stream.ready(wait=saves):
            if grid.rank == 0:
                report(metrics)
        if last and config.train.verify_frozen:
            _check_frozen(run, before)
        if saves:
            save(run)
            stream.restart_clock()


def _micro_batches(run: TuneRun, dataset: Dataset) -> Iterator[dict[str, torch.Tensor]]:
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
