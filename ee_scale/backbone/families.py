"""What differs per architecture, as data. A family is added here, in one place."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from ee_scale.errors import UserError
from ee_scale.reading import shown


@dataclass(frozen=True)
class Family:
    """Names inside a decoder layer, and how much of transformers' own plans apply.

    Attributes:
        mlp_input_norm: norm whose input is the residual stream and whose output feeds the MLP;
            None when the MLP reads the residual stream itself.
        mlp_output_norm: norm between the MLP and the residual addition, or None.
        logit_softcap: config attribute that caps the final logits, or None.
        embedding_scale: attribute of the embedding that multiplies its output, or None.
        neutral_norm: weight of a norm that only normalises (Gemma multiplies by 1 + weight).
    """

    mlp_input_norm: str | None = "post_attention_layernorm"
    mlp_output_norm: str | None = None
    logit_softcap: str | None = None
    embedding_scale: str | None = None
    neutral_norm: float = 1.0


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma2": Family(
        mlp_input_norm="pre_feedforward_layernorm",
        mlp_output_norm="post_feedforward_layernorm",
        logit_softcap="final_logit_softcapping",
        embedding_scale="scalar_embed_scale",
        neutral_norm=0.0,
    ),
    "olmo2": Family(mlp_input_norm=None, mlp_output_norm="post_feedforward_layernorm"),
}


def family_of(config: Any) -> Family:
    """The family of a transformers config. Raises `UserError` with the supported names."""
    try:
        return FAMILIES[config.model_type]
    except KeyError:
        raise UserError(
            f"model.path: architecture '{config.model_type}' is not supported; supported: {', '.join(FAMILIES)}"
        ) from None


# The largest number that each size may be: far above every model, and small enough to compute with.
SIZES = {
    "num_hidden_layers": 10_000,
    "hidden_size": 1 << 20,
    "embedding_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 26,
    "max_position_embeddings": 1 << 31,
}
POSITIVE = ("rms_norm_eps", "layer_norm_eps", "rope_theta", "factor", "final_logit_softcapping")
MAY_BE_NULL = ("num_key_value_heads", "head_dim", "intermediate_size")


def check_sizes(values: Mapping[str, Any], here: Any) -> None:
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

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer (projections only)."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return attention + self.mlp_parameters

    @property
    def mlp_parameters(self) -> int:
        """Parameters of one gated MLP."""
        return 3 * self.hidden_size * self.intermediate_size


def shape_of(config: Any) -> ModelShape:
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
    )
