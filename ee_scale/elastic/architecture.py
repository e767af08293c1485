"""Which axis of which tensor an elastic size cuts, by the tables of its family."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod

import torch
from transformers import PreTrainedConfig

from ee_scale.backbone.parallel import padded_vocab
from ee_scale.elastic.subnet import ElasticShape, SubnetSpec
from ee_scale.errors import UserError
from ee_scale.families.build import meta_model
from ee_scale.families.family import HEADS, SHARDED, VOCAB
from ee_scale.families.registry import elastic_family
from ee_scale.families.sizes import shape_of


def elastic_shape(config: PreTrainedConfig) -> ElasticShape:
    """The full sizes that subnets are cut from."""
    shape, elastic = shape_of(config), elastic_family(config).elastic
    return ElasticShape(
        hidden=shape.hidden_size,
        groups=shape.num_kv_heads,
        ffn=shape.intermediate_size,
        num_layers=shape.num_layers,
        head_dim=shape.head_dim,
        queries_per_group=shape.num_heads // shape.num_kv_heads,
        **asdict(elastic),
    )


def local_length(axis: str, length: int, tp: int) -> int:
    """Of an axis of `length`, on one tensor rank."""
    return padded_vocab(length, tp) // tp if axis == VOCAB else length // tp if axis in SHARDED else length


@dataclass(frozen=True)
class TensorAxes:
    """One parameter: its axes, its full shape, and the layer it belongs to (None: outside the layers)."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    layer: int | None

    def cut(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape where axes have these sizes; the others stay whole."""
        return tuple(sizes.get(axis, length) for axis, length in zip(self.axes, self.shape, strict=True))


class ElasticMap:
    """Every parameter of a model with its axes: what loading, extraction and counting read."""

    def __init__(self, config: PreTrainedConfig, task: str):
        """Raises `UserError` where the architecture is not elastic or has a tensor that is not known."""
        self.config, self.family, self.shape = config, elastic_family(config, task), elastic_shape(config)
        self._parameters: dict[str, tuple[int, ...]] = {}
        for name, parameter in meta_model(config, torch.float32, task=task).named_parameters():
            module, leaf = name.rsplit(".", 1)
            parts = self.family.parts_of(module)
            self._parameters |= {f"{part}.{leaf}": tuple(parameter.chunk(len(parts))[0].shape) for part in parts}

    @cached_property
    def tensors(self) -> dict[str, TensorAxes]:
        """By full name ('model.layers.3.mlp.up_proj.weight'); tied matrices appear once, as transformers lists them,
        and the parts of a fused one follow one another."""
        return {name: self.describe(name, shape) for name, shape in self._parameters.items()}

    def describe(self, name: str, shape: tuple[int, ...]) -> TensorAxes:
        """The axes of a parameter by its name."""
        module, leaf = name.rsplit(".", 1)
        axes, layer = self.family.axes_of(module), re.search(r"\.(\d+)\.", module)
        if axes is None:
            raise UserError(f"model.path: '{name}' of '{self.config.model_type}' is not known to be elastic")
        return TensorAxes(axes[:1] if leaf == "bias" else axes, shape, int(layer[1]) if layer else None)

    @cached_property
    def matrices(self) -> dict[str, TensorAxes]:
        """The same in a run, where a tied output matrix is one of its own."""
        apart = {f"{name}.weight": self.full_shape(f"{name}.weight") for name in self.family.heads}
        return self.tensors | {name: self.describe(name, shape) for name, shape in apart.items()}

    def full_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter in the full model, also of an output matrix that is tied to the embedding."""
        return self._parameters[name if name in self._parameters else "model.embed_tokens.weight"]

    def cut_shape(self, name: str, spec: SubnetSpec) -> tuple[int, ...] | None:
        """Shape of a parameter in a subnet; None if the subnet drops its layer."""
        tensor = self.tensors[name]
        if tensor.layer is not None and tensor.layer not in spec.layers:
            return None
        return tensor.cut(self.shape.sizes(spec))

    def parameters(self, spec: SubnetSpec, *, layers_only: bool = False) -> int:
        """Parameters of a subnet as a checkpoint has them (tied matrices once); `layers_only`: without embeddings and
        heads."""
        shapes = [
            self.cut_shape(name, spec)
            for name, tensor in self.tensors.items()
            if not layers_only or tensor.layer is not None
        ]
        return sum(prod(shape) for shape in shapes if shape is not None)

    @cached_property
    def projections(self) -> dict[str, TensorAxes]:
        """What a token is multiplied by, by module name: matrices of layer 0, which stands for all, and heads."""
        named = {name.replace("*", "0"): axes for name, axes in self.family.axes.items()}
        names = [name for name, axes in named.items() if len(axes) == 2 and "embed" not in name]
        return {name: self.matrices[f"{name}.weight"] for name in names}

    def layer_flops(self, spec: SubnetSpec, tokens: int) -> int:
        """Floating-point operations of one layer, for one of `tokens` tokens: 2 per weight of every projection, and
        4 x tokens x width for the attention scores and their values (full square, as sdpa computes it)."""
        sizes = self.shape.sizes(spec)
        cut = [tensor.cut(sizes) for tensor in self.projections.values() if tensor.layer is not None]
        return 2 * sum(map(prod, cut)) + 4 * tokens * sizes[HEADS]

    def flops(self, spec: SubnetSpec, tokens: int) -> int:
        """Floating-point operations of one forward over `tokens` tokens; a text's own heads read it once."""
        sizes, total = self.shape.sizes(spec), spec.depth * tokens * self.layer_flops(spec, tokens)
        for name in self.family.heads:
            total += 2 * prod(self.projections[name].cut(sizes)) * (1 if name in self.family.text_heads else tokens)
        return total
