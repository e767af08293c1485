"""Which axis of which tensor an elastic size cuts, per architecture, as data."""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ee_scale.elastic.subnet import ElasticShape, SubnetSpec
from ee_scale.errors import UserError

# Axes that are cut; every other name ('vocab', 'labels', 'whole') keeps its full length in every subnet.
HIDDEN, HEADS, KV, FFN, VOCAB = "hidden", "heads", "kv", "ffn", "vocab"
SHARDED = (HEADS, KV, FFN)  # dealt to tensor ranks; the others are whole on every rank (vocab: cut, never elastic)

AUTO_CLASS = {"causal_lm": AutoModelForCausalLM, "classify": AutoModelForSequenceClassification}


@dataclass(frozen=True)
class Architecture:
    """Names inside a transformers model.

    Attributes:
        base: attribute of the base model, and its prefix in the files.
        layers: place of the layers in the base model.
        axes: module name ('*' for a layer's number) -> axes of its weight; a bias lies along the first.
        head_dim_is_derived: the config has no head_dim of its own, so hidden = heads x head_dim in every subnet.
        heads_divide_hidden: the config refuses a width that is not a multiple of its heads, though it has a head_dim.
    """

    task: str
    base: str
    layers: str
    axes: Mapping[str, tuple[str, ...]] = field(repr=False)
    head_dim_is_derived: bool = False
    heads_divide_hidden: bool = False


_DECODER = Architecture(
    task="causal_lm",
    base="model",
    layers="layers",
    axes={
        "model.embed_tokens": (VOCAB, HIDDEN),
        "model.layers.*.input_layernorm": (HIDDEN,),
        "model.layers.*.self_attn.q_proj": (HEADS, HIDDEN),
        "model.layers.*.self_attn.k_proj": (KV, HIDDEN),
        "model.layers.*.self_attn.v_proj": (KV, HIDDEN),
        "model.layers.*.self_attn.q_norm": ("whole",),
        "model.layers.*.self_attn.k_norm": ("whole",),
        "model.layers.*.self_attn.o_proj": (HIDDEN, HEADS),
        "model.layers.*.post_attention_layernorm": (HIDDEN,),
        "model.layers.*.mlp.gate_proj": (FFN, HIDDEN),
        "model.layers.*.mlp.up_proj": (FFN, HIDDEN),
        "model.layers.*.mlp.down_proj": (HIDDEN, FFN),
        "model.norm": (HIDDEN,),
        "lm_head": (VOCAB, HIDDEN),
    },
)
_ENCODER = Architecture(
    task="classify",
    base="bert",
    layers="encoder.layer",
    axes={
        "bert.embeddings.word_embeddings": (VOCAB, HIDDEN),
        "bert.embeddings.position_embeddings": ("whole", HIDDEN),
        "bert.embeddings.token_type_embeddings": ("whole", HIDDEN),
        "bert.embeddings.LayerNorm": (HIDDEN,),
        "bert.encoder.layer.*.attention.self.query": (HEADS, HIDDEN),
        "bert.encoder.layer.*.attention.self.key": (KV, HIDDEN),
        "bert.encoder.layer.*.attention.self.value": (KV, HIDDEN),
        "bert.encoder.layer.*.attention.output.dense": (HIDDEN, HEADS),
        "bert.encoder.layer.*.attention.output.LayerNorm": (HIDDEN,),
        "bert.encoder.layer.*.intermediate.dense": (FFN, HIDDEN),
        "bert.encoder.layer.*.output.dense": (HIDDEN, FFN),
        "bert.encoder.layer.*.output.LayerNorm": (HIDDEN,),
        "bert.pooler.dense": (HIDDEN, HIDDEN),
        "classifier": ("labels", HIDDEN),
    },
    head_dim_is_derived=True,
)
ARCHITECTURES = {
    "llama": replace(_DECODER, heads_divide_hidden=True),
    "mistral": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "bert": _ENCODER,
}


def architecture_of(config: Any, task: str) -> Architecture:
    """The architecture of a transformers config. Raises `UserError` for one that is not elastic, or another task."""
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"model.path: architecture '{config.model_type}' is not elastic; known: {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[config.model_type]
    if architecture.task != task:
        raise UserError(f"task={task}: '{config.model_type}' is trained with task={architecture.task}")
    if getattr(config, "is_decoder", False) and task == "classify":
        raise UserError("model.path: config.is_decoder=true; an encoder is wanted")
    return architecture


def elastic_shape(config: Any) -> ElasticShape:
    """The full sizes that subnets are cut from."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return ElasticShape(
        hidden=config.hidden_size,
        groups=kv_heads,
        ffn=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        queries_per_group=heads // kv_heads,
        head_dim_is_derived=ARCHITECTURES[config.model_type].head_dim_is_derived,
        heads_divide_hidden=ARCHITECTURES[config.model_type].heads_divide_hidden,
    )


def meta_model(config: Any, task: str, dtype: torch.dtype, attn_implementation: str | None = None) -> nn.Module:
    """The whole model without memory, as transformers builds it."""
    extra = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with torch.device("meta"):
        return AUTO_CLASS[task].from_config(copy.deepcopy(config), dtype=dtype, **extra).eval()


@dataclass(frozen=True)
class TensorAxes:
    """One parameter: its axes, its full shape, and the layer it belongs to (None: outside the layers)."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    layer: int | None


class ElasticMap:
    """Every parameter of a model with its axes: what loading, extraction and counting read."""

    def __init__(self, config: Any, task: str):
        """Raises `UserError` where the architecture is not elastic or has a tensor that is not known."""
        self.config, self.architecture, self.shape = config, architecture_of(config, task), elastic_shape(config)
        self._parameters = {
            name: tuple(parameter.shape)
            for name, parameter in meta_model(config, task, torch.float32).named_parameters()
        }

    @cached_property
    def tensors(self) -> dict[str, TensorAxes]:
        """By full name ('model.layers.3.mlp.up_proj.weight'); tied matrices appear once, as transformers lists them."""
        return {name: self.describe(name, shape) for name, shape in self._parameters.items()}

    def describe(self, name: str, shape: tuple[int, ...]) -> TensorAxes:
        """The axes of a parameter by its name."""
        module, leaf = name.rsplit(".", 1)
        pattern, layer = re.sub(r"\.\d+\.", ".*.", module), re.search(r"\.(\d+)\.", module)
        if pattern not in self.architecture.axes:
            raise UserError(f"model.path: '{name}' of '{self.config.model_type}' is not known to be elastic")
        axes = self.architecture.axes[pattern]
        return TensorAxes(axes[:1] if leaf == "bias" else axes, shape, int(layer[1]) if layer else None)

    def full_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter in the full model, also of an output matrix that is tied to the embedding."""
        return self._parameters[name if name in self._parameters else "model.embed_tokens.weight"]

    def cut_shape(self, name: str, spec: SubnetSpec) -> tuple[int, ...] | None:
        """Shape of a parameter in a subnet; None if the subnet drops its layer."""
        tensor, sizes = self.tensors[name], self.shape.sizes(spec)
        if tensor.layer is not None and tensor.layer not in spec.layers:
            return None
        return tuple(sizes.get(axis, length) for axis, length in zip(tensor.axes, tensor.shape, strict=True))

    def parameters(self, spec: SubnetSpec, *, layers_only: bool = False) -> int:
        """Parameters of a subnet as a checkpoint has them (tied matrices once); `layers_only`: without embeddings and
        heads."""
        shapes = [
            self.cut_shape(name, spec)
            for name, tensor in self.tensors.items()
            if not layers_only or tensor.layer is not None
        ]
        return sum(prod(shape) for shape in shapes if shape is not None)

    def flops(self, spec: SubnetSpec, tokens: int) -> int:
        """Floating-point operations of one forward over `tokens` tokens: 2 per weight of every projection and token,
        and 4 x tokens^2 x width for the attention scores and their values (full square, as sdpa computes it)."""
        sizes, total = self.shape.sizes(spec), 0
        for name, (out_axis, *rest) in self.architecture.axes.items():
            if not rest or "embed" in name:
                continue
            per_token = 2 * self._length(name, out_axis, 0, sizes) * self._length(name, rest[0], 1, sizes)
            count = spec.depth if ".*." in name else 1
            total += count * per_token * (1 if name in ("bert.pooler.dense", "classifier") else tokens)
        return total + spec.depth * 4 * tokens * tokens * sizes[HEADS]

    def _length(self, module: str, axis: str, dim: int, sizes: Mapping[str, int]) -> int:
        if axis in sizes:
            return sizes[axis]
        if axis == VOCAB:
            return self.config.vocab_size
        return self._parameters[f"{module}.weight"][dim]
