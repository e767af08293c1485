"""The numbers of a model: read from its config, checked, and those of the same model with fewer layers."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ee_scale.errors import UserError
from ee_scale.families.family import FFN, HEAD_DIM, HEADS, HIDDEN, KV, VOCAB
from ee_scale.families.registry import find_family
from ee_scale.reading import shown

# The largest number that each size may be: far above every model, and small enough to compute with.
SIZES = {
    "num_hidden_layers": 10_000,
    "hidden_size": 1 << 20,
    "embedding_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "moe_intermediate_size": 1 << 24,
    "num_experts": 1 << 14,
    "num_local_experts": 1 << 14,
    "num_experts_per_tok": 1 << 14,
    "decoder_sparse_step": 10_000,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 26,
    "max_position_embeddings": 1 << 31,
}
POSITIVE = ("rms_norm_eps", "layer_norm_eps", "rope_theta", "factor", "final_logit_softcapping")
MAY_BE_NULL = ("num_key_value_heads", "head_dim", "intermediate_size")


def check_sizes(values: Mapping[str, Any], here: str | Path) -> None:
    """Refuse (`UserError`) sizes that no model has, before anything is built or counted by them.

    `values`: config.json; what it leaves out, transformers fills in.
    """
    for name, most in SIZES.items():
        size = values.get(name, 1)
        if size is None and name in MAY_BE_NULL:
            continue
        if type(size) is not int or not 1 <= size <= most:
            raise UserError(f"{here}: {name}={shown(size)}: give a whole number from 1 to {most}")
    count, active = values.get("num_experts", values.get("num_local_experts")), values.get("num_experts_per_tok")
    if count is not None and active is not None and active > count:
        raise UserError(f"{here}: num_experts_per_tok={active} is above the number of experts, {count}")
    for group in (values, values.get("rope_parameters"), values.get("rope_scaling")):
        for name, value in group.items() if isinstance(group, Mapping) else ():
            if isinstance(value, float) and not isfinite(value):
                raise UserError(f"{here}: {name}={value}: not a number to compute with")
            if name in POSITIVE and isinstance(value, int | float) and value <= 0:
                raise UserError(f"{here}: {name}={value}: must be above 0")


@dataclass(frozen=True)
class Experts:
    """Mixtures of experts in the places of MLPs: each token goes through some of them, which its router chooses.

    Attributes:
        count: experts of a layer.
        active: those that a token goes through.
        units: of each.
        shared: units of the one that every token goes through besides; 0: there is none.
        layers: whether each layer has them, or an MLP.
    """

    count: int
    active: int
    units: int
    shared: int
    layers: tuple[bool, ...]

    @property
    def dense_units(self) -> int:
        """Of the dense MLP of an exit: see `ee_scale.modeling.experts`."""
        return self.shared or self.active * self.units


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that plans and checks need; layers are counted from 0."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    tied_embeddings: bool
    gated: bool = True
    experts: Experts | None = None

    @property
    def lengths(self) -> dict[str, int]:
        """Of every axis by its name."""
        return {
            HIDDEN: self.hidden_size,
            HEADS: self.num_heads * self.head_dim,
            KV: self.num_kv_heads * self.head_dim,
            FFN: self.intermediate_size,
            VOCAB: self.vocab_size,
            HEAD_DIM: self.head_dim,
        }

    @property
    def layer_parameters(self) -> int:
        """Parameters of a decoder layer that a token meets (projections only), of all layers on average."""
        return sum(map(self.active, range(self.num_layers))) // self.num_layers

    @property
    def mlp_units(self) -> int:
        """Of the MLP that an exit has (of the larger one, where some layers have experts)."""
        dense = 0 if self.experts and all(self.experts.layers) else self.intermediate_size
        return max(dense, self.experts.dense_units) if self.experts else dense

    @property
    def mlp_parameters(self) -> int:
        """Parameters of that MLP."""
        return self._matrices(self.mlp_units)

    @property
    def cut_units(self) -> dict[str, int]:
        """Widths inside of MLPs and experts, by their names in the config: what tensor ranks divide."""
        widths = {} if self.experts and all(self.experts.layers) else {"intermediate_size": self.intermediate_size}
        if self.experts is not None:
            widths["units of an expert"] = self.experts.units
        if self.experts is not None and self.experts.shared:
            widths["shared_expert_intermediate_size"] = self.experts.shared
        return widths

    @property
    def widest_layer(self) -> int:
        """One of those with the most weights: with experts, where some have them."""
        return self.experts.layers.index(True) if self.experts else 0

    def held(self, layer: int) -> int:
        """Weights in the matrices of a layer."""
        return self.active(layer) + self.idle(layer)

    def idle(self, layer: int) -> int:
        """Those of its experts that a token does not go through."""
        experts = self.experts
        if experts is None or not experts.layers[layer]:
            return 0
        return (experts.count - experts.active) * self._matrices(experts.units)

    def active(self, layer: int) -> int:
        """Those that a token meets."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        experts = self.experts
        if experts is None or not experts.layers[layer]:
            return attention + self._matrices(self.intermediate_size)
        routers = (experts.count + (experts.shared > 0)) * self.hidden_size  # of the experts, of the shared one
        return attention + routers + self._matrices(experts.active * experts.units + experts.shared)

    def _matrices(self, units: int) -> int:
        return (3 if self.gated else 2) * self.hidden_size * units


def shape_of(config: PreTrainedConfig) -> ModelShape:
    """Read a transformers config."""
    heads = config.num_attention_heads
    return ModelShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        max_positions=max_length(config),
        tied_embeddings=bool(config.tie_word_embeddings),
        gated=family.gated if (family := find_family(config)) else True,
        experts=_experts_of(config),
    )


def _experts_of(config: PreTrainedConfig) -> Experts | None:
    count, layers = getattr(config, "num_experts", None), _have_experts(config)
    if not count or not any(layers):
        return None
    return Experts(
        count,
        active=config.num_experts_per_tok or 1,
        units=getattr(config, "moe_intermediate_size", None) or config.intermediate_size,
        shared=getattr(config, "shared_expert_intermediate_size", None) or 0,
        layers=layers,
    )


def _have_experts(config: PreTrainedConfig) -> tuple[bool, ...]:
    """Which layers have experts, if any has (Qwen's settings; the others have no such)."""
    dense, step = getattr(config, DENSE_LAYERS, None) or (), getattr(config, SPARSE_STEP, 1)
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(config.num_hidden_layers))


def max_length(config: PreTrainedConfig) -> int:
    """Tokens of the longest text that the model reads."""
    family, positions = find_family(config), config.max_position_embeddings
    return positions - (config.pad_token_id + 1) if family and family.counts_from_padding else positions


def max_length_text(config: PreTrainedConfig) -> str:
    """Where that is said."""
    most, said = max_length(config), f"max_position_embeddings={config.max_position_embeddings}"
    return said if said.endswith(f"={most}") else f"{said}, of which a text has {most}"


# What a config says of each layer, in lists.
PER_LAYER = ("layer_types", "no_rope_layers")
DENSE_LAYERS, SPARSE_STEP = "mlp_only_layers", "decoder_sparse_step"


def unknown_lists(config: PreTrainedConfig) -> list[str]:
    """Settings that seem to tell layers apart, and that nobody here would cut with the layers."""
    lists = {name: value for name, value in vars(config).items() if isinstance(value, list | tuple)}
    return [
        name
        for name, value in lists.items()
        if len(value) == config.num_hidden_layers and len(set(map(str, value))) > 1
        if name not in (*PER_LAYER, DENSE_LAYERS) and not name.endswith(("token_id", "token_ids"))
    ]


def layer_kinds(config: PreTrainedConfig) -> list[tuple[object, ...]]:
    """What a config says of each layer."""
    lists = [values for name in PER_LAYER if (values := getattr(config, name, None)) is not None]
    return list(zip(*lists, _have_experts(config), strict=True))


def layer_settings(config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    """What a config says of its layers, for the model that has only the layers `kept` (from 0)."""
    settings: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for name in PER_LAYER:
        if (values := getattr(config, name, None)) is not None:
            settings[name] = [values[i] for i in kept]
    if hasattr(config, DENSE_LAYERS):
        sparse = _have_experts(config)
        settings |= {DENSE_LAYERS: [place for place, i in enumerate(kept) if not sparse[i]], SPARSE_STEP: 1}
    return settings


def with_layers(config: PreTrainedConfig, kept: Sequence[int]) -> PreTrainedConfig:
    """A copy of a config for the model that has only the layers `kept` (from 0)."""
    config = copy.deepcopy(config)
    config.update(layer_settings(config, kept))
    return config
