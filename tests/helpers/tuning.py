"""Drive ee_scale's engine on a grid through one `Job`, and put the ranks' parts together again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.backbone.parallel import cut_dim
from ee_scale.backbone.shard import BackboneStage, model_tensors
from ee_scale.backbone.stages import StagePlan, plan_stages
from ee_scale.config.groups import OptimConfig
from ee_scale.config.tune import ExitsConfig, TrainConfig, TuneConfig
from ee_scale.engine import frozen
from ee_scale.engine.frozen import FrozenPipelineEngine
from ee_scale.exits.stage import TuningStage, build_stage, load_stage
from ee_scale.families.build import meta_model
from ee_scale.grid import Grid
from helpers.models import VOCAB, spec_of
from helpers.reference import BATCH, Job, Record, micro_batches, start_noise

Shards = dict[str, tuple[int | None, torch.Tensor]]  # parameter -> (dimension that is cut, this rank's part)


def plan_of(folder: Path, job: Job, pp: int) -> StagePlan:
    """The cut that the job runs on; a teacher needs the whole model."""
    layers = ModelFolder(folder).decoder_config.num_hidden_layers
    return plan_stages(layers, pp, job.exit_layers, whole_model=job.kl_weight > 0)


def build_engine(
    folder: Path, job: Job, grid: Grid, *, plan: StagePlan | None = None, bf16: bool = False
) -> FrozenPipelineEngine:
    """This rank's engine, at the start values that the reference uses too."""
    config = ModelFolder(folder).decoder_config
    spec = spec_of(config, job.exit_layers, job.kind, job.head, job.rank)
    dtype = torch.bfloat16 if bf16 else torch.float32
    plan = plan or plan_of(folder, job, grid.layout.pp)
    stage = build_stage(config, plan, spec, grid, dtype, teacher=job.kl_weight > 0)
    load_stage(stage, model_tensors(folder, config), grid, init="copy", seed=0)
    add_start_noise(stage, grid)
    exits = ExitsConfig(
        loss_chunk_tokens=14,  # of 24 tokens: uneven chunks
        confidence_weighting=job.confidence,
        kl_weight=job.kl_weight,
        kl_temperature=job.kl_temperature,
    )
    optim = OptimConfig(
        lr=job.lr, betas=list(job.betas), eps=job.eps, weight_decay=job.weight_decay, clip_grad=job.clip_grad
    )
    train = TrainConfig(micro_batch_size=BATCH, global_batch_size=BATCH * job.micro_batches, spike_factor=0.0)
    engine = FrozenPipelineEngine.build(stage, grid, TuneConfig(exits=exits, optim=optim, train=train))
    engine.loss_weights = {
        k: weight for k, weight in zip(job.exit_layers, job.loss_weights, strict=True) if k in stage.exit_layers
    }
    return engine


@torch.no_grad()
def add_start_noise(stage: TuningStage, grid: Grid) -> None:
    """The reference's `start_noise`, cut for this rank."""
    for name, parameter in stage.exit_heads.named_parameters():
        low_rank = ".head.down." in name or ".head.up." in name
        dim = cut_dim(parameter)
        shape = list(parameter.shape)
        if dim is not None:
            shape[dim] *= grid.layout.tp
        if name.endswith(("head.weight", "head.up.weight")):
            shape[0] = stage.spec.scored(VOCAB)
        noise = start_noise(name, tuple(shape))
        if dim is not None:
            step = parameter.shape[dim]
            missing = step * grid.layout.tp - shape[dim]
            if missing:
                noise = torch.cat([noise, noise.new_zeros(missing, *noise.shape[1:])])
            noise = noise.narrow(dim, grid.tp_rank * step, step)
        parameter.copy_(noise if low_rank else parameter + noise)


def my_micro_batches(step: int, job: Job, grid: Grid) -> Iterator[dict[str, torch.Tensor]]:
    """This replica's share of a step."""
    each = job.micro_batches // grid.layout.dp
    return iter(micro_batches(step, job.micro_batches)[grid.dp_rank * each : (grid.dp_rank + 1) * each])


def train_on_grid(engine: FrozenPipelineEngine, job: Job, grid: Grid) -> Record:
    """Run the job. Losses are this replica's; tensors are `Shards`, on the first replica only."""
    record = Record()

    def clip_and_keep(*args: Any, **options: Any) -> dict[int, torch.Tensor]:
        if not record.gradients:
            record.gradients = shards(engine.stage, safe_get_full_grad)
        return clip_groups(*args, **options)

    clip_groups = frozen.clip_groups
    with mock.patch.object(frozen, "clip_groups", clip_and_keep):
        for step in range(job.steps):
            losses = engine.train_step(my_micro_batches(step, job, grid))
            record.losses.append({k: value.tolist() for k, value in losses.items()})
            record.norms.append({k: norm.item() for k, norm in engine.grad_norms.items()})
    record.parameters = shards(engine.stage, safe_get_full_fp32_param)
    for name, (_, tensor) in record.parameters.items():
        # What the next forward pass reads is what the optimizer holds, on every replica.
        assert torch.equal(engine.stage.exit_heads.get_parameter(name), tensor), name
    return record


def shards(stage: TuningStage, read: Any) -> Shards:
    """`read` of every trainable parameter of this rank (a collective of the replicas under ZeRO-1)."""
    return {
        name: (cut_dim(parameter), read(parameter).detach().float().clone().view(parameter.shape))
        for name, parameter in stage.exit_heads.named_parameters()
    }


def join_shards(parts: list[Shards], whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors from the shards of the tensor ranks, in order; `whole` has the true shapes.

    Copies on the tensor ranks must be the same bits and padded rows must be zero, or the ranks drift apart.
    """
    joined = {}
    for name, (dim, first) in parts[0].items():
        tensors = [part[name][1] for part in parts]
        if dim is None:
            assert all(torch.equal(first, other) for other in tensors), f"{name} differs between tensor ranks"
            joined[name] = first
        else:
            tensor = torch.cat(tensors, dim)
            size = whole[name].shape[dim]
            assert not tensor.narrow(dim, size, tensor.shape[dim] - size).any(), f"padding of {name} is not zero"
            joined[name] = tensor.narrow(dim, 0, size)
    return joined


def stage_backbone(
    folder: Path, config: Any, plan: StagePlan, grid: Grid, dtype: torch.dtype, **kwargs: Any
) -> BackboneStage:
    """Build and load this rank's part in one go (no exits)."""
    stage = BackboneStage(meta_model(config, dtype), plan, grid, dtype, **kwargs)
    stage.load(model_tensors(folder, config), grid)
    return stage


def pipeline_logits(folder: Path, grid: Grid, ids: torch.Tensor) -> torch.Tensor | None:
    """Whole logits on the last stage, None on the others."""
    config = ModelFolder(folder).decoder_config
    plan = plan_stages(config.num_hidden_layers, grid.layout.pp, [1], whole_model=True)
    last = grid.stage == grid.layout.pp - 1
    backbone = stage_backbone(folder, config, plan, grid, torch.float32, final_norm=True, lm_head=last)
    x = ids
    if grid.stage > 0:
        x = torch.empty(*ids.shape, config.hidden_size)
        dist.recv(x, grid.layout.rank(grid.stage - 1, 0, grid.tp_rank))
    hidden = backbone(x)
    if not last:
        dist.send(hidden.contiguous(), grid.layout.rank(grid.stage + 1, 0, grid.tp_rank))
        return None
    shard = backbone.lm_head(hidden)
    shards = [torch.empty_like(shard) for _ in range(grid.layout.tp)]
    dist.all_gather(shards, shard.contiguous(), group=grid.tp_group)
    logits = torch.cat(shards, dim=-1)[..., : config.vocab_size]
    return backbone.family.cap(logits, config)
