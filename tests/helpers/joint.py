"""Joint training of backbone and exits: plain autograd on transformers' model in one process, and the grids."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.backbone.shard import model_tensors
from ee_scale.backbone.stages import plan_stages
from ee_scale.config.groups import OptimConfig
from ee_scale.config.tune import BackboneConfig, ExitsConfig, TrainConfig, TuneConfig
from ee_scale.engine import two_way
from ee_scale.engine.joint import FINAL, JointPipelineEngine
from ee_scale.exits.joint import JointStage, output_copies
from ee_scale.exits.stage import build_stage, gather_whole, load_stage, local_slice
from ee_scale.grid import Grid
from helpers.models import VOCAB, load_whole, some_tokens, spec_of
from helpers.reference import BATCH, micro_batches, on_shortlist, soft_cap, start_noise

SEED = 3


@dataclass(frozen=True)
class JointJob:
    """One joint training job."""

    family: str
    kind: str
    head: str
    mode: str
    exit_layers: tuple[int, ...] = (1, 2, 4)
    tied: bool = False
    targets: tuple[str, ...] = ("attention", "mlp")
    checkpointing: bool = False
    confidence: bool = False
    loss_weights: tuple[float, ...] = (0.3, 0.7, 1.3)
    final_weight: float = 0.8
    rank: int = 4
    clip_grad: float = 0.5
    steps: int = 4
    micro_batches: int = 4  # per step, over all replicas

    @property
    def name(self) -> str:
        extras = ("tied" if self.tied else "", "checkpointing" if self.checkpointing else "")
        return "-".join(part for part in (self.family, self.kind, self.head, self.mode, *extras) if part)

    @property
    def optimizer(self) -> OptimConfig:
        return OptimConfig(lr=1e-3, betas=[0.9, 0.95], eps=1e-4, weight_decay=0.1, clip_grad=self.clip_grad)


@dataclass
class JointRecord:
    """losses[step][key]; norms[step]; gradients of the first step and last parameters by name in files."""

    losses: list[dict[Any, float]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)


class LowRank(nn.Module):
    """weight -> weight + up down."""

    def __init__(self, down: torch.Tensor, up: torch.Tensor):
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.up @ self.down


def noisy(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The start value: what the model or the rules say, and noise, so that no gradient is zero."""
    return tensor + 0.3 * start_noise(name, tuple(tensor.shape))


class Reference:
    """transformers' model with exits on top, all in one graph."""

    def __init__(self, folder: Path, job: JointJob, start: dict[str, torch.Tensor]):
        """`start`: start values of adapters and low-rank heads, by name in files."""
        self.job, self.model = job, load_whole(folder)
        self.named: dict[str, nn.Parameter] = {}
        self.exits = {k: self._exit(k, start) for k in job.exit_layers}
        if job.mode == "full":
            self.model.requires_grad_(True)
            self.named |= dict(self.model.named_parameters())
        else:
            for name in sorted({name.rsplit(".lora_", 1)[0] for name in start if ".lora_" in name}):
                pair = LowRank(start[f"{name}.lora_A.weight"].clone(), start[f"{name}.lora_B.weight"].clone())
                parametrize.register_parametrization(self.model.get_submodule(name), "weight", pair)
                self.named |= {f"{name}.lora_A.weight": pair.down, f"{name}.lora_B.weight": pair.up}

    def _exit(self, k: int, start: dict[str, torch.Tensor]) -> nn.Module:
        layers, norm = self.model.model.layers, self.model.model.norm
        modules = nn.ModuleDict()
        if self.job.kind == "mlp":
            modules["mlp"] = copied(layers[k - 1].mlp)
        if self.job.kind == "layer":
            modules["layer"] = copied(layers[-1])
        if self.job.kind != "embedding":
            modules["norm"] = copied(norm)
        if self.job.head in ("full", "shortlist"):
            modules["head"] = copied(self.model.lm_head)
        if self.job.head == "shortlist":
            modules["head"].weight = nn.Parameter(self.model.lm_head.weight[some_tokens()].clone())
        named = {f"exit_heads.{k}.{name}": p for name, p in modules.named_parameters()}
        if self.job.head == "low_rank":
            for part in ("down", "up"):
                name = f"exit_heads.{k}.head.{part}.weight"
                named[name] = nn.Parameter(start[name].clone())
        with torch.no_grad():
            for name, parameter in named.items():
                if ".head.down" not in name and ".head.up" not in name:
                    parameter.copy_(noisy(name, parameter))
        self.named |= named
        return modules.requires_grad_(True)

    def losses(self, batch: dict[str, torch.Tensor]) -> dict[Any, tuple[torch.Tensor, float]]:
        """key -> (what is differentiated, mean cross entropy)."""
        states, calls, inputs, handles = [], [], [], []

        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            states.append(args[0])
            calls.append({name: value for name, value in kwargs.items() if name != "use_cache"})

        norms = {"gemma2": "pre_feedforward_layernorm"}
        mlp_norm = norms.get(self.job.family, "post_attention_layernorm")
        for layer in self.model.model.layers:
            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(getattr(layer, mlp_norm).register_forward_hook(lambda m, a, out: inputs.append((a[0], out))))
        handles.append(self.model.model.norm.register_forward_pre_hook(lambda module, args: states.append(args[0])))
        final = self.model(batch["tokens"], use_cache=False).logits
        for handle in handles:
            handle.remove()
        found = {k: self._loss(self._logits(k, states, calls, inputs), batch, True) for k in self.job.exit_layers}
        return found | {FINAL: self._loss(final, batch, False)}

    def _logits(self, k: int, states: list, calls: list, inputs: list) -> torch.Tensor:
        modules, hidden = self.exits[k], states[k]
        if "mlp" in modules:
            residual, mlp_input = inputs[k - 1]
            update = modules["mlp"](mlp_input)
            if self.job.family == "gemma2":
                update = self.model.model.layers[k - 1].post_feedforward_layernorm(update)
            hidden = residual + update
        if "layer" in modules:
            hidden = modules["layer"](hidden, **calls[-1])
        if "norm" in modules:
            hidden = modules["norm"](hidden)
        if "head" in modules:
            logits = modules["head"](hidden)
        else:
            logits = self.model.lm_head(hidden)
            if self.job.head == "low_rank":
                down, up = (self.named[f"exit_heads.{k}.head.{part}.weight"] for part in ("down", "up"))
                logits = logits + hidden @ down.t() @ up.t()
        return soft_cap(logits, self.model.config)

    def _loss(self, logits: torch.Tensor, batch: dict[str, torch.Tensor], early: bool) -> tuple[torch.Tensor, float]:
        short = early and self.job.head == "shortlist"
        labels, mask = on_shortlist(batch) if short else (batch["labels"], batch["loss_mask"])
        ce = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        learned, trust = (mask > 0).float(), torch.ones_like(mask)
        if self.job.confidence and early:
            trust = logits.detach().softmax(-1).max(-1).values
        loss = (ce * mask * trust).sum() / (learned * trust).sum()
        return loss, ((ce.detach() * mask).sum() / learned.sum()).item()


def copied(module: nn.Module) -> nn.Module:
    """A copy with leaves of its own."""
    return copy.deepcopy(module)


def train_reference(folder: Path, job: JointJob, start: dict[str, torch.Tensor]) -> JointRecord:
    """Run the job in one process."""
    reference, record, settings = Reference(folder, job, start), JointRecord(), job.optimizer
    parameters = list(reference.named.values())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)
    weights = dict(zip(job.exit_layers, job.loss_weights, strict=True)) | {FINAL: job.final_weight}
    for step in range(job.steps):
        optimizer.zero_grad()
        losses = dict.fromkeys(weights, 0.0)
        for batch in micro_batches(step, job.micro_batches):
            found = reference.losses(batch)
            total = sum(weights[key] * loss for key, (loss, _) in found.items())
            (total / job.micro_batches).backward()
            losses = {key: losses[key] + found[key][1] / job.micro_batches for key in losses}
        if step == 0:
            record.gradients = {name: p.grad.clone() for name, p in reference.named.items()}
        norm = torch.cat([p.grad.flatten() for p in parameters]).double().norm().item()
        for parameter in parameters:
            parameter.grad.mul_(min(1.0, job.clip_grad / (norm + 1e-6)))
        optimizer.step()
        record.losses.append(losses)
        record.norms.append(norm)
    record.parameters = {name: p.detach().clone() for name, p in reference.named.items()}
    return record


def build_joint_engine(folder: Path, job: JointJob, grid: Grid, *, bf16: bool = False) -> JointPipelineEngine:
    """This rank's engine at the start values that the reference uses too."""
    config = ModelFolder(folder).decoder_config
    spec = spec_of(config, job.exit_layers, job.kind, job.head, job.rank)
    plan = plan_stages(config.num_hidden_layers, grid.layout.pp, job.exit_layers, whole_model=True)
    dtype = torch.bfloat16 if bf16 else torch.float32
    stage = build_stage(config, plan, spec, grid, dtype, own_logits=True, cls=JointStage)
    load_stage(stage, model_tensors(folder, config), grid, init="copy", seed=0)
    backbone = BackboneConfig(job.mode, job.rank, list(job.targets), job.final_weight, job.checkpointing)
    stage.train_backbone(backbone, output_copies(plan, spec, config.tie_word_embeddings), grid, SEED)
    for name, parameter in file_names(stage).items():
        if name.startswith("exit_heads.") or ".lora_B." in name:
            whole = gather_whole(name, parameter, parameter.detach(), rows_of(name, stage), grid)
            with torch.no_grad():
                parameter.copy_(local_slice(noisy(name, whole), parameter, grid.tp_rank))
    config = TuneConfig(
        exits=ExitsConfig(loss_chunk_tokens=14, confidence_weighting=job.confidence),
        backbone=backbone,
        optim=job.optimizer,
        train=TrainConfig(micro_batch_size=BATCH, global_batch_size=BATCH * job.micro_batches, spike_factor=0.0),
    )
    engine = JointPipelineEngine.build(stage, grid, config)
    engine.loss_weights = dict(zip(job.exit_layers, job.loss_weights, strict=True))
    return engine


def rows_of(name: str, stage: JointStage) -> int:
    """Of a matrix over tokens, by its name in files."""
    return stage.spec.scored(VOCAB) if name.startswith("exit_heads.") else VOCAB


def file_names(stage: JointStage) -> dict[str, nn.Parameter]:
    """Every trainable parameter of this rank by its name in files."""
    return {f"exit_heads.{name}": p for name, p in stage.exit_heads.named_parameters()} | stage.trained


def train_on_grid(engine: JointPipelineEngine, job: JointJob, grid: Grid) -> JointRecord:
    """Run the job. Losses are this replica's and stage's; tensors are whole."""
    record, named = JointRecord(), file_names(engine.stage)

    def whole(read: Any) -> dict[str, torch.Tensor]:
        found = {}
        for name, parameter in named.items():
            part = read(parameter).detach().float().view(parameter.shape)
            found[name] = gather_whole(name, parameter, part, rows_of(name, engine.stage), grid).clone()
        return found

    def clip_and_keep(*args: Any, **options: Any) -> Any:
        if not record.gradients:
            record.gradients = whole(safe_get_full_grad)
        return clip_groups(*args, **options)

    clip_groups = two_way.clip_groups
    each = job.micro_batches // grid.layout.dp
    with mock.patch.object(two_way, "clip_groups", clip_and_keep):
        for step in range(job.steps):
            batches = micro_batches(step, job.micro_batches)[grid.dp_rank * each : (grid.dp_rank + 1) * each]
            losses = engine.train_step(iter(batches))
            record.losses.append({key: value[0].item() for key, value in losses.items()})
            record.norms.append(engine.grad_norm.item())
    record.parameters = whole(safe_get_full_fp32_param)
    for name, parameter in named.items():
        held = gather_whole(name, parameter, parameter.detach(), rows_of(name, engine.stage), grid)
        assert torch.equal(held.float(), record.parameters[name]) or parameter.dtype != torch.float32, name
    return record
