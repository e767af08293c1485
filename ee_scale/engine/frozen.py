"""Train exits on a frozen backbone with DeepSpeed's pipeline engine."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.schedule import ForwardPass, LoadMicroBatch, OptimizerStep

from ee_scale.config.tune import TuneConfig
from ee_scale.data.loader import to_device
from ee_scale.engine.clipping import clip_groups
from ee_scale.engine.guard import UpdateGuard
from ee_scale.engine.observed import ObservedEngine
from ee_scale.engine.schedule import FrozenSchedule, ReadTaps, ShareFinalHidden, TrainExits
from ee_scale.engine.setup import build_engine, guarded_adamw
from ee_scale.engine.state import start_moments
from ee_scale.exits.losses import LossSettings, exit_backward
from ee_scale.exits.stage import TuningStage
from ee_scale.exits.taps import TapStep
from ee_scale.grid import Grid


def loss_settings(stage: TuningStage, config: TuneConfig) -> LossSettings:
    """The settings' part of the losses, for a stage's vocabulary."""
    exits = config.exits
    return LossSettings(
        stage.backbone.model_config.vocab_size,
        exits.loss_chunk_tokens,
        exits.confidence_weighting,
        kl_weight=exits.kl_weight,
        kl_temperature=exits.kl_temperature,
        kernel=config.train.loss_kernel,
    )


class FrozenPipelineEngine(ObservedEngine):
    """One stage of exit tuning. `train_step` runs a batch; no gradient ever crosses stages.

    Attributes:
        flush: wait for all stages after every batch; only the benchmark wants that.
    """

    flush = False

    @classmethod
    def build(cls, stage: TuningStage, grid: Grid, config: TuneConfig) -> "FrozenPipelineEngine":
        """Wrap this rank's stage. All ranks call it."""
        trains = bool(stage.exit_layers)
        # A stage without exits gets no optimizer at all: DeepSpeed refuses an empty one.
        groups = {k: list(stage.exit_heads[str(k)].parameters()) for k in stage.exit_layers}
        optimizer = guarded_adamw(groups, config.optim) if trains else None
        bf16 = next(stage.backbone.parameters()).dtype == torch.bfloat16
        engine = build_engine(cls, stage, grid, optimizer, config.train, bf16)
        engine.prepare(stage, grid, config)
        return engine

    def prepare(self, stage: TuningStage, grid: Grid, config: TuneConfig) -> None:
        """Attributes that the base class does not know."""
        self.stage, self.process_grid, self._clip = stage, grid, config.optim.clip_grad
        self.loss_settings = loss_settings(stage, config)
        self.share_final = config.exits.kl_weight > 0
        self.loss_weights = dict.fromkeys(stage.exit_layers, 1.0)
        if stage.exit_layers:
            start_moments(self.optimizer)
        self.guard = UpdateGuard(stage.exit_layers, config.train.spike_factor, grid.device)
        self.grad_norms: dict[int, torch.Tensor] = {}
        self._losses: dict[int, torch.Tensor] = {}
        self._micro_batches: Iterator[dict[str, torch.Tensor]] = iter(())
        self._batch: list[Any] = []
        self._taps: list[Any] = []
        self._final: list[Any] = []
        self._kept: TapStep | None = None

    def train_step(
        self, micro_batches: Iterator[dict[str, torch.Tensor]], kept: TapStep | None = None
    ) -> dict[int, torch.Tensor]:
        """One optimizer step on `num_micro_batches` micro-batches (tokens, labels, loss_mask: [B, S]).

        Every stage draws the same micro-batches. `kept`: what exits read of them is kept on disk, or read from there,
        the same on all ranks. Returns, for each exit of this stage, fp32 [2]: cross entropy and KL of this replica,
        averaged over the micro-batches (on the device; nothing is waited for).
        """
        self._kept = kept
        schedule = FrozenSchedule(
            self.micro_batches,
            self.num_stages,
            self.stage_id,
            has_exits=bool(self.stage.exit_layers),
            share_final=self.share_final,
            reads_taps=kept is not None and kept.reads,
        )
        buffers = schedule.num_pipe_buffers()
        self._batch, self._taps, self._final = [None] * buffers, [None] * buffers, [None] * buffers
        self._losses = {k: torch.zeros(2, device=self.device) for k in self.stage.exit_layers}
        self._micro_batches = micro_batches
        with torch.no_grad():
            self._exec_schedule(schedule)
        if self.flush:
            dist.barrier(self.process_grid.pp_group)
        return self._losses

    @property
    def skipped(self) -> dict[int, torch.Tensor]:
        """Updates that were left out so far, by exit: int64 scalars on the device."""
        return {k: self.guard.count(k) for k in self.stage.exit_layers}

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step."""
        for group in self.param_groups():
            group["lr"] = lr

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of the AdamW underneath; none on a stage without exits."""
        return self.optimizer.optimizer.param_groups if self.stage.exit_layers else []

    def _load(self, buffer_id: int) -> None:
        batch = next(self._micro_batches)
        if self._kept is not None:
            self._kept.load(buffer_id, batch["tokens"])
        self._batch[buffer_id] = to_device(batch, self.device)
        if self.is_first_stage():
            self.pipe_buffers["inputs"][buffer_id] = self._batch[buffer_id]["tokens"]

    def _forward(self, buffer_id: int) -> None:
        hidden, self._taps[buffer_id] = self.stage(self.pipe_buffers["inputs"][buffer_id])
        self.pipe_buffers["inputs"][buffer_id] = None
        self.pipe_buffers["outputs"][buffer_id] = hidden
        if self.share_final and self.is_last_stage():
            self._final[buffer_id] = hidden.contiguous()
        if self._kept is not None:
            self._kept.keep(buffer_id, self.stage, self._taps[buffer_id], self._final[buffer_id])

    def _read_taps(self, buffer_id: int) -> None:
        self._taps[buffer_id], self._final[buffer_id] = self._kept.read(buffer_id, self.stage, self.device)

    def _share_final(self, buffer_id: int) -> None:
        group = self.process_grid.pp_group
        if not self.is_last_stage():
            self._final[buffer_id] = torch.empty_like(self.pipe_buffers["outputs"][buffer_id])
        dist.broadcast(self._final[buffer_id], dist.get_global_rank(group, self.num_stages - 1), group=group)

    def _train_exits(self, buffer_id: int) -> None:
        taps, batch = self._taps[buffer_id], self._batch[buffer_id]
        for k in self.stage.exit_layers:
            with torch.enable_grad():
                hidden = self.stage.exit_hidden(k, taps.pop(k))
                means, gradient = exit_backward(
                    self.stage.exit_heads[str(k)],
                    hidden,
                    batch["labels"],
                    batch["loss_mask"],
                    self.stage.backbone.lm_head,
                    self.loss_settings,
                    scale=self.loss_weights[k] / self.micro_batches,
                    final_hidden=self._final[buffer_id],
                )
                if hidden.requires_grad:
                    hidden.backward(gradient)
            self._losses[k] += means / self.micro_batches
        self._final[buffer_id] = self._batch[buffer_id] = None

    def _step(self) -> None:
        losses = {k: values.sum() for k, values in self._losses.items()}
        self.grad_norms = clip_groups(self.optimizer, self._clip, self.process_grid, self.guard, losses)
        self._exec_optimizer_step()

    _INSTRUCTION_MAP: ClassVar[dict[type, Callable[..., None]]] = {
        **ObservedEngine._INSTRUCTION_MAP,
        LoadMicroBatch: _load,
        ForwardPass: _forward,
        ReadTaps: _read_taps,
        ShareFinalHidden: _share_final,
        TrainExits: _train_exits,
        OptimizerStep: _step,
    }
