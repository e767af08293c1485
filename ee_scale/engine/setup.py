"""DeepSpeed's pipeline engine around one stage: its configuration, its view of the groups, the optimizer's settings."""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from torch import nn

from ee_scale.config.checks import check_batch
from ee_scale.config.groups import BatchConfig, OptimConfig
from ee_scale.engine.clipping import CLIP_KEY
from ee_scale.grid import Grid

EngineType = TypeVar("EngineType", bound=PipelineEngine)


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that leaves out the groups whose `left_out` (an fp32 scalar on their device) is 1, without reading it here.

    Their weights, moments and step counts stay as they are. It is what torch's fused kernel does for a gradient scaler
    that has found an infinite number.
    """

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One update of the other groups."""
        groups = self.param_groups
        try:
            for group in groups:
                self.param_groups, self.found_inf = [group], group.get("left_out")
                super().step(closure)
        finally:
            self.param_groups, self.found_inf = groups, None


def guarded_adamw(groups: dict[int, list[nn.Parameter]], optim: OptimConfig) -> GuardedAdamW:
    """AdamW over clip groups, each as two param groups: matrices, and vectors (norms, biases) without weight decay.

    The learning rate is set from outside at every step.
    """
    param_groups = []
    for key, parameters in groups.items():
        count_in_norms(parameters)
        for decay, members in (
            (optim.weight_decay, [p for p in parameters if p.ndim > 1]),
            (0.0, [p for p in parameters if p.ndim <= 1]),
        ):
            if members:
                param_groups.append({"params": members, "weight_decay": decay, CLIP_KEY: key})
    return GuardedAdamW(param_groups, lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps, fused=True)


class StageMpu:
    """DeepSpeed's view of the groups, with 'model parallel' meaning the tensor group alone.

    With its own view (tensor x pipeline), the norm and the overflow check of every step would wait for all stages.
    """

    def __init__(self, grid: PipelineParallelGrid):
        self._grid = grid

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name.replace("get_model_parallel", "get_slice_parallel"))


def build_engine(
    cls: type[EngineType],
    stage: nn.Module,
    grid: Grid,
    optimizer: torch.optim.Optimizer | None,
    train: BatchConfig,
    bf16: bool,
) -> EngineType:
    """Wrap this rank's trainable parameters; None: this stage trains nothing. All ranks call it."""
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_tells_news)
    micro_batch_size = train.micro_batch_size
    num_micro_batches = check_batch(train.global_batch_size, micro_batch_size, grid.layout.dp)
    config = deepspeed_config(grid, micro_batch_size, num_micro_batches, bf16, trains=optimizer is not None)
    with contextlib.redirect_stdout(io.StringIO()), _kept_peak():  # DeepSpeed prints its settings
        # One "layer" per stage; a rank registers its own stage only.
        pipe = PipelineModule([stage] * grid.layout.pp, topology=grid.layout.topology(), partition_method="uniform")
        mpu = StageMpu(pipe.mpu())
        return cls(
            args=None,
            model=pipe,
            optimizer=optimizer,
            mpu=mpu,
            config=config,
            config_class=DeepSpeedConfig(config, mpu),
        )


@contextlib.contextmanager
def _kept_peak() -> Iterator[None]:
    """DeepSpeed prints the peak of the device's memory on the way, and forgets it: what the run tells of it would lack
    what building takes."""
    see_memory_usage = bf16_optimizer.see_memory_usage
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    try:
        yield
    finally:
        bf16_optimizer.see_memory_usage = see_memory_usage


def _tells_news(record: logging.LogRecord) -> bool:
    return "untested optimizer" not in record.getMessage()  # AdamW by another name


def deepspeed_config(
    grid: Grid, micro_batch_size: int, num_micro_batches: int, bf16: bool, *, trains: bool
) -> dict[str, Any]:
    """DeepSpeed's configuration. Gradient clipping is ours (`engine.clipping`)."""
    bf16 = bf16 and trains
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": num_micro_batches,
        "train_batch_size": micro_batch_size * num_micro_batches * grid.layout.dp,
        "zero_optimization": {
            "stage": 1 if trains else 0,
            "contiguous_gradients": False,  # would allocate a full bucket at every step
            "overlap_comm": False,
            "reduce_bucket_size": 50_000_000,
        },
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0, over all parameters of the stage together
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16, "immediate_grad_update": bf16},  # chunks of logits add up in fp32
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
    }


def count_in_norms(parameters: list[nn.Parameter]) -> None:
    """DeepSpeed's own norm serves as its NaN check only; on a tensor rank > 0 it fails when nothing counts."""
    for parameter in parameters:
        parameter.model_parallel = True
