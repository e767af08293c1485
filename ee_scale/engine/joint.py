"""Train exits together with the backbone, or with adapters on it: 1F1B with losses at every stage (EE-LLM).

The gradient of a stage's parameters comes from one backward with several roots: the hidden state of each of its exits,
and its output with the gradient that the next stage sent (arXiv 2312.04916, with roots instead of an auxiliary loss).
Exits run right before the backward of their micro-batch, so the logits of one alone exist at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe import p2p
from deepspeed.runtime.pipe.schedule import (
    LoadMicroBatch,
    ReduceTiedGrads,
)

from ee_scale.config.tune import TuneConfig
from ee_scale.data.loader import to_device
from ee_scale.engine.clipping import ALL, COPY
from ee_scale.engine.frozen import loss_settings
from ee_scale.engine.schedule import JointSchedule
from ee_scale.engine.setup import build_engine, guarded_adamw
from ee_scale.engine.two_way import TwoWayEngine
from ee_scale.exits.joint import JointStage
from ee_scale.exits.losses import exit_backward, token_backward
from ee_scale.grid import Grid
from ee_scale.modeling.kinds import Tap

FINAL = "final"  # key of the model's own loss, beside those of the exits


@dataclass
class _Slot:
    """A micro-batch in flight on this stage."""

    batch: dict[str, torch.Tensor]
    x: torch.Tensor | None = None  # [B, S] ids or [B, S, D]
    output: torch.Tensor | None = None
    taps: dict[int, Tap] | None = None
    gradient: torch.Tensor | None = None  # of the output, from the next stage


class JointPipelineEngine(TwoWayEngine):
    """One stage of joint training. All parameters are one group: one gradient norm over all stages."""

    @classmethod
    def build(cls, stage: JointStage, grid: Grid, config: TuneConfig) -> "JointPipelineEngine":
        """Wrap this rank's stage. All ranks call it."""
        if stage.copied is not None and not stage.is_original:
            setattr(stage.trained[stage.copied], COPY, True)
        optimizer = guarded_adamw({ALL: list(stage.parameters())}, config.optim)
        engine = build_engine(cls, stage, grid, optimizer, config.train, stage.dtype == torch.bfloat16)
        engine.prepare(stage, grid, config)
        return engine

    def prepare(self, stage: JointStage, grid: Grid, config: TuneConfig) -> None:
        """Attributes that the base class does not know."""
        self.stage, self._final_weight = stage, config.backbone.final_weight
        self.loss_settings = loss_settings(stage, config)
        self.prepare_updates(grid, config)
        self.copies_group = grid.stages_group(stage.copies)
        self.loss_weights: dict[int, float] = dict.fromkeys(stage.exit_layers, 1.0)
        self._losses: dict[int | str, torch.Tensor] = {}
        self._micro_batches: Iterator[dict[str, torch.Tensor]] = iter(())
        self._slots: dict[int, _Slot] = {}

    def train_step(self, micro_batches: Iterator[dict[str, torch.Tensor]]) -> dict[int | str, torch.Tensor]:
        """One optimizer step on `num_micro_batches` micro-batches (tokens, labels, loss_mask: [B, S]).

        Every stage draws the same micro-batches. Returns, for each exit of this stage, and for FINAL on the last one,
        fp32 [2]: cross entropy and KL (always 0) of this replica, averaged over the micro-batches.
        """
        keys = [*self.stage.exit_layers, *([FINAL] if self.is_last_stage() else [])]
        self._losses = {key: torch.zeros(2, device=self.device) for key in keys}
        self._micro_batches, self._slots = micro_batches, {}
        self._exec_schedule(JointSchedule(self.micro_batches, self.num_stages, self.stage_id))
        return self._losses

    def _load(self, buffer_id: int) -> None:
        batch = next(self._micro_batches)
        slot = _Slot(to_device(batch, self.device))
        if self.is_first_stage():
            slot.x = slot.batch["tokens"]
        self._slots[buffer_id] = slot

    def _forward(self, buffer_id: int) -> None:
        slot = self._slots[buffer_id]
        slot.output, slot.taps = self.stage(slot.x)

    def _backward(self, buffer_id: int) -> None:
        slot = self._slots[buffer_id]
        ends = [self._exit_end(k, slot) for k in self.stage.exit_layers]
        ends.append(self._final_end(slot) if self.is_last_stage() else (slot.output, slot.gradient))
        tensors, gradients = zip(*((x, g) for x, g in ends if x.requires_grad), strict=True)
        torch.autograd.backward(tensors, gradients)
        self.stage.forget()
        slot.output = slot.taps = slot.gradient = None

    def _exit_end(self, k: int, slot: _Slot) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden state that the head of exit k reads, and the gradient of its loss there."""
        hidden = self.stage.exit_hidden(k, slot.taps.pop(k))
        means, gradient = exit_backward(
            self.stage.exit_heads[str(k)],
            hidden,
            slot.batch["labels"],
            slot.batch["loss_mask"],
            self.stage.backbone.lm_head,
            self.loss_settings,
            scale=self.loss_weights[k] / self.micro_batches,
        )
        self._losses[k] += means / self.micro_batches
        return hidden, gradient

    def _final_end(self, slot: _Slot) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for the model's own loss, which has no confidence weights."""
        lm_head, spec = self.stage.backbone.lm_head, self.stage.spec
        means, gradient = token_backward(
            lambda piece: spec.capped(lm_head(piece)),
            slot.output,
            slot.batch["labels"],
            slot.batch["loss_mask"],
            replace(self.loss_settings, confidence_weighting=False),
            scale=self._final_weight / self.micro_batches,
        )
        self._losses[FINAL] += means / self.micro_batches
        return slot.output, gradient

    def _empty(self, slot: _Slot) -> torch.Tensor:
        hidden_size = self.stage.backbone.model_config.hidden_size
        return torch.empty(*slot.batch["tokens"].shape, hidden_size, dtype=self.stage.dtype, device=self.device)

    def _send_activation(self, buffer_id: int) -> None:
        p2p.send(self._slots[buffer_id].output.detach().contiguous(), self.next_stage)

    def _recv_activation(self, buffer_id: int) -> None:
        slot = self._slots[buffer_id]
        x = self._empty(slot)
        p2p.recv(x, self.prev_stage)
        slot.x = x.requires_grad_()

    def _send_grad(self, buffer_id: int) -> None:
        p2p.send(self._slots.pop(buffer_id).x.grad.contiguous(), self.prev_stage)

    def _recv_grad(self, buffer_id: int) -> None:
        slot = self._slots[buffer_id]
        slot.gradient = self._empty(slot)
        p2p.recv(slot.gradient, self.next_stage)

    def _reduce_copies(self) -> None:
        """Sum the gradients of the output matrix over the stages that hold a copy: all make the same update."""
        if self.stage.copied is None:
            return
        parameter = self.stage.trained[self.stage.copied]
        gradient = parameter._hp_grad if isinstance(self.optimizer, BF16_Optimizer) else parameter.grad
        assert gradient.is_contiguous()  # gloo sums other views wrongly and says nothing
        dist.all_reduce(gradient, group=self.copies_group)

    def step_loss(self) -> torch.Tensor:
        """Of all exits of this stage, and of the model itself on the last one."""
        losses = [values.sum() for values in self._losses.values()]
        return torch.stack(losses).sum() if losses else torch.zeros((), device=self.device)

    _INSTRUCTION_MAP: ClassVar[dict[type, Callable[..., None]]] = {
        **TwoWayEngine._INSTRUCTION_MAP,
        LoadMicroBatch: _load,
        ReduceTiedGrads: _reduce_copies,
    }
