"""A supernet on a grid against one process of plain transformers models with plain autograd."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import nn
from torch.func import functional_call
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig

from ee_scale.backbone.digest import named_generator
from ee_scale.backbone.loading import read_config
from ee_scale.backbone.stages import plan_stages
from ee_scale.config.groups import BatchConfig, OptimConfig
from ee_scale.config.supernet import DistillConfig, FactorsConfig, SamplingConfig, SupernetConfig
from ee_scale.elastic.architecture import ElasticMap
from ee_scale.elastic.distill import LIVE, FeatureLoss
from ee_scale.elastic.extract import subnet_config
from ee_scale.elastic.factors import FactorPlan, FactorSet
from ee_scale.elastic.order import UnitOrder
from ee_scale.elastic.sampling import FULL, draw_stream
from ee_scale.elastic.stage import ElasticStage, base_tensors
from ee_scale.elastic.subnet import ElasticShape, SearchSpace, SubnetSpec, drop_order
from ee_scale.elastic.teacher import TeacherCache
from ee_scale.engine import two_way as engine_module
from ee_scale.engine.supernet import SupernetEngine
from ee_scale.grid import Grid
from helpers.models import VOCAB, write_model

ROWS, LENGTH, MICRO_BATCHES, LABELS, LAYERS = 2, 10, 2, 5, 4
SAMPLES = 6  # tokens that are kept of a teacher
PADDING = 1  # id of a token
FUSED = {"Wqkv": ("query", "key", "value"), "Wi": ("input", "gate")}  # ModernBERT's, one below the other


@dataclass(frozen=True)
class SupernetJob:
    """One case: a family, two phases (teacher, then all axes), and what is learned from."""

    family: str = "llama"
    rank: int = 3
    targets: tuple[str, ...] = ("attention", "mlp", "embeddings", "head")
    teacher: str = "frozen"
    kl_weight: float = 0.6
    feature_weight: float = 0.5
    temperature: float = 2.0
    gamma: float = 0.7
    clip_grad: float = 0.5
    tied: bool = False
    exits: tuple[int, ...] = ()
    steps: tuple[int, ...] = (1, 2)
    cache: int | None = None  # texts that fit; each comes in every step
    full_every: int = 1
    palette_share: float = 0.0

    @property
    def task(self) -> str:
        return "causal_lm" if self.family not in OF_ENCODERS else "classify"


# Of ModernBERT a window that is shorter than the padding, and of the four layers the first and the last see everything.
OF_ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"pad_token_id": PADDING},
    "xlm-roberta": {"pad_token_id": PADDING},
    "modernbert": {"pad_token_id": PADDING, "local_attention": 4},
}


def inputs_of(family: str) -> tuple[str, ...]:
    """What a model reads beside tokens, of what a batch has."""
    return ("attention_mask",) if family == "modernbert" else ("attention_mask", "token_type_ids")


def encoder_config(family: str, **changes: Any) -> PreTrainedConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    sizes |= {"vocab_size": VOCAB, "max_position_embeddings": 64, "num_labels": LABELS}
    return CONFIG_MAPPING[family](**{**sizes, **OF_ENCODERS[family], **changes})


def write_base(folder: Path, job: SupernetJob, **changes: Any) -> Path:
    """A random base model; vectors are random too."""
    if job.task == "causal_lm":
        return write_model(folder, job.family, num_hidden_layers=LAYERS, tie_word_embeddings=job.tied)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(encoder_config(job.family, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
            else:
                nn.init.normal_(parameter, 0.0 if name.endswith("bias") else 1.0, 0.2)
    model.save_pretrained(folder)
    return folder


def scrambled_order(shape: ElasticShape) -> UnitOrder:
    """An order that is nobody's own."""
    generator = torch.Generator().manual_seed(5)
    rows = lambda size: torch.stack([torch.randperm(size, generator=generator) for _ in range(shape.num_layers)])  # noqa: E731
    drops = drop_order([3.0, 1.0, 2.0, 4.0], 2, first_stays=shape.first_layer_stays)
    return UnitOrder(
        torch.randperm(shape.hidden, generator=generator), rows(shape.groups), rows(shape.ffn), torch.tensor(drops)
    )


def small_space(shape: ElasticShape, order: UnitOrder, exits: tuple[int, ...] = ()) -> SearchSpace:
    """Every axis in steps that tp = 4 divides where the test uses it."""
    kept = {n: tuple(sorted(order.drop.tolist()[shape.num_layers - n :])) for n in (4, 3, 2)}
    groups = () if shape.head_dim_is_derived else (4,)
    hidden = (64, 32) if shape.head_dim_is_derived else (64, 48, 32)
    own = None if shape.head_dim_is_derived else 4
    palette = ((64, own, 96, 3), (32, own, 64, 4))
    return SearchSpace(shape, hidden, groups, (128, 96, 64), (4, 3, 2), kept, exits, palette)


def batch(step: int, index: int, job: SupernetJob) -> dict[str, torch.Tensor]:
    """[ROWS, LENGTH] of random tokens; encoders get padding, decoders a mask with weights of its own."""
    if job.cache is None:
        return random_batch(step, index, job.task)
    return {**random_batch(0, index, job.task), "sample": torch.arange(index * ROWS, (index + 1) * ROWS)}


def random_batch(step: int, index: int, task: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + index)
    tokens = torch.randint(3, VOCAB, (ROWS, LENGTH), generator=generator)
    if task == "causal_lm":
        labels = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator)
        mask = (torch.rand(ROWS, LENGTH, generator=generator) > 0.25).float() * (0.5 + index)
        return {"tokens": tokens, "labels": labels, "loss_mask": mask}
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[1, 6 + index % 3 :] = 0
    tokens = tokens.masked_fill(mask == 0, PADDING)
    labels = torch.randint(0, LABELS, (ROWS,), generator=generator)
    return {"tokens": tokens, "labels": labels, "attention_mask": mask, "token_type_ids": (tokens % 2) * mask}


SEED = 3  # of what is drawn


def config_of(job: SupernetJob, lr: float = 1e-2, eps: float = 1e-4, weight_decay: float = 0.1) -> SupernetConfig:
    """What the engine and the draws are given."""
    return SupernetConfig(
        factors=FactorsConfig(list(job.targets)),
        sampling=SamplingConfig(True, 2, job.gamma, job.full_every, job.palette_share),
        distill=DistillConfig(
            job.teacher, job.kl_weight, job.feature_weight, 16, job.temperature, 7, cache_samples=SAMPLES
        ),
        optim=OptimConfig(lr=lr, betas=[0.9, 0.95], eps=eps, weight_decay=weight_decay, clip_grad=job.clip_grad),
        train=BatchConfig(micro_batch_size=ROWS, global_batch_size=ROWS * MICRO_BATCHES, spike_factor=0.0, seed=7),
    )


AXES = ((), ("hidden", "heads", "ffn", "depth"))


# ---------------------------------------------------------------- on the grid


def start_noise(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Added to every start value, so that no factor is zero and a wrong gradient shows at the first step."""
    seed = sum(ord(letter) * (i + 1) for i, letter in enumerate(name))
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run_on_grid(folder: Path, job: SupernetJob, grid: Grid) -> dict[str, Any]:
    """All phases. Gradients (of the first step of each) and parameters are whole tensors."""
    config = read_config(folder)
    elastic_map = ElasticMap(config, job.task)
    order = scrambled_order(elastic_map.shape)
    space = small_space(elastic_map.shape, order, job.exits)
    layers = elastic_map.shape.num_layers
    plan = plan_stages(layers, grid.layout.pp, [layers], whole_model=True)
    stage = ElasticStage(elastic_map, plan, grid, torch.float32)
    stage.load(base_tensors(folder, elastic_map), order)
    made = config_of(job)
    result: dict[str, Any] = {"losses": [], "gradients": {}, "parameters": {}, "norms": [], "streams": []}
    each = MICRO_BATCHES // grid.layout.dp
    original = engine_module.clip_groups
    for index, axes in enumerate(AXES):
        factor_plan = FactorPlan(elastic_map, made.factors, job.rank, stage.new)
        factors = FactorSet(stage, factor_plan, index, seed=11)
        with torch.no_grad():
            for name, parameter in factors.named.items():
                parameter.add_(factors.local(name, start_noise(name, factors.axes[name].shape)))
        cache = None if job.cache is None or not axes else TeacherCache(job.cache * LENGTH)
        engine = SupernetEngine.build(stage, factors, grid, made, 1 if axes else None, cache)

        def clip_and_keep(*args: Any, factors: FactorSet = factors, **kwargs: Any) -> Any:
            for name, parameter in factors.named.items():
                if name not in result["gradients"]:
                    gradient = safe_get_full_grad(parameter).float().view(parameter.shape)
                    result["gradients"][name] = factors.gather(name, gradient).clone()
            return original(*args, **kwargs)

        with mock.patch.object(engine_module, "clip_groups", clip_and_keep):
            for step in range(job.steps[index]):
                data = [batch(step, i, job) for i in range(MICRO_BATCHES)]
                stream = draw_stream(space, axes, step, each, made.sampling, SEED, factor_plan.parameters)
                losses = engine.train_step(iter(data[grid.dp_rank * each : (grid.dp_rank + 1) * each]), stream)
                result["losses"].append(losses)
                result["norms"].append(engine.grad_norm.item())
                result["streams"].append([(draw.role, draw.spec) for draw in stream])
        for name, parameter in factors.named.items():
            whole = factors.gather(name, safe_get_full_fp32_param(parameter).view(parameter.shape))
            result["parameters"][name] = whole.detach().clone()
        factors.freeze()
        if not axes:
            for module in stage.elastic.values():
                module.merge(index)
    return result


# ---------------------------------------------------------------- the reference


def drawn_shares(q: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """How often each token is drawn of log-probabilities [B, S, V], a token at a time, divided by the draws."""
    shares = torch.zeros_like(q)
    for row, text in enumerate(texts.tolist()):
        points = torch.rand(LENGTH, generator=named_generator(f"text {text}", 7), dtype=torch.float64)
        for place, point in enumerate(points.tolist()):
            ends = q[row, place].exp().double().cumsum(0).tolist()
            for k in range(SAMPLES):
                token = next(v for v, end in enumerate(ends) if end > (point + k) / SAMPLES * ends[-1])
                shares[row, place, token] += 1 / SAMPLES
    return shares


class Reference:
    """Plain transformers models of every size whose weights are functions of the whole factors."""

    def __init__(self, folder: Path, job: SupernetJob):
        self.job, config = job, read_config(folder)
        self.map = ElasticMap(config, job.task)
        self.order = scrambled_order(self.map.shape)
        self.space = small_space(self.map.shape, self.order, job.exits)
        auto = AutoModelForCausalLM if job.task == "causal_lm" else AutoModelForSequenceClassification
        self.base = {name: p.detach() for name, p in auto.from_pretrained(folder).state_dict().items()}
        self.build = lru_cache(None)(lambda spec: auto.from_config(subnet_config(self.map, spec, tied=False)).eval())
        self.factors: dict[str, nn.Parameter] = {}

    def start(self, index: int) -> list[nn.Parameter]:
        """Factors of a phase at the start values of the grid runs."""
        from ee_scale.elastic.factors import initial

        plan = FactorPlan(self.map, config_of(self.job).factors, self.job.rank)
        added = []
        for (module, leaf), tensor in plan.tensors.items():
            name = f"{index}.{module}.{leaf}"
            start = initial(name, leaf, tensor, 11, fresh=False, std=0.02) + start_noise(name, tensor.shape)
            self.factors[name] = nn.Parameter(start)
            added.append(self.factors[name])
        self.plan = plan
        return added

    def weights(self, spec: SubnetSpec, stages: int) -> dict[str, torch.Tensor]:
        """The state dict of a subnet, by hand: sorted rows, first rows, plus products of factors."""
        state = {}
        for name, whole in self.base.items():
            module, leaf = name.rsplit(".", 1)
            layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
            if layer is not None and layer not in spec.layers:
                continue
            moved = name if layer is None else name.replace(f".{layer}.", f".{spec.layers.index(layer)}.")
            inside = FUSED.get(module.rsplit(".", 1)[-1])
            parts = [f"{module}.{part}" for part in inside] if inside else [module]
            tensors = zip(parts, whole.chunk(len(parts)), strict=True)
            state[moved] = torch.cat([self._weight(part, leaf, tensor, spec, stages) for part, tensor in tensors])
        return state

    def _weight(self, module: str, leaf: str, tensor: torch.Tensor, spec: SubnetSpec, stages: int) -> torch.Tensor:
        shape, described = self.map.shape, self.map.describe(f"{module}.{leaf}", tuple(tensor.shape))
        for dim, axis in enumerate(described.axes):
            rows = self.order.rows(axis, described.layer, shape)
            tensor = tensor if rows is None else tensor.index_select(dim, rows)
        for stage in range(stages):
            mine = {key: self.factors.get(f"{stage}.{module}.{key}") for key in ("A", "B", leaf)}
            if mine["A"] is not None and leaf == "weight":
                tensor = tensor + mine["A"] @ mine["B"]
            if mine[leaf] is not None:
                tensor = tensor + mine[leaf]
        return tensor[tuple(slice(shape.sizes(spec).get(axis)) for axis in described.axes)]

    def forward(
        self, spec: SubnetSpec, stages: int, data: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Logits and the hidden state after every kept layer, of a stock model."""
        model, states = self.build(spec), {}
        layers = model.base_model.get_submodule(self.map.family.layers)
        hooks = [
            layer.register_forward_hook(lambda _, args, output, i=i: states.__setitem__(i, output))
            for i, layer in zip(spec.layers, layers, strict=True)
        ]
        inputs = {"input_ids": data["tokens"]}
        inputs |= {key: data[key] for key in inputs_of(self.job.family) if key in data}
        logits = functional_call(model, self.weights(spec, stages), (), inputs).logits
        for hook in hooks:
            hook.remove()
        return logits, states

    def losses(self, data: dict[str, torch.Tensor], draw: Any, index: int) -> torch.Tensor:
        """(task, KL, features) and their weighted sum, [4]."""
        job, full = self.job, self.map.shape.full
        logits, states = self.forward(draw.spec, index + 1, data)
        labels = data["labels"]
        task = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
        weights = data.get("loss_mask", torch.ones_like(task)).flatten()
        weights = weights / (weights > 0).sum()
        task = (task * weights).sum()
        learns = index == 1 and not (job.teacher == LIVE and draw.role == FULL)
        zero = torch.zeros(())
        if not learns:
            return torch.stack([task, zero, zero, task])
        with torch.no_grad():
            taught, target = self.forward(full, index + 1 if job.teacher == LIVE else 1, data)
        t = job.temperature
        p, q = (logits / t).log_softmax(-1), (taught / t).log_softmax(-1)
        told = q.exp() if job.cache is None or job.task == "classify" else drawn_shares(q, data["sample"])
        kl = t * t * ((q.exp() * q - told * p).sum(-1).flatten() * weights).sum()
        features, projection = zero, FeatureLoss(64, 16, 7, torch.device("cpu"), torch.float32).projection
        mask = data.get("attention_mask", torch.ones_like(data["tokens"])).float()
        for i, state in states.items():
            wide = target[i] @ projection.T
            apart = ((state @ projection[:, : state.shape[-1]].T - wide) ** 2).mean(-1) * mask
            features = features + (apart.sum(1) / ((wide**2).mean(-1) * mask).sum(1)).mean() / draw.spec.depth
        total = (1 - job.kl_weight) * task + job.kl_weight * kl + job.feature_weight * features
        return torch.stack([task, kl, features, total])

    def run(self) -> dict[str, Any]:
        """Both phases with torch's AdamW and torch's clipping."""
        result: dict[str, Any] = {"losses": [], "gradients": {}, "parameters": {}, "norms": []}
        sampling = config_of(self.job).sampling
        for index, axes in enumerate(AXES):
            mine = self.start(index)
            groups = [
                {"params": [p for p in mine if p.ndim > 1], "weight_decay": 0.1},
                {"params": [p for p in mine if p.ndim == 1], "weight_decay": 0.0},
            ]
            adam = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-4)
            for step in range(self.job.steps[index]):
                stream = draw_stream(self.space, axes, step, MICRO_BATCHES, sampling, SEED, self.plan.parameters)
                found: dict[str, list[torch.Tensor]] = {}
                for draw in stream:
                    parts = self.losses(batch(step, draw.micro_batch, self.job), draw, index)
                    (draw.weight * parts[3]).backward()
                    found.setdefault(draw.role, []).append(parts[:3].detach())
                result["losses"].append({role: torch.stack(values).mean(0) for role, values in found.items()})
                for name, parameter in self.factors.items():
                    if name.startswith(f"{index}."):
                        result["gradients"].setdefault(name, parameter.grad.clone())
                result["norms"].append(torch.nn.utils.clip_grad_norm_(mine, self.job.clip_grad).item())
                adam.step()
                adam.zero_grad()
            for parameter in mine:
                parameter.requires_grad_(False)
        result["parameters"] = {name: p.detach().clone() for name, p in self.factors.items()}
        return result
