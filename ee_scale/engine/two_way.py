"""What engines share whose gradients cross stages: 1F1B instructions, one gradient norm over everything."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    ForwardPass,
    OptimizerStep,
    RecvActivation,
    RecvGrad,
    SendActivation,
    SendGrad,
)

from ee_scale.config.schema import TrainingConfig
from ee_scale.engine.clipping import ALL, TOGETHER, clip_groups
from ee_scale.engine.guard import UpdateGuard
from ee_scale.engine.observed import ObservedEngine
from ee_scale.engine.state import start_moments
from ee_scale.grid import Grid


def _by_name(name: str) -> Callable[..., None]:
    return lambda engine, **fields: getattr(engine, name)(**fields)


class TwoWayEngine(ObservedEngine):
    """Subclasses say what to do with a micro-batch: `_forward`, `_backward`, `_send_activation`, ... (`buffer_id`)."""

    def prepare_updates(self, grid: Grid, config: TrainingConfig) -> None:
        """Attributes that the base class does not know."""
        self.process_grid, self._clip = grid, config.optim.clip_grad
        self.guard = UpdateGuard([ALL], config.train.spike_factor, grid.device)
        self.grad_norm = torch.zeros(())
        start_moments(self.optimizer)

    @property
    def grad_norms(self) -> dict[str, torch.Tensor]:
        """Norm before clipping, told by the last stage for all."""
        return {TOGETHER: self.grad_norm} if self.is_last_stage() else {}

    @property
    def skipped(self) -> dict[str, torch.Tensor]:
        """Updates that were left out so far, an int64 scalar on the device; the last stage tells."""
        return {TOGETHER: self.guard.count(ALL)} if self.is_last_stage() else {}

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of the AdamW underneath."""
        return self.optimizer.optimizer.param_groups

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step."""
        for group in self.param_groups():
            group["lr"] = lr

    def step_loss(self) -> torch.Tensor:
        """What this stage and replica lost in this step: a scalar that the guard looks at."""
        raise NotImplementedError

    def _step(self) -> None:
        losses = {ALL: self.step_loss()}
        norms = clip_groups(self.optimizer, self._clip, self.process_grid, self.guard, losses, across_stages=True)
        self.grad_norm = norms[ALL]
        self._exec_optimizer_step()

    _INSTRUCTION_MAP: ClassVar[dict[type, Callable[..., None]]] = {
        **ObservedEngine._INSTRUCTION_MAP,
        ForwardPass: _by_name("_forward"),
        BackwardPass: _by_name("_backward"),
        SendActivation: _by_name("_send_activation"),
        RecvActivation: _by_name("_recv_activation"),
        SendGrad: _by_name("_send_grad"),
        RecvGrad: _by_name("_recv_grad"),
        OptimizerStep: _by_name("_step"),
    }
