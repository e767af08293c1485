"""Train a supernet's factors with DeepSpeed's pipeline engine: one 1F1B stream of (micro-batch, subnet) pairs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from deepspeed.runtime.pipe import p2p
from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    ForwardPass,
    RecvActivation,
    RecvGrad,
    SendActivation,
    SendGrad,
)

from ee_scale.config.supernet import SupernetConfig
from ee_scale.data.loader import to_device
from ee_scale.elastic.distill import FROZEN, FeatureLoss, head_backward
from ee_scale.elastic.factors import FactorSet
from ee_scale.elastic.sampling import FULL, ROLES, Draw
from ee_scale.elastic.stage import ElasticStage
from ee_scale.engine.clipping import ALL
from ee_scale.engine.schedule import SupernetSchedule, Teach
from ee_scale.engine.setup import build_engine, guarded_adamw
from ee_scale.engine.two_way import TwoWayEngine
from ee_scale.grid import Grid


@dataclass
class _Taught:
    """What the teacher said about one micro-batch, on this stage."""

    features: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> [B, S, p]
    final: torch.Tensor | None = None  # last stage: input of the head
    logits: torch.Tensor | None = None  # last stage of a classifier: [B, C]


class SupernetEngine(TwoWayEngine):
    """One stage of supernet training. The hidden width changes from pair to pair: each rank knows every shape."""

    @classmethod
    def build(
        cls, stage: ElasticStage, factors: FactorSet, grid: Grid, config: SupernetConfig, teacher_phases: int | None
    ) -> "SupernetEngine":
        """Wrap this rank's factors. All ranks call it.

        teacher_phases: phases that the frozen teacher consists of; None: there is no teacher (the full net alone
        trains, on its task).
        """
        optimizer = guarded_adamw({ALL: list(factors.parameters())}, config.optim)
        engine = build_engine(cls, factors, grid, optimizer, config.train, stage.dtype == torch.bfloat16)
        engine.prepare(stage, grid, config, teacher_phases)
        return engine

    def prepare(self, stage: ElasticStage, grid: Grid, config: SupernetConfig, teacher_phases: int | None) -> None:
        """Attributes that the base class does not know."""
        self.stage, self.distill, self.teacher_phases = stage, config.distill, teacher_phases
        self._kernel = config.train.loss_kernel
        self.prepare_updates(grid, config)
        distills = teacher_phases is not None
        self._features = None
        if distills and self.distill.feature_weight:
            width, dim = stage.map.shape.hidden, self.distill.feature_dim
            self._features = FeatureLoss(width, dim, config.train.seed, grid.device, stage.dtype)
        self._teaches = distills and self.distill.teacher == FROZEN
        self._batches: list[dict[str, torch.Tensor]] = []
        self._stream: Sequence[Draw] = ()
        self._pairs: dict[int, dict[str, Any]] = {}
        self._taught: dict[int, _Taught] = {}

    def train_step(self, micro_batches: Iterator[dict[str, torch.Tensor]], stream: Sequence[Draw]) -> torch.Tensor:
        """One optimizer step: every draw of `stream` on its micro-batch. All ranks draw the same.

        Returns fp32 [roles, 3]: task loss, KL and feature loss by role (full, smallest, random), of this stage and
        replica, averaged over the role's draws; only the last stage knows the first two.
        """
        count = self.micro_batches
        self._batches = [to_device(next(micro_batches), self.device) for _ in range(count)]
        self._stream, self._pairs, self._taught = stream, {}, {m: _Taught() for m in range(count)}
        self._next = dict.fromkeys((ForwardPass, BackwardPass, SendActivation, RecvActivation, SendGrad, RecvGrad), 0)
        self._losses = torch.zeros(len(ROLES), 3, device=self.device)
        teachers = count if self._teaches else 0
        self._exec_schedule(SupernetSchedule(len(stream), self.num_stages, self.stage_id, teachers=teachers))
        roles = [draw.role for draw in stream]
        counts = torch.tensor([max(1, roles.count(role)) for role in ROLES], device=self.device)
        return self._losses / counts.unsqueeze(-1)

    def _turn(self, instruction: type) -> tuple[int, Draw]:
        """The pair that this instruction is about: each kind takes the stream in order."""
        index = self._next[instruction]
        self._next[instruction] += 1
        return index, self._stream[index]

    def _empty(self, micro_batch: int, width: int) -> torch.Tensor:
        rows, length = self._batches[micro_batch]["tokens"].shape
        return torch.empty(rows, length, width, dtype=self.stage.dtype, device=self.device)

    @torch.no_grad()
    def _teach(self, micro_batch: int) -> None:
        """The frozen teacher's forward on one micro-batch: receive, compute, keep what is learned from, send."""
        batch, taught = self._batches[micro_batch], self._taught[micro_batch]
        with self.stage.teaching(self.teacher_phases):
            x = batch["tokens"]
            if not self.is_first_stage():
                x = self._empty(micro_batch, self.stage.map.shape.hidden)
                with self.during("RecvActivation"):
                    p2p.recv(x, self.prev_stage)
            hidden, states = self.stage(x, batch, features=self._features is not None)
            self._keep(taught, hidden, states)
        if not self.is_last_stage():
            with self.during("SendActivation"):
                p2p.send(hidden.contiguous(), self.next_stage)

    @torch.no_grad()
    def _keep(self, taught: _Taught, hidden: torch.Tensor, states: dict[int, torch.Tensor]) -> None:
        if self._features is not None:
            taught.features = self._features.project(states)
        if self.is_last_stage():
            taught.final = hidden.detach()
            if self.stage.map.family.task == "classify":
                taught.logits = self.stage.head(taught.final)

    def _forward(self, buffer_id: int) -> None:
        index, draw = self._turn(ForwardPass)
        pair, batch = self._pairs.setdefault(index, {}), self._batches[draw.micro_batch]
        self.stage.select(draw.spec)
        taught = self._taught[draw.micro_batch]
        wants = self._features is not None
        pair["output"], states = self.stage(pair.get("input", batch["tokens"]), batch, features=wants)
        is_teacher = draw.role == FULL and not self._teaches
        if is_teacher and self.teacher_phases is not None:
            self._keep(taught, pair["output"], states)
        if wants and not is_teacher:
            loss = self._features(states, taught.features, batch.get("attention_mask")) / draw.spec.depth
            self._losses[ROLES.index(draw.role), 2] += loss.detach()
            pair["features"] = self.distill.feature_weight * draw.weight * loss

    def _backward(self, buffer_id: int) -> None:
        index, draw = self._turn(BackwardPass)
        pair = self._pairs[index]
        self.stage.select(draw.spec)
        if self.is_last_stage():
            pair["gradient"] = self._head_backward(pair["output"], draw)
        ends = [(pair["output"], pair["gradient"]), (pair.get("features"), None)]
        ends = [(tensor, gradient) for tensor, gradient in ends if tensor is not None and tensor.requires_grad]
        if ends:
            torch.autograd.backward(*zip(*ends, strict=True))
        if self.is_first_stage():
            del self._pairs[index]
        else:
            self._pairs[index] = {"input": pair["input"]}

    def _head_backward(self, output: torch.Tensor, draw: Draw) -> torch.Tensor:
        stage, taught = self.stage, self._taught[draw.micro_batch]
        learns = self.teacher_phases is not None and (self._teaches or draw.role != FULL)
        teacher = None
        if learns and taught.logits is None:
            teacher = (self._teacher_logits, taught.final)
        means, gradient = head_backward(
            stage.map.family.task,
            stage.head,
            output,
            self._batches[draw.micro_batch],
            stage.map.config.vocab_size,
            self.distill,
            draw.weight,
            taught.logits if learns else None,
            teacher,
            self._kernel,
        )
        self._losses[ROLES.index(draw.role), :2] += means
        return gradient

    def _teacher_logits(self, final: torch.Tensor) -> torch.Tensor:
        phases = self.teacher_phases if self._teaches else self.stage.active.phases
        with self.stage.teaching(phases):
            return self.stage.head(final)

    def _send_activation(self, buffer_id: int) -> None:
        index, _ = self._turn(SendActivation)
        p2p.send(self._pairs[index]["output"].detach().contiguous(), self.next_stage)

    def _recv_activation(self, buffer_id: int) -> None:
        index, draw = self._turn(RecvActivation)
        x = self._empty(draw.micro_batch, draw.spec.hidden)
        p2p.recv(x, self.prev_stage)
        self._pairs[index] = {"input": x.requires_grad_()}

    def _send_grad(self, buffer_id: int) -> None:
        index, _ = self._turn(SendGrad)
        p2p.send(self._pairs.pop(index)["input"].grad.contiguous(), self.prev_stage)

    def _recv_grad(self, buffer_id: int) -> None:
        index, draw = self._turn(RecvGrad)
        gradient = self._empty(draw.micro_batch, draw.spec.hidden)
        p2p.recv(gradient, self.next_stage)
        self._pairs[index]["gradient"] = gradient

    def step_loss(self) -> torch.Tensor:
        """Of all roles together."""
        return self._losses.sum()

    _INSTRUCTION_MAP: ClassVar[dict[type, Callable[..., None]]] = {
        **TwoWayEngine._INSTRUCTION_MAP,
        Teach: _teach,
    }
