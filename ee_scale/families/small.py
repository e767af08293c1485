"""A small model that computes as a large one does: its config with a layer of each kind, few heads and few words."""

from typing import Any

from transformers import PreTrainedConfig

from ee_scale.families.sizes import layer_kinds, shape_of, with_layers

VOCAB, WIDTH, INNER, HEADS = 96, 64, 48, 4
EXPERTS, ACTIVE, UNITS = 6, 2, 24
WINDOW = 8  # shorter than the texts that the model is tried with


def small_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """What differs between layers, the head's width (which rotary tables depend on) and every other setting stay."""
    shape, small = shape_of(config), with_layers(config, _kept(config))
    # Where heads fill the width in the large model, its code may need that.
    filled = shape.num_heads * shape.head_dim == shape.hidden_size
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HEADS * shape.head_dim if filled else WIDTH,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "pad_token_id": None,
    }
    if hasattr(config, "num_key_value_heads"):
        sizes["num_key_value_heads"] = HEADS if shape.num_kv_heads == shape.num_heads else HEADS // 2
    if getattr(config, "sliding_window", None) is not None:
        sizes["sliding_window"] = WINDOW
    if shape.experts is not None:
        sizes |= {"num_experts": EXPERTS, "num_experts_per_tok": min(ACTIVE, shape.experts.active)}
        widths = ("moe_intermediate_size", "shared_expert_intermediate_size")
        sizes |= {name: UNITS for name in widths if getattr(config, name, None)}
    small.update(sizes)
    return small


def _kept(config: PreTrainedConfig) -> list[int]:
    """The first layer of each kind, and those again the other way round: two halves that differ in their order."""
    kinds = layer_kinds(config)
    first = [i for i, kind in enumerate(kinds) if kinds.index(kind) == i]
    return first + first[::-1]
