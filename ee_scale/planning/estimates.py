"""What a plan of any recipe says of itself, and what all of them count alike.

Parameters are counted on transformers' own modules at one rank's sizes, on the meta device (`passes`). FLOPs: 2 per
multiply-add of a projection; attention is counted as the full square, 4 x S x width per token (PaLM's convention, arXiv
2204.02311, appendix B); norms, activations and the optimizer are left out. Frozen matrices have no weight gradient, and
what nothing trained lies in front of has no input gradient.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from transformers import PreTrainedConfig

from ee_scale.backbone.stages import StagePlan
from ee_scale.config.schema import TrainingConfig
from ee_scale.errors import UserError
from ee_scale.families.sizes import max_length, max_length_text
from ee_scale.grid import Layout

ConfigType = TypeVar("ConfigType", bound=TrainingConfig)


@dataclass(frozen=True)
class StageWork:
    """FLOPs per token of one stage of one replica, summed over its tensor ranks.

    Attributes:
        forward, backward: of the layers; of a supernet: of all draws together.
        exits: forward and backward of what has a loss: exits, and the model's own head where it learns.
        teacher: forward of a frozen teacher.
    """

    forward: float
    backward: float = 0.0
    exits: float = 0.0
    teacher: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.exits + self.teacher


def mean_work(shares: Sequence[float], works: Sequence[StageWork]) -> StageWork:
    """Of a stage whose steps are divided like this."""
    columns = zip(*map(astuple, works), strict=True)
    return StageWork(*(sum(s * x for s, x in zip(shares, column, strict=True)) for column in columns))


@dataclass(frozen=True)
class Parameters:
    """Of one rank: `frozen` and `trained` numbers, the largest trained tensor, and those of the frozen ones that are of
    experts that a token does not go through (`idle`)."""

    frozen: int
    trained: int
    largest: int = 0
    idle: int = 0

    @property
    def held(self) -> int:
        return self.frozen + self.trained

    @property
    def active(self) -> int:
        """What a token meets."""
        return self.held - self.idle


BF16, FP32 = 2, 4  # bytes of a number
# What DeepSpeed's ZeRO-1 keeps of a trained number, whatever its type: whole; and divided over replicas.
GRADIENT_BYTES = FP32
OPTIMIZER_BYTES = 3 * FP32  # master copy and two moments
BUCKET = 50_000_000  # fp32 numbers that are reduced over replicas at once (`engine.setup`); bf16's are, where they lie
# All-reduces of a hidden state outside the layers: of looked-up rows; of the gradient of what an output matrix reads.
EMBEDDING_CALL, HEAD_CALL = 1, 1
# What a process holds besides: CUDA context, kernels and NCCL's buffers (assumed); libraries on a CPU (measured,
# scripts/bench_memory.py).
OVERHEAD = {"cuda": 1.5 * 2**30, "cpu": 0.4 * 2**30}


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank.

    Attributes:
        activations: of the micro-batches in flight, and what a layer or an exit needs for a moment.
        logits: of one chunk of tokens, with what its loss needs.
        buffers: what crosses stages, what reductions and the optimizer step need for a moment.
        overhead: of the process.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    overhead: float = 0.0

    @property
    def total(self) -> float:
        return sum(astuple(self))


@dataclass(frozen=True)
class StageTraffic:
    """What one rank of a stage sends in one optimizer step, bytes; collectives as a ring does them.

    Attributes:
        stages: hidden states and gradients to the neighbouring stages, and gradients of a matrix with copies there.
        tensor: all-reduces of hidden states over the tensor group, and parts of states that are joined there;
            `tensor_calls` of both.
        reduce: gradients over the replicas. gather: updated parameters over the replicas.
    """

    stages: float
    tensor: float
    tensor_calls: int
    reduce: float
    gather: float

    @property
    def total(self) -> float:
        return self.stages + self.tensor + self.reduce + self.gather


class Plan(ABC, Generic[ConfigType]):
    """What runs where, and what it costs.

    Attributes:
        layout: the processes that are launched.
        num_micro_batches: per optimizer step and rank.
    """

    config: ConfigType
    model_dir: Path
    stages: StagePlan
    layout: Layout
    num_micro_batches: int

    @abstractmethod
    def with_config(self, config: ConfigType) -> "Plan[ConfigType]":
        """The same model under another config of its command. Raises `UserError`."""

    @property
    @abstractmethod
    def total_steps(self) -> int: ...

    @abstractmethod
    def work(self) -> list[StageWork]:
        """Of each launched stage, over the run's steps on average."""

    @abstractmethod
    def parameters(self, stage: int) -> Parameters:
        """Of one rank of a stage, when most is trained."""

    @abstractmethod
    def memory(self, *, bf16: bool, device: str = "cuda") -> list[RankMemory]:
        """The most that one rank of each launched stage holds at one time; device: 'cuda' or 'cpu'."""

    @abstractmethod
    def traffic(self, *, bf16: bool) -> list[StageTraffic]:
        """Of each launched stage, in the steps that send most."""

    @abstractmethod
    def bubble(self) -> tuple[float, str]:
        """(share of a step in which an evenly loaded stage waits, the formula)."""

    def exits(self, stage: int) -> tuple[int, ...]:
        """Layers of the exits that a stage trains."""
        return ()

    def reliefs(self) -> Mapping[str, Any]:
        """Settings, beside grid and batch, that would make a rank need less memory."""
        return {}

    def notes(self) -> Mapping[str, str]:
        """What else a person should know before the run starts: lines by their name."""
        return {}

    @property
    def flops_per_token(self) -> float:
        """Forward and backward, of a whole replica."""
        return sum(work.total for work in self.work())


# Logits of both, tempered, their logarithms, probabilities and a product (measured).
TEACHER_COPIES = 8


def logits_bytes(tokens: int, chunk: int, columns: int, size: int, *, pair: bool, teacher: bool, largest: int) -> float:
    """Peak of one chunk's logits and loss [chunk, columns]; `pair`: lm_head and low-rank update exist at once."""
    chunked, chunk = tokens > chunk, min(chunk, tokens)
    if teacher:
        copies = TEACHER_COPIES * FP32
    elif size == FP32:
        copies = FP32 * (3 if pair else 2)  # lm_head's, the update's, their sum; or logits and softmax
    else:
        copies = BF16 + FP32 + FP32  # bf16 logits, fp32 logits, softmax
    if chunked:
        copies += size  # the last chunk's logits are dropped when the next one's are there
    return chunk * columns * copies + size * largest


def rank_memory(
    parameters: Parameters, dp: int, size: int, device: str, *, activations: float, logits: float, crossing: float
) -> RankMemory:
    """Of a rank with these parameters of `size` bytes each; `crossing`: bytes that cross stages."""
    trained = parameters.trained
    flat = FP32 * trained / dp if size == FP32 else 0  # the gradients' flat copy
    bucket = FP32 * min(trained, BUCKET) if size == FP32 and dp > 1 else 0
    update = 2 * FP32 * parameters.largest  # what the step needs for one tensor
    # Activations are gone when the step is taken.
    moment = max(0.0, max(flat + bucket, update) - activations - logits)
    return RankMemory(
        weights=size * parameters.held,
        gradients=GRADIENT_BYTES * trained,
        optimizer=OPTIMIZER_BYTES * trained / dp,
        activations=activations,
        logits=logits,
        buffers=crossing + moment,
        overhead=OVERHEAD[device],
    )


def filled_pipe(stages: int, pairs: int) -> tuple[float, str]:
    """The bubble of 1F1B: (share of a step, the formula)."""
    return (stages - 1) / (pairs + stages - 1), f"(p-1)/(m+p-1), p={stages}, m={pairs} forward-backward pairs"


def ring(bytes_: float, ranks: int) -> float:
    """Bytes that each rank sends when a ring reduces or gathers `bytes_`."""
    return bytes_ * (ranks - 1) / ranks


def all_reduce(bytes_: float, ranks: int) -> float:
    """Bytes that each rank sends: a ring reduces, and gathers."""
    return 2 * ring(bytes_, ranks)


def rank_traffic(
    plan: Plan,
    crossing: float,
    calls: int,
    state: float,
    trained: int,
    size: int,
    joined: tuple[int, float] = (0, 0.0),
) -> StageTraffic:
    """What a rank sends that crosses stages with `crossing` bytes and `calls` all-reduces of `state` bytes per
    micro-batch, and trains `trained` numbers of `size` bytes. `joined`: calls and bytes of tensors that ranks gather.
    """
    tp, dp, count = plan.layout.tp, plan.layout.dp, plan.num_micro_batches
    tensor = count * (calls * all_reduce(state, tp) + ring(joined[1], tp))
    calls = count * (calls + joined[0]) if tp > 1 else 0
    # bf16 gradients are summed whole in fp32; ZeRO-1 in fp32 reduces each to the replica that owns it.
    reduce = (all_reduce if size == BF16 else ring)(FP32 * trained, dp)
    return StageTraffic(count * crossing, tensor, calls, reduce, ring(size * trained, dp))


def check_lengths(config: TrainingConfig, model_config: PreTrainedConfig) -> None:
    """Refuse sequences and grids that are too long for the model. Raises `UserError`."""
    if config.data.seq_length > max_length(model_config):
        raise UserError(
            f"data.seq_length={config.data.seq_length} is above the model's {max_length_text(model_config)}"
        )
    if config.parallel.pp > (layers := model_config.num_hidden_layers):
        raise UserError(f"parallel.pp={config.parallel.pp}: more stages than the model's {layers} layers")


def uses_bf16(precision: str, device: torch.device) -> bool:
    """'auto' means bf16 on a GPU and fp32 on a CPU."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")
