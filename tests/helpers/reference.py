"""Exit tuning in one process with plain autograd on transformers' own model: what the grids are compared with.

Written against the paper's definitions and transformers alone; nothing of ee_scale's math is used.
"""

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from helpers.models import VOCAB, load_whole, some_tokens

BATCH, SEQUENCE = 2, 12  # of a micro-batch
STEPS = 10  # a rounding error grows from step to step; a wrong one shows at the second


@dataclass(frozen=True)
class Job:
    """One training job, as the reference and every grid run it."""

    family: str
    kind: str
    head: str
    exit_layers: tuple[int, ...] = (1, 2, 4)
    tied: bool = False
    rank: int = 4
    kl_weight: float = 0.0
    kl_temperature: float = 1.0
    confidence: bool = False
    loss_weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    clip_grad: float = 0.05
    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    steps: int = STEPS
    micro_batches: int = 2  # per step, over all replicas

    @property
    def name(self) -> str:
        extras = (f"kl{self.kl_temperature}" if self.kl_weight else "", "confidence" if self.confidence else "")
        short = "" if self.steps == STEPS else f"{self.steps}steps"
        return "-".join(part for part in (self.family, self.kind, self.head, *extras, short) if part)


@dataclass
class Record:
    """What a job did: losses[step][exit] = (cross entropy, KL); norms[step][exit]; first gradients; last parameters."""

    losses: list[dict[int, list[float]]] = field(default_factory=list)
    norms: list[dict[int, float]] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    start: dict[str, torch.Tensor] = field(default_factory=dict)


def micro_batches(step: int, count: int) -> list[dict[str, torch.Tensor]]:
    """The micro-batches of a step; their masks leave out different numbers of tokens and have weights of their own."""
    generator = torch.Generator().manual_seed(1000 + step)
    found = []
    for number in range(count):
        ids = torch.randint(0, VOCAB, (BATCH, SEQUENCE + 1), generator=generator)
        mask = (torch.rand(BATCH, SEQUENCE, generator=generator) > 0.25).float() * (0.5 + number)
        found.append({"tokens": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": mask})
    return found


def start_noise(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """What is added to a copied parameter (or is a low-rank factor), so that no gradient is zero at the start."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense_mlp(mlp: nn.Module, config: Any) -> nn.Module:
    """What an exit copies of an MLP: of a mixture of experts the shared one, or the first ones side by side."""
    if not hasattr(mlp, "experts"):
        return mlp
    if hasattr(mlp, "shared_expert"):
        return mlp.shared_expert
    k, units = config.num_experts_per_tok, mlp.experts.down_proj.shape[-1]
    dense = LlamaMLP(LlamaConfig(hidden_size=config.hidden_size, intermediate_size=k * units))
    with torch.no_grad():
        for expert in range(k):
            mine, both = slice(expert * units, (expert + 1) * units), mlp.experts.gate_up_proj[expert]
            dense.gate_proj.weight[mine] = both[:units]
            dense.up_proj.weight[mine] = both[units:]
            dense.down_proj.weight[:, mine] = mlp.experts.down_proj[expert] / k
    return dense


class ReferenceExit(nn.Module):
    """One exit made of copies of transformers' modules, with the parameter names of the exported files."""

    def __init__(self, model: nn.Module, job: Job, k: int):
        super().__init__()
        layers = model.model.layers
        # The sibling of an MLP is a copy of its whole layer of which the MLP alone trains.
        self.frozen = [copy.deepcopy(layers[k - 1])]
        if job.kind == "mlp":
            self.mlp = self.frozen[0].mlp = dense_mlp(self.frozen[0].mlp, model.config)
        if job.kind == "layer":
            self.layer = copy.deepcopy(layers[-1])
        if job.kind != "embedding":
            self.norm = copy.deepcopy(model.model.norm)
        if job.head == "low_rank":
            self.head = nn.Module()
            self.head.down = nn.Linear(model.config.hidden_size, job.rank, bias=False)
            self.head.up = nn.Linear(job.rank, VOCAB, bias=False)
        elif job.head in ("full", "shortlist"):
            self.head = copy.deepcopy(model.lm_head)
        if job.head == "shortlist":
            self.head.weight = nn.Parameter(model.lm_head.weight[some_tokens()].clone())
        self.requires_grad_(True)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                noise = start_noise(f"{k}.{name}", tuple(parameter.shape))
                parameter.copy_(noise if job.head == "low_rank" and name.startswith("head.") else parameter + noise)

    def forward(self, states: list[torch.Tensor], calls: list[dict], k: int, model: nn.Module) -> torch.Tensor:
        """states[k]: hidden state after k layers; calls[i]: keyword arguments of layer i's own call."""
        hidden = states[k]
        if hasattr(self, "mlp"):
            hidden = self.frozen[0](states[k - 1], **calls[k - 1])
        if hasattr(self, "layer"):
            hidden = self.layer(hidden, **calls[-1])
        if hasattr(self, "norm"):
            hidden = self.norm(hidden)
        if not hasattr(self, "head"):
            logits = model.lm_head(hidden)
        elif hasattr(self.head, "down"):
            logits = model.lm_head(hidden) + self.head.up(self.head.down(hidden))
        else:
            logits = self.head(hidden)
        return soft_cap(logits, model.config)


def soft_cap(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """Gemma-2's cap on the final logits."""
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def backbone_states(model: nn.Module, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[dict], torch.Tensor]:
    """(hidden state after 0..L layers, keyword arguments of each layer's call, final logits)."""
    states, calls, handles = [], [], []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])
        calls.append({name: value for name, value in kwargs.items() if name not in ("hidden_states", "use_cache")})

    for layer in model.model.layers:
        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
    handles.append(model.model.norm.register_forward_pre_hook(lambda module, args: states.append(args[0])))
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return states, calls, logits


def exit_loss(
    job: Job, logits: torch.Tensor, final: torch.Tensor, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, list[float]]:
    """(loss to differentiate, [mean cross entropy, mean KL]) of one exit on one micro-batch, dense."""
    labels, mask = on_shortlist(batch) if job.head == "shortlist" else (batch["labels"], batch["loss_mask"])
    learned = (mask > 0).float()
    ce = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    per_token, kl = ce, torch.zeros_like(ce)
    if job.kl_weight:
        final = final[..., some_tokens()] if job.head == "shortlist" else final
        t = job.kl_temperature
        student, teacher = functional.log_softmax(logits / t, -1), functional.log_softmax(final / t, -1)
        kl = functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1) * t**2
        per_token = ce + job.kl_weight * kl
    trust = logits.detach().softmax(-1).max(-1).values if job.confidence else torch.ones_like(mask)
    means = [((value * mask).sum() / learned.sum()).item() for value in (ce.detach(), kl.detach())]
    return (per_token * mask * trust).sum() / (learned * trust).sum(), means


def on_shortlist(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(labels as places in the shortlist, the mask without those that are not in it)."""
    same = batch["labels"][..., None] == torch.tensor(some_tokens())
    return same.int().argmax(-1), batch["loss_mask"] * same.any(-1)


def train(folder: Path, job: Job, on_step: Callable[[int], None] = lambda step: None) -> Record:
    """Run the job and record it."""
    model = load_whole(folder)
    exits = nn.ModuleDict({str(k): ReferenceExit(model, job, k) for k in job.exit_layers})
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in exits.parameters() if p.ndim > 1], "weight_decay": job.weight_decay},
            {"params": [p for p in exits.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=job.lr,
        betas=job.betas,
        eps=job.eps,
    )
    record = Record(start={name: p.detach().clone() for name, p in exits.named_parameters()})
    for step in range(job.steps):
        optimizer.zero_grad()
        losses = {k: [0.0, 0.0] for k in job.exit_layers}
        for batch in micro_batches(step, job.micro_batches):
            states, calls, final = backbone_states(model, batch["tokens"])
            for k, weight in zip(job.exit_layers, job.loss_weights, strict=True):
                loss, means = exit_loss(job, exits[str(k)](states, calls, k, model), final, batch)
                (weight * loss / job.micro_batches).backward()
                losses[k] = [total + mean / job.micro_batches for total, mean in zip(losses[k], means, strict=True)]
        if step == 0:
            record.gradients = {name: p.grad.clone() for name, p in exits.named_parameters()}
        record.losses.append(losses)
        record.norms.append({k: clip(exits[str(k)], job.clip_grad) for k in job.exit_layers})
        optimizer.step()
        on_step(step)
    record.parameters = {name: p.detach().clone() for name, p in exits.named_parameters()}
    return record


def clip(exit_head: nn.Module, max_norm: float) -> float:
    """Scale an exit's gradient by min(1, max / (norm + 1e-6)), unless max is 0; returns the norm before."""
    norm = torch.cat([p.grad.flatten() for p in exit_head.parameters()]).norm()
    factor = min(1.0, max_norm / (norm.item() + 1e-6)) if max_norm else 1.0
    for parameter in exit_head.parameters():
        parameter.grad.mul_(factor)
    return norm.item()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of the expected tensor."""
    return ((found - expected).double().norm() / expected.double().norm().clamp(min=1e-30)).item()
