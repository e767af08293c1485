"""Memory of one rank before any process starts.

Parameters are counted on transformers' own modules at one rank's sizes, on the meta device (`passes`).
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ee_scale.backbone.parallel import padded_vocab
from ee_scale.elastic.architecture import local_length
from ee_scale.elastic.factors import FactorPlan
from ee_scale.families.registry import decoder_family
from ee_scale.modeling.heads import ExitSpec
from ee_scale.training.cost import draws_per_micro_batch
from ee_scale.training.passes import Passes, layer_call, local_model, watch
from ee_scale.training.plan import TunePlan
from ee_scale.training.supernet_plan import SupernetPlan


@dataclass(frozen=True)
class Parameters:
    """Of one rank: `frozen` and `trained` numbers, and the largest trained tensor."""

    frozen: int
    trained: int
    largest: int = 0

    @property
    def held(self) -> int:
        return self.frozen + self.trained


def count(module: nn.Module | None) -> int:
    """Numbers in a module's parameters."""
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def tune_parameters(plan: TunePlan, config: Any, stage: int) -> Parameters:
    """What one rank of a stage holds and trains in a run on exits."""
    local = local_model(plan.model_config, plan.layout.tp, torch.float32)
    layer, norm, spec = local.base_model.layers[0], local.base_model.norm, plan.spec
    mode, last = plan.backbone.mode, stage == plan.stages.launched - 1
    layers, exits = len(plan.stages.layers(stage)), len(plan.stages.exits(stage))
    teaches = config.exits.kl_weight > 0
    width, rows = plan.shape.hidden_size, padded_vocab(plan.shape.vocab_size, plan.layout.tp) // plan.layout.tp
    vocabulary = rows * width
    needs_head = (exits and (spec.head != "full" or teaches)) or (mode != "frozen" and last)
    shares = plan.shape.tied_embeddings and stage == 0  # one matrix for both ends
    backbone = layers * count(layer) + vocabulary * (stage == 0) + vocabulary * bool(needs_head and not shares)
    backbone += count(norm) * (last and (teaches or mode != "frozen"))
    bodies = {"mlp": layer.mlp, "layer": layer}
    head = {"full": vocabulary, "low_rank": spec.rank * (width + rows)}.get(spec.head, 0)
    per_exit = count(bodies.get(spec.kind)) + head + (0 if spec.kind == "embedding" else count(norm))
    trained, biggest = exits * per_exit, [0]
    if exits:
        biggest.append(0 if spec.kind == "embedding" else count(norm))
        biggest.append({"full": vocabulary, "low_rank": spec.rank * max(width, rows)}.get(spec.head, 0))
        biggest += [p.numel() for p in bodies[spec.kind].parameters()] if spec.kind in bodies else []
    if mode == "low_rank":
        prefixes = decoder_family(plan.model_config).prefixes(plan.backbone.targets)
        adapted = add_pairs(layer, plan.backbone.rank, prefixes)
        trained += layers * count(adapted)
        biggest += [p.numel() for p in adapted.parameters()]
    if mode == "full":
        biggest += [p.numel() for p in layer.parameters()] + [vocabulary * bool(stage == 0 or needs_head)]
        return Parameters(0, backbone + trained, max(biggest))
    return Parameters(backbone, trained, max(biggest))


def supernet_parameters(plan: SupernetPlan, index: int, stage: int) -> Parameters:
    """What one rank of a stage holds and trains in recipe stage `index`, the finished stages' factors included."""

    def mine(named: Any) -> list[int]:
        return [_local_size(plan, tensor) for name, tensor in named if stage in _stages_of(plan, name, tensor.layer)]

    frozen = sum(mine(plan.map.matrices.items()))
    for earlier in range(index):
        tensors = FactorPlan(plan.map, plan.factor_settings(earlier)).tensors
        frozen += sum(mine((module, tensor) for (module, _), tensor in tensors.items()))
    tensors = FactorPlan(plan.map, plan.factor_settings(index)).tensors
    trained = mine((module, tensor) for (module, _), tensor in tensors.items())
    return Parameters(frozen, sum(trained), max(trained, default=0))


def _stages_of(plan: SupernetPlan, name: str, layer: int | None) -> Sequence[int]:
    if layer is not None:
        return [s for s in range(plan.stages.launched) if layer in plan.stages.layers(s)]
    return [0] if "embed" in name else [plan.stages.launched - 1]


def _local_size(plan: SupernetPlan, tensor: Any) -> int:
    return prod(local_length(axis, n, plan.layout.tp) for axis, n in zip(tensor.axes, tensor.shape, strict=True))


def add_pairs(layer: nn.Module, rank: int, prefixes: tuple[str, ...]) -> nn.ParameterList:
    """Low-rank pairs beside the projections of a layer on the meta device; returns their parameters."""
    pairs = nn.ParameterList()
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(prefixes) and rank:
            out, inner = module.weight.shape
            down, up = (
                torch.empty(size, device="meta", dtype=module.weight.dtype) for size in ((rank, inner), (out, rank))
            )
            pairs += [down, up]
            module.register_forward_hook(
                lambda _, args, output, a=pairs[-2], b=pairs[-1]: output + F.linear(F.linear(args[0], a), b)
            )
    for parameter in pairs:
        parameter.grad = torch.empty_like(parameter)
    return pairs


# -- memory ------------------------------------------------------------------------------------------------------------

# Bytes per trained number of what DeepSpeed's ZeRO-1 keeps: (gradients, whole; optimizer, divided over replicas).
# bf16: fp32 gradients; fp32 master copy and two moments. fp32: the same, and the gradients' flat copy for a moment.
STATE_BYTES = (4, 12)
BUCKET = 50_000_000  # numbers that are reduced over replicas at once (`engine.setup`)
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


def rank_memory(plan: TunePlan | SupernetPlan, config: Any, *, bf16: bool, device: str = "cuda") -> list[RankMemory]:
    """The most that one rank of each launched stage holds at one time."""
    size = 2 if bf16 else 4
    if isinstance(plan, TunePlan):
        return [_tune_memory(plan, config, stage, size, device) for stage in range(plan.stages.launched)]
    recipes = range(len(plan.recipe.stages))
    return [
        max((_supernet_memory(plan, index, stage, size, device) for index in recipes), key=lambda memory: memory.total)
        for stage in range(plan.stages.launched)
    ]


def logits_bytes(tokens: int, chunk: int, columns: int, size: int, *, pair: bool, teacher: bool, largest: int) -> float:
    """Peak of one chunk's logits and loss [chunk, columns]; `pair`: lm_head and low-rank update exist at once."""
    chunked, chunk = tokens > chunk, min(chunk, tokens)
    if teacher:  # logits of both, tempered, their logarithms, probabilities and a product (measured)
        copies = 8 * 4
    elif size == 4:
        copies = 4 * (3 if pair else 2)  # lm_head's, the update's, their sum; or logits and softmax
    else:
        copies = 2 + 4 + 4  # bf16 logits, fp32 logits, softmax
    copies += size * chunked  # the last chunk's are dropped when the next one's are there
    return chunk * columns * copies + size * largest


def _state(parameters: Parameters, dp: int, size: int) -> tuple[float, float, float, float]:
    """Bytes of (weights, gradients, optimizer state, what the reduction and the step need for a moment)."""
    whole, divided = STATE_BYTES
    moment = 4 * parameters.trained / dp * (size == 4) + 4 * min(parameters.trained, BUCKET) * (dp > 1)
    moment = max(moment, 2 * 4 * parameters.largest)
    trained = parameters.trained
    return size * parameters.held, whole * trained, divided * trained / dp, moment


def _tune_memory(plan: TunePlan, config: Any, stage: int, size: int, device: str) -> RankMemory:
    dtype, mode = {2: torch.bfloat16, 4: torch.float32}[size], plan.backbone.mode
    rows, length, exits = config.train.micro_batch_size, config.data.seq_length, len(plan.stages.exits(stage))
    parameters = tune_parameters(plan, config, stage)
    weights, gradients, optimizer, moment = _state(parameters, plan.layout.dp, size)
    state = rows * length * plan.shape.hidden_size * size  # one hidden state
    local = local_model(plan.model_config, plan.layout.tp, dtype, config.model.attn_implementation)
    teaches, last = config.exits.kl_weight > 0, stage == plan.stages.launched - 1
    body = exit_passes(local, plan.spec, rows, length, through=mode != "frozen")
    taps = (1 + (plan.spec.kind == "mlp")) * state
    if mode == "frozen":
        layers = layer_passes(local, rows, length, (), 0).forward
        held = plan.num_micro_batches if teaches else 1
        kept = held * (exits * taps + state * (1 + teaches))
        activations = kept + max(layers, (body.kept + 2 * state + body.working) * bool(exits))
    else:
        prefixes = decoder_family(plan.model_config).prefixes(plan.backbone.targets) if mode == "low_rank" else None
        layer = layer_passes(local, rows, length, prefixes, plan.backbone.rank)
        flying = min(plan.stages.launched - stage, plan.num_micro_batches)
        per_layer, once = layer.kept, layer.working
        if plan.backbone.activation_checkpointing:
            per_layer, once = state, layer.kept + layer.working
        count_layers = len(plan.stages.layers(stage))
        activations = flying * (count_layers * per_layer + exits * taps + state)
        activations += exits * (body.kept + 2 * state) + 2 * state * last + max(once, body.working)
    columns = padded_vocab(plan.shape.vocab_size, plan.layout.tp) // plan.layout.tp
    logits = 0.0
    if exits or (last and mode != "frozen"):
        trains_matrix = plan.spec.head == "full" or mode == "full"
        logits = logits_bytes(
            rows * length,
            config.exits.loss_chunk_tokens,
            columns,
            size,
            pair=plan.spec.head == "low_rank" and bool(exits),
            teacher=teaches,
            largest=columns * (plan.shape.hidden_size if trains_matrix else plan.spec.rank),
        )
    crossing = (2 if mode == "frozen" else 4) * state * (plan.stages.launched > 1)
    # Activations are gone when the step is taken.
    return RankMemory(
        weights, gradients, optimizer, activations, logits, crossing + max(0.0, moment - activations - logits),
        OVERHEAD[device],
    )  # fmt: skip


def _supernet_memory(plan: SupernetPlan, index: int, stage: int, size: int, device: str) -> RankMemory:
    config, dtype = plan.config, {2: torch.bfloat16, 4: torch.float32}[size]
    rows, length = config.train.micro_batch_size, config.data.seq_length
    parameters = supernet_parameters(plan, index, stage)
    weights, gradients, optimizer, moment = _state(parameters, plan.layout.dp, size)
    tokens, hidden = rows * length, plan.map.shape.hidden
    state = tokens * hidden * size
    settings, last = plan.factor_settings(index), stage == plan.stages.launched - 1
    local = local_model(plan.map.config, plan.layout.tp, dtype, config.model.attn_implementation)
    layer = layer_passes(
        local, rows, length, plan.map.family.prefixes(settings.targets), settings.rank, vectors=settings.vectors
    )
    layers, learns = len(plan.stages.layers(stage)), bool(plan.recipe.stages[index].axes)
    features = min(plan.distill.feature_dim, hidden) if learns and plan.distill.feature_weight else 0
    pairs = draws_per_micro_batch(plan, index) * plan.num_micro_batches
    flying = min(plan.stages.launched - stage, pairs)
    taught = plan.num_micro_batches * learns * (tokens * size * features * layers + state * last)
    activations = flying * (layers * (layer.kept + 3 * tokens * features * 4) + 2 * state) + layer.working + taught
    logits = 0.0
    if last and plan.task == "causal_lm":
        columns = padded_vocab(plan.map.config.vocab_size, plan.layout.tp) // plan.layout.tp
        trains = settings.rank or hidden
        logits = logits_bytes(
            tokens, plan.distill.chunk_tokens, columns, size, pair=bool(settings.rank), teacher=learns,
            largest=columns * trains,
        )  # fmt: skip
    crossing = 4 * state * (plan.stages.launched > 1)
    return RankMemory(
        weights, gradients, optimizer, activations, logits, crossing + max(0.0, moment - activations - logits),
        OVERHEAD[device],
    )  # fmt: skip


def layer_passes(
    local: nn.Module, rows: int, length: int, prefixes: tuple[str, ...] | None, rank: int, *, vectors: bool = False
) -> Passes:
    """One decoder layer: all of it trains (`prefixes` None), or pairs of this rank beside the projections named."""
    layer, call = layer_call(local, rows, length)
    layer = layer.requires_grad_(prefixes is None)
    hooks = [dict(module._forward_hooks) for module in layer.modules()]
    if prefixes is not None:
        add_pairs(layer, rank, prefixes)
        for name, parameter in layer.named_parameters():
            is_target = name.startswith(prefixes) and not rank
            parameter.requires_grad_((vectors and parameter.ndim == 1) or (parameter.ndim > 1 and is_target))
    x = torch.empty(rows, length, local.config.hidden_size, dtype=local.dtype, device="meta")
    try:
        return watch(call, layer, x, needs=True)
    finally:
        for module, before in zip(layer.modules(), hooks, strict=True):
            module._forward_hooks.clear()
            module._forward_hooks.update(before)
        layer.requires_grad_(True)


def exit_passes(local: nn.Module, spec: ExitSpec, rows: int, length: int, *, through: bool) -> Passes:
    """The modules of one exit in front of its head."""
    layer, call = layer_call(local, rows, length)
    norm, parts = local.base_model.norm, nn.ModuleList()
    if spec.kind in ("mlp", "layer"):
        parts.append(layer.mlp if spec.kind == "mlp" else layer)
    if spec.kind != "embedding":
        parts.append(norm)

    def run(x: torch.Tensor) -> torch.Tensor:
        if spec.kind == "mlp":
            x = x + layer.mlp(x)
        elif spec.kind == "layer":
            x = call(x)
        return x if spec.kind == "embedding" else norm(x)

    x = torch.empty(rows, length, local.config.hidden_size, dtype=local.dtype, device="meta")
    return watch(run, parts, x, needs=through)
