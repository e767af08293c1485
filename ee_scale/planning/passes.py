"""What one module's passes keep and need, watched on the meta device: no formula per family, and no memory taken."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._ops import OpOverload
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ee_scale.backbone.shard import tensor_plan
from ee_scale.families.build import meta_model
from ee_scale.families.registry import known_family
from ee_scale.families.sizes import ModelShape, shape_of, with_layers
from ee_scale.modeling.heads import rotary_by_type
from ee_scale.planning.cuts import Gathered, Split, cut_gathered, gathers

LayerCall = Callable[[torch.Tensor], torch.Tensor]
# Attention that keeps what fused kernels keep, and experts as one matrix product for all: they compute nothing.
FUSED = "ee_scale_fused_sizes"


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside the block that something still refers to: `now`, and at most (`peak`).

    `moved`: bytes that its operations read and wrote, matrix products and views left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.moved = 0

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        given, new = {t.untyped_storage()._cdata for t in inputs}, []
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given:
                    new.append(tensor)
                    self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        name = func._schema.name
        if (new or name.endswith("_")) and not name.endswith("mm"):
            self.moved += sum(tensor.nbytes for tensor in [*inputs, *new])
        self.peak = max(self.peak, self.now)
        return out

    @property
    def now(self) -> int:
        self._seen = {key: pair for key, pair in self._seen.items() if not pair[0].expired()}
        return sum(size for _, size in self._seen.values())


class _Fused(torch.autograd.Function):
    """Flash attention's tensors: keeps q, k, v, the output and the log-sum-exp of each row."""

    @staticmethod
    def forward(ctx: FunctionCtx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows, heads, length, _ = q.shape
        out = q.new_empty(rows, length, heads, v.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(rows, heads, length, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: BackwardCFunction, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _fused(
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object, **__: object
) -> tuple[torch.Tensor, None]:
    return _Fused.apply(q, k, v).transpose(1, 2), None


def _grouped(experts: nn.Module, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Of frozen experts: each token once for every expert that it goes through."""
    k = chosen.shape[-1]
    rows = x.repeat_interleave(k, 0)
    gate, up = rows.new_empty(len(rows), experts.get_parameter("gate_up_proj").shape[1]).chunk(2, -1)
    out = (F.silu(gate) * up).new_empty(len(rows), x.shape[-1]) * weights.reshape(-1, 1)
    return out.view(-1, k, x.shape[-1]).sum(1).to(x.dtype)


AttentionInterface.register(FUSED, _fused)
ALL_EXPERTS_FUNCTIONS.register(FUSED, _grouped)
UNITS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")


@dataclass(frozen=True)
class Passes:
    """Bytes of one module's passes on one micro-batch, beside its input, parameters and their gradients.

    Attributes:
        forward: at most at one time, without a graph.
        kept: what the graph holds until the backward pass, output included.
        working: what forward or backward needs for a moment on top of `kept`.
        moved, moved_training: read and written beside matrix products, without a graph; with one and its backward.
    """

    forward: int
    kept: int
    working: int
    moved: int = 0
    moved_training: int = 0


def local_model(
    config: PreTrainedConfig,
    tp: int,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    *,
    layer: int | None = None,
) -> PreTrainedModel:
    """The model with one decoder layer (None: the widest) at one tensor rank's sizes, on the meta device (vocabulary
    matrices whole)."""
    config = with_layers(config, [shape_of(config).widest_layer if layer is None else layer])
    family, plan = known_family(config), tensor_plan(config, 1)
    if tp > 1 and not gathers(plan, family.attention):
        heads = config.num_attention_heads
        if hasattr(config, "num_key_value_heads"):
            config.num_key_value_heads = (config.num_key_value_heads or heads) // tp
        config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        config.num_attention_heads = heads // tp
    if tp > 1 and not gathers(plan, family.mlp):
        for name in UNITS:
            if getattr(config, name, None):
                setattr(config, name, getattr(config, name) // tp)
    model = meta_model(config, dtype, attn_implementation, task=family.task)
    if tp > 1:
        cut_gathered(first_layer(model), plan, tp)
    if model.config._attn_implementation != "eager":
        model.set_attn_implementation(FUSED)
    if model._can_set_experts_implementation():
        model.set_experts_implementation(FUSED)
    return model


def local_layers(config: PreTrainedConfig, tp: int, shape: ModelShape) -> tuple[list[nn.Module], nn.Module]:
    """All decoder layers at one rank's sizes in fp32 (one module for those that are alike), and the final norm."""
    have = shape.experts.layers if shape.experts else (False,) * shape.num_layers
    models = {kind: local_model(config, tp, torch.float32, layer=have.index(kind)) for kind in sorted(set(have))}
    return [first_layer(models[kind]) for kind in have], final_norm(models[have[0]])


def first_layer(model: PreTrainedModel) -> nn.Module:
    return model.base_model.get_submodule(known_family(model.config).layers).get_submodule("0")


def final_norm(model: PreTrainedModel) -> nn.Module:
    """Of a decoder."""
    return model.base_model.get_submodule("norm")


def layer_call(model: PreTrainedModel, rows: int, length: int) -> tuple[nn.Module, LayerCall]:
    """(the model's layer, a function [rows, length, D] -> [rows, length, D] that runs it on the meta device)."""
    layer = first_layer(model)
    if not hasattr(model.base_model, "rotary_emb"):
        return layer, lambda x: _first(layer(x))
    with torch.device("meta"):
        positions = torch.arange(length)[None]
        rotary_emb = model.base_model.get_submodule("rotary_emb")
        x = torch.empty(rows, length, 1, dtype=model.dtype)
        kind = [model.config.layer_types[0]] if rotary_by_type(rotary_emb) else []
        rotary = rotary_emb(x, positions, *kind)
    return layer, lambda x: _first(layer(x, position_embeddings=rotary, attention_mask=None, position_ids=positions))


def watch(call: LayerCall, module: nn.Module, x: torch.Tensor, needs: bool) -> Passes:
    """Run `call` without and with a graph; `needs`: the input wants a gradient too."""
    for parameter in module.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    with torch.no_grad(), LiveBytes() as forward:
        call(x)
    x = x.detach().requires_grad_(needs)
    with LiveBytes() as live:
        out = call(x)
        kept = live.now
        if out.requires_grad:
            out.backward(torch.empty_like(out))
    return Passes(forward.peak, kept, max(0, live.peak - kept), forward.moved, live.moved)


def _first(out: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def count(module: nn.Module | None) -> int:
    """Numbers in a module's parameters."""
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def add_pairs(layer: nn.Module, rank: int, prefixes: tuple[str, ...]) -> nn.ParameterList:
    """Low-rank pairs beside the projections of a layer on the meta device; returns their parameters."""
    pairs = nn.ParameterList()
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(prefixes) and rank:
            pairs += _add_pair(module, rank)
    for parameter in pairs:
        parameter.grad = torch.empty_like(parameter)
    return pairs


def _add_pair(projection: nn.Linear, rank: int) -> nn.ParameterList:
    """[rank, in] and [out, rank], whose product a hook adds to what the projection does."""
    out, inner = projection.weight.shape
    pair = nn.ParameterList(projection.weight.new_empty(size) for size in ((rank, inner), (out, rank)))

    def add(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x = projection.own(args[0]) if isinstance(projection, Split) else args[0]
        update = F.linear(F.linear(x, pair[0]), pair[1])
        return output + (projection.whole(update) if isinstance(projection, Gathered) else update)

    projection.register_forward_hook(add)
    return pair


def layer_passes(
    local: PreTrainedModel,
    rows: int,
    length: int,
    prefixes: tuple[str, ...] | None,
    rank: int,
    *,
    vectors: bool = False,
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
