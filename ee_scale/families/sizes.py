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
    for group in (values, values.get("rope_parameters"), values.get("rope_scaling")):
        for name, value in group.items() if isinstance(group, Mapping) else ():
            if isinstance(value, float) and not isfinite(value):
                raise UserError(f"{here}: {name}={value}: not a number to compute with")
            if name in POSITIVE and isinstance(value, int | float) and value <= 0:
                raise UserError(f"{here}: {name}={value}: must be above 0")


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that plans and checks need."""

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
        """Parameters of one decoder layer (projections only)."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return attention + self.mlp_parameters

    @property
    def mlp_parameters(self) -> int:
        """Parameters of one MLP."""
        return (3 if self.gated else 2) * self.hidden_size * self.intermediate_size


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
        max_positions=config.max_position_embeddings,
        tied_embeddings=bool(config.tie_word_embeddings),
        gated=family.gated if (family := find_family(config)) else True,
    )


# What a config says of each layer, in lists.
PER_LAYER = ("layer_types", "no_rope_layers")


def layer_settings(config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    """What a config says of its layers, for the model that has only the layers `kept` (from 0)."""
    settings: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for name in PER_LAYER:
        if (values := getattr(config, name, None)) is not None:
            settings[name] = [values[i] for i in kept]
    return settings


def with_layers(config: PreTrainedConfig, kept: Sequence[int]) -> PreTrainedConfig:
    """A copy of a config for the model that has only the layers `kept` (from 0)."""
    config = copy.deepcopy(config)
    config.update(layer_settings(config, kept))
    return config
