"""What the benchmarks share: a random model of a given size, the engine on it, and the same in plain torch.

Imported in child processes only (see `_children.py`): DeepSpeed picks its device when it is imported.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _bench_models import llama, write_model
from _children import Job
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.backbone.shard import model_tensors
from ee_scale.backbone.stages import plan_stages
from ee_scale.config.tune import ExitsConfig, TrainConfig, TuneConfig
from ee_scale.engine.frozen import FrozenPipelineEngine
from ee_scale.exits.placement import exit_spec
from ee_scale.exits.stage import build_stage, load_stage
from ee_scale.grid import Grid
from ee_scale.modeling.heads import ExitSpec, build_exit_heads
from ee_scale.modeling.kinds import Tap

MicroBatches = list[dict[str, torch.Tensor]]


def dtype_of(job: Job) -> torch.dtype:
    """bf16 where it is fast."""
    return torch.bfloat16 if job.device == "cuda" else torch.float32


def save_model(job: Job) -> None:
    """Write the random model of a job to its folder."""
    heads = max(1, job.hidden // 64)
    sizes = {"intermediate_size": job.hidden * 11 // 4, "num_key_value_heads": heads}
    config = llama(job.layers, job.hidden, job.vocab, max_position_embeddings=job.sequence, **sizes)
    write_model(Path(job.folder), config, job.device, dtype_of(job))


def make_batch(job: Job, device: torch.device) -> MicroBatches:
    """Random tokens, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    shape = (job.micro_batches, job.micro_batch, job.sequence + 1)
    tokens = torch.randint(0, job.vocab, shape, generator=generator).to(device)
    mask = torch.ones(job.micro_batch, job.sequence, device=device)
    return [{"tokens": t[:, :-1].contiguous(), "labels": t[:, 1:].contiguous(), "loss_mask": mask} for t in tokens]


def build_engine(job: Job, grid: Grid, kind: type[FrozenPipelineEngine] = FrozenPipelineEngine) -> Any:
    """The engine as `ee-scale tune` builds it."""
    config = ModelFolder(Path(job.folder)).decoder_config
    spec = exit_spec(config, job.exits, "mlp", job.head, 64)
    plan = plan_stages(job.layers, job.stages, spec.layers)
    stage = build_stage(config, plan, spec, grid, dtype_of(job))
    load_stage(stage, model_tensors(Path(job.folder), config), grid, init="copy", seed=0)
    batch = job.micro_batch * job.micro_batches * grid.layout.dp
    train = TrainConfig(micro_batch_size=job.micro_batch, global_batch_size=batch, spike_factor=0.0)
    return kind.build(stage, grid, TuneConfig(exits=ExitsConfig(loss_chunk_tokens=job.chunk_tokens), train=train))


def load_reference(job: Job, device: torch.device) -> tuple[nn.Module, nn.ModuleDict]:
    """The same model and exits in plain transformers and torch: nothing of Megatron or DeepSpeed."""
    model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=dtype_of(job)).to(device).eval()
    spec = ExitSpec(job.exits, "mlp", job.head, 64)
    heads = build_exit_heads(spec, model.model.layers, model.model.norm, job.vocab).to(device, dtype_of(job))
    for head in heads.values():
        if job.head == "low_rank":
            nn.init.zeros_(head.head.up.weight)
        else:
            head.head.weight.data.copy_(model.lm_head.weight)
    model.requires_grad_(False)
    return model, heads.requires_grad_(True)


def exit_loss(head: nn.Module, tap: Tap, lm_head: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of one exit, all logits at once."""
    logits = head.logits(head.hidden(tap), lm_head)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, if it is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
