"""Train a supernet's factors with DeepSpeed's pipeline engine: one 1F1B stream of (micro-batch, subnet) pairs."""

from collections.abc import Callable, Iterator, Sequence
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
from ee_scale.elastic.distill import FROZEN, FeatureLoss, text_backward, token_losses
from ee_scale.elastic.factors import FactorSet
from ee_scale.elastic.sampling import FULL, ROLES, Draw
from ee_scale.elastic.stage import ElasticStage
from ee_scale.elastic.teacher import Taught, TeacherCache, sample_teacher
from ee_scale.engine.clipping import ALL
from ee_scale.engine.schedule import SupernetSchedule, Teach
from ee_scale.engine.setup import build_engine, guarded_adamw
from ee_scale.engine.two_way import TwoWayEngine
from ee_scale.exits.losses import LossSettings, sampled_teacher, token_backward, whole_teacher
from ee_scale.grid import Grid


class SupernetEngine(TwoWayEngine):
    """One stage of supernet training. The hidden width changes from pair to pair: each rank knows every shape."""

    @classmethod
    def build(
        cls,
        stage: ElasticStage,
        factors: FactorSet,
        grid: Grid,
        config: SupernetConfig,
        teacher_phases: int | None,
        cache: TeacherCache | None = None,
    ) -> "SupernetEngine":
        """Wrap this rank's factors. All ranks call it.

        teacher_phases: phases that the frozen teacher consists of; None: there is no teacher (the full net alone
        trains, on its task). cache: where what it says is kept; it outlives the engine.
        """
        optimizer = guarded_adamw({ALL: list(factors.parameters())}, config.optim)
        engine = build_engine(cls, factors, grid, optimizer, config.train, stage.dtype == torch.bfloat16)
        engine.prepare(stage, grid, config, teacher_phases, cache)
        return engine

    def prepare(
        self,
        stage: ElasticStage,
        grid: Grid,
        config: SupernetConfig,
        teacher_phases: int | None,
        cache: TeacherCache | None,
    ) -> None:
        """Attributes that the base class does not know."""
        self.stage, self.distill, self.teacher_phases = stage, config.distill, teacher_phases
        self._cache, self._kernel, self._seed = cache, config.train.loss_kernel, config.train.seed
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
        self._taught: dict[int, Taught] = {}
        self._texts: list[list[int]] = []

    def train_step(self, micro_batches: Iterator[dict[str, torch.Tensor]], stream: Sequence[Draw]) -> torch.Tensor:
        """One optimizer step: every draw of `stream` on its micro-batch. All ranks draw the same.

        Where the teacher is kept, a micro-batch names its texts: 'sample' [B].

        Returns fp32 [roles, 3]: task loss, KL and feature loss by role (full, smallest, random), of this stage and
        replica, averaged over the role's draws; only the last stage knows the first two.
        """
        count = self.micro_batches
        batches = [next(micro_batches) for _ in range(count)]
        self._texts = [batch["sample"].tolist() for batch in batches] if self._cache is not None else []
        self._batches = [to_device(batch, self.device) for batch in batches]
        self._stream, self._pairs, self._taught = stream, {}, {}
        self._next = dict.fromkeys((ForwardPass, BackwardPass, SendActivation, RecvActivation, SendGrad, RecvGrad), 0)
        self._losses = torch.zeros(len(ROLES), 3, device=self.device)
        teachers = [m for m in range(count) if not self._recalls(m)] if self._teaches else []
        self._exec_schedule(SupernetSchedule(len(stream), self.num_stages, self.stage_id, teachers=teachers))
        roles = [draw.role for draw in stream]
        counts = torch.tensor([max(1, roles.count(role)) for role in ROLES], device=self.device)
        return self._losses / counts.unsqueeze(-1)

    def _recalls(self, micro_batch: int) -> bool:
        """Take what is kept of a micro-batch; False: the teacher has to look at it."""
        if self._cache is None or not self._cache.holds(self._texts[micro_batch]):
            return False
        length = self._batches[micro_batch]["tokens"].shape[1]
        self._taught[micro_batch] = self._cache.read(self._texts[micro_batch], length, self.device)
        return True

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
        batch = self._batches[micro_batch]
        with self.stage.teaching(self.teacher_phases):
            x = batch["tokens"]
            if not self.is_first_stage():
                x = self._empty(micro_batch, self.stage.map.shape.hidden)
                with self.during("RecvActivation"):
                    p2p.recv(x, self.prev_stage)
            hidden, states = self.stage(x, batch, features=self._features is not None)
            taught = self._taught[micro_batch] = self._said(hidden, states)
            if self._cache is not None:
                self._remember(micro_batch, taught)
        if not self.is_last_stage():
            with self.during("SendActivation"):
                p2p.send(hidden.contiguous(), self.next_stage)

    @torch.no_grad()
    def _said(self, hidden: torch.Tensor, states: dict[int, torch.Tensor]) -> Taught:
        taught = Taught()
        if self._features is not None:
            taught.features = self._features.project(states)
        if self.is_last_stage():
            taught.final = hidden.detach()
            if self.stage.map.family.task == "classify":
                taught.logits = self.stage.head(taught.final)
        return taught

    def _remember(self, micro_batch: int, taught: Taught) -> None:
        """A causal LM learns from samples of the teacher, whether they are kept or not: the bound changes no number."""
        texts, batch = self._texts[micro_batch], self._batches[micro_batch]
        if taught.final is not None and taught.logits is None and self.distill.kl_weight:
            count, losses = self.distill.cache_samples, self._losses_of(learns=True)
            sampled = sample_teacher(self.stage.head, taught.final, texts, count, losses, self._seed)
            taught.tokens, taught.negentropy = sampled
        taught.final = None
        rows, length = batch["tokens"].shape
        lengths = batch["attention_mask"].sum(1).tolist() if "attention_mask" in batch else [length] * rows
        self._cache.keep(texts, lengths, taught)

    def _forward(self, buffer_id: int) -> None:
        index, draw = self._turn(ForwardPass)
        pair, batch = self._pairs.setdefault(index, {}), self._batches[draw.micro_batch]
        self.stage.select(draw.spec)
        wants = self._features is not None
        pair["output"], states = self.stage(pair.get("input", batch["tokens"]), batch, features=wants)
        is_teacher = draw.role == FULL and not self._teaches
        if is_teacher and self.teacher_phases is not None:
            self._taught[draw.micro_batch] = self._said(pair["output"], states)
        if wants and not is_teacher:
            loss = (
                self._features(states, self._taught[draw.micro_batch].features, batch.get("attention_mask"))
                / draw.spec.depth
            )
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

    def _losses_of(self, *, learns: bool) -> LossSettings:
        return token_losses(self.distill, self.stage.map.config.vocab_size, self._kernel, learns=learns)

    def _head_backward(self, output: torch.Tensor, draw: Draw) -> torch.Tensor:
        head, batch = self.stage.head, self._batches[draw.micro_batch]
        learns = self.teacher_phases is not None and (self._teaches or draw.role != FULL)
        taught = self._taught[draw.micro_batch] if learns else Taught()
        if self.stage.map.family.task == "classify":
            found = text_backward(head, output, batch["labels"], self.distill, draw.weight, taught.logits)
        else:
            losses, teacher = self._losses_of(learns=learns), None
            if taught.tokens is not None and taught.negentropy is not None:
                teacher = sampled_teacher(taught.tokens, taught.negentropy, losses)
            elif taught.final is not None:
                teacher = whole_teacher(self._teacher_logits, taught.final, losses)
            found = token_backward(head, output, batch["labels"], batch["loss_mask"], losses, draw.weight, teacher)
        means, gradient = found
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
