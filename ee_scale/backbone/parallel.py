"""Tensor axis: swap a Hugging Face module's projections for Megatron-Core's, by transformers' own plan.

Sizes are those of one rank afterwards; parameter names stay Hugging Face's. Each parameter says how it is cut through
Megatron's attributes `tensor_model_parallel` and `partition_dim`, which loading, clipping and saving read.
"""

from collections.abc import Callable, Mapping
from functools import partial
from math import ceil

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region as copy_to,
)
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region as reduce_from,
)
from torch import nn
from torch.autograd.function import BackwardCFunction, FunctionCtx

from ee_scale.backbone.experts import cut_experts
from ee_scale.errors import UserError
from ee_scale.families.sizes import ModelShape

# Projections that are cut: their parts meet behind the second of a pair, or ("gathered", "split") behind each.
CUTS = COLUMN, ROW, GATHERED, SPLIT = "colwise", "rowwise", "colwise_gather_output", "rowwise_split_input"
GRAD_SUM = "replicated_with_grad_allreduce"
STYLES = (*CUTS, GRAD_SUM)
EXPERTS = "moe_tp_experts"  # the module that holds those of a layer
EXPERT_STYLES = {"gate_up_proj": "packed_colwise", "down_proj": ROW}  # its parameters
DENSE_STYLES = {"gate_proj": COLUMN, "up_proj": COLUMN, "down_proj": ROW}


class _Gather(torch.autograd.Function):
    """The ranks' parts of the last dimension, joined. (Megatron's own wants a GPU.)"""

    @staticmethod
    def forward(ctx: FunctionCtx, part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _joined(part, group)

    @staticmethod
    def backward(ctx: BackwardCFunction, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _own_part(gradient, ctx.group), None


class _Split(torch.autograd.Function):
    """This rank's part of the last dimension."""

    @staticmethod
    def forward(ctx: FunctionCtx, whole: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _own_part(whole, group)

    @staticmethod
    def backward(ctx: BackwardCFunction, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _joined(gradient, ctx.group), None


def _joined(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, -1)


def _own_part(whole: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return whole.chunk(group.size(), -1)[group.rank()].contiguous()


class ColumnLinear(ColumnParallelLinear):
    """[..., in] -> [..., out/tp]; whole where `gathers` is set."""

    gathers = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Megatron computes, and sums over the group, the gradient of an input that wants none.
        out = super().forward(x)[0] if x.requires_grad else F.linear(x, self.weight, self.bias)
        return self.whole(out)

    def whole(self, out: torch.Tensor) -> torch.Tensor:
        """What it gives, of what its rows give."""
        return _Gather.apply(out, self.tp_group) if self.gathers and self.tp_group.size() > 1 else out


class RowLinear(RowParallelLinear):
    """[..., in/tp] -> [..., out], summed over the tensor group; reads a whole input where `splits` is set."""

    splits = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.own(x))[0]

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """What its columns read, of what it reads."""
        return _Split.apply(x, self.tp_group) if self.splits and self.tp_group.size() > 1 else x


class VocabEmbedding(VocabParallelEmbedding):
    """[B, S] ids -> [B, S, D]; each rank holds V/tp rows.

    `scale` multiplies the output (Gemma); looking `padding_id` up gives its row no gradient (as in `nn.Embedding`).
    """

    scale: float | None = None
    padding_id: int | None = None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        embeddings = super().forward(ids)
        if self.padding_id is not None and embeddings.requires_grad:
            embeddings = torch.where((ids == self.padding_id).unsqueeze(-1), embeddings.detach(), embeddings)
        return embeddings if self.scale is None else embeddings * torch.tensor(self.scale, dtype=embeddings.dtype)


def padded_vocab(vocab_size: int, tp: int) -> int:
    """Rows of the cut vocabulary matrices: the next multiple of tp. The padding never reaches a loss or a file."""
    return ceil(vocab_size / tp) * tp


def check_tensor_parallel(tp: int, shape: ModelShape, plan: Mapping[str, str], model_type: str) -> None:
    """Refuse what cannot be cut, by name and number. Raises `UserError`."""
    if tp == 1:
        return
    sizes = {
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        **shape.cut_units,
    }
    for name, size in sizes.items():
        if size % tp:
            raise UserError(f"parallel.tp={tp} does not divide {name}={size} of the model")
    if not plan:
        raise UserError(f"parallel.tp={tp}: transformers has no tensor-parallel plan for '{model_type}'; use tp=1")
    if unknown := unknown_style(plan):
        name, style = unknown
        raise UserError(
            f"parallel.tp={tp}: '{model_type}' asks for '{style}' on {name}, which is not supported; use tp=1"
        )


def layer_plan(plan: Mapping[str, str] | None) -> dict[str, str]:
    """The part of transformers' plan inside decoder layers ('layers.*.mlp.up_proj': 'colwise')."""
    # Some configs also say how to cut the vocabulary, which is cut as it is here.
    found = {name: style for name, style in (plan or {}).items() if name.startswith("layers.")}
    for experts in [name for name, style in found.items() if style == EXPERTS]:
        # Some say nothing of the dense MLPs beside them: the shared one, and those of exits.
        mlp = experts.removesuffix(".experts")
        for module in (mlp, f"{mlp}.shared_expert"):
            for name, style in DENSE_STYLES.items():
                found.setdefault(f"{module}.{name}", style)
    return found


def unknown_style(plan: Mapping[str, str]) -> tuple[str, str] | None:
    """The first (name, style) of a plan that nothing here computes."""
    for name, style in plan.items():
        owner, _, inner = name.rpartition(".")
        if plan.get(owner) == EXPERTS:
            known = EXPERT_STYLES.get(inner) == style
        elif style == EXPERTS:
            known = all(f"{name}.{each}" in plan for each in EXPERT_STYLES)
        else:
            known = style in STYLES
        if not known:
            return name, style
    return None


def swap_projections(
    module: nn.Module, plan: Mapping[str, str], prefix: str, group: dist.ProcessGroup, dtype: torch.dtype
) -> None:
    """Swap the projections of `module` in place; the new weights are empty, on the current default device.

    `plan` is by the name inside a decoder layer; `prefix` is the place of `module` there ('mlp.' for an MLP alone).
    """

    def make(linear: nn.Linear, style: str) -> nn.Module:
        return MAKERS[style](linear.in_features, linear.out_features, linear.bias is not None, group, dtype)

    swap_linears(module, plan, prefix, make)
    for name, child in module.named_modules():
        if plan.get(prefix + name) == EXPERTS:
            cut_experts(child, group, dtype)


def swap_linears(
    module: nn.Module, plan: Mapping[str, str], prefix: str, make: Callable[[nn.Linear, str], nn.Module]
) -> None:
    """Put `make(projection, style)` in the place of each projection that the plan cuts."""
    for name, child in list(module.named_modules()):
        style = plan.get(prefix + name)
        if style in CUTS:
            module.set_submodule(name, make(child, style))


def sum_partial_gradients(module: nn.Module, plan: Mapping[str, str], prefix: str, group: dist.ProcessGroup) -> None:
    """Sum over the group the gradients of parameters whose copies each see a part of the heads (Qwen3 q/k norms)."""

    def all_reduce(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=group)
        return gradient

    for name, child in module.named_modules():
        if plan.get(prefix + name) == GRAD_SUM and group.size() > 1:
            for parameter in child.parameters():
                parameter.register_hook(all_reduce)


def materialise(module: nn.Module, device: torch.device) -> None:
    """Give the parameters that are still on the meta device (norms) empty memory on `device`."""
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device=device)
                child.register_parameter(name, nn.Parameter(empty, requires_grad=parameter.requires_grad))


def column_linear(
    in_features: int,
    out_features: int,
    bias: bool,
    group: dist.ProcessGroup,
    dtype: torch.dtype,
    *,
    gathers: bool = False,
) -> ColumnLinear:
    """A linear layer whose outputs are cut over the group, and joined again with `gathers`."""
    layer = ColumnLinear(
        in_features, out_features, bias=bias, config=_config(group, dtype), init_method=_no_init, tp_group=group
    )
    layer.gathers = gathers
    set_tensor_model_parallel_attributes(layer.weight, True, 0, 1)
    return layer


def row_linear(
    in_features: int,
    out_features: int,
    bias: bool,
    group: dist.ProcessGroup,
    dtype: torch.dtype,
    *,
    splits: bool = False,
) -> RowLinear:
    """A linear layer whose inputs are cut over the group, by itself with `splits`; the bias is whole on every rank."""
    layer = RowLinear(
        in_features,
        out_features,
        bias=bias,
        config=_config(group, dtype),
        init_method=_no_init,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=group,
    )
    layer.splits = splits
    set_tensor_model_parallel_attributes(layer.weight, True, 1, 1)
    return layer


MAKERS = {
    COLUMN: column_linear,
    ROW: row_linear,
    GATHERED: partial(column_linear, gathers=True),
    SPLIT: partial(row_linear, splits=True),
}


def vocab_embedding(
    whole: nn.Embedding, scale: float | None, group: dist.ProcessGroup, dtype: torch.dtype
) -> nn.Module:
    """An embedding like `whole` whose rows are cut over the group, padded to a multiple of tp."""
    rows, config = padded_vocab(whole.num_embeddings, group.size()), _config(group, dtype)
    embedding = VocabEmbedding(rows, whole.embedding_dim, init_method=_no_init, config=config, tp_group=group)
    embedding.scale, embedding.padding_id = scale, whole.padding_idx
    set_tensor_model_parallel_attributes(embedding.weight, True, 0, 1)
    return embedding


def update_beside(
    projection: nn.Module, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """`low_rank_update` beside a projection, from what it reads to what it gives."""
    if isinstance(projection, RowLinear):
        return low_rank_update(projection.own(x), down, up, ROW, group)
    if isinstance(projection, ColumnLinear):
        return projection.whole(low_rank_update(x, down, up, COLUMN, group))
    return low_rank_update(x, down, up, None, group)


def low_rank_update(
    x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, style: str | None, group: dist.ProcessGroup
) -> torch.Tensor:
    """up (down x), the update beside a projection of that style (COLUMN, ROW, None: whole everywhere): [..., out].

    Only [..., r] crosses ranks, at the place where it makes both gradients whole. COLUMN: `down` is whole on every
    rank, so the gradient of down x is summed before it reaches `down`. ROW: `down` is cut, so down x is summed before
    `up`, which is whole, sees it.
    """
    low = F.linear(x, down)
    if style == COLUMN:
        low = copy_to(low, group)
    elif style == ROW and group.size() > 1:
        low = reduce_from(low, group)
    return F.linear(low, up)


def cut_packs(parameter: torch.Tensor) -> int:
    """How many matrices lie side by side along that dimension, each of them cut."""
    return getattr(parameter, "partition_stride", 1)


def cut_dim(parameter: torch.Tensor) -> int | None:
    """The dimension along which a parameter is cut over the tensor group, or None if it is whole."""
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None


def _config(group: dist.ProcessGroup, dtype: torch.dtype) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=group.size(),
        params_dtype=dtype,
        use_cpu_initialization=True,
        perform_initialization=False,
    )


def _no_init(_: torch.Tensor) -> None:
    """Weights come from files."""
