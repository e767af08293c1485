"""Tiny random models of every family, written as Hugging Face folders; and specs of exits on them."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ee_scale.exits.placement import exit_spec
from ee_scale.families.decoders import DECODERS
from ee_scale.modeling.heads import ExitSpec

FAMILIES = tuple(family.name for family in DECODERS if family.axes)
MORE_FAMILIES = tuple(family.name for family in DECODERS if not family.axes)
NEUTRAL = {family.name: family.neutral_norm for family in DECODERS}
VOCAB = 131  # odd: tp = 2 and 4 both pad
SLIDING_WINDOW = 8
SHORTLIST = 37  # so is this one


_WINDOWS = {"sliding_window": SLIDING_WINDOW}
_NARROW = {"head_dim": 8}  # heads that fill the width
_BASES = {"full_attention": 500_000.0, "sliding_attention": 50.0}
_TABLES = {kind: {"rope_type": "default", "rope_theta": base} for kind, base in _BASES.items()}
MORE_SETTINGS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        **_WINDOWS,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 16,
        "final_logit_softcapping": 4.0,
    },
    "vaultgemma": {
        **_WINDOWS,
        **{"query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0},
    },
    "olmo": _NARROW,
    "olmo3": {**_WINDOWS, **_NARROW, "rope_parameters": _TABLES},
    "exaone4": {**_WINDOWS, **_NARROW},
    "granite": {
        **_NARROW,
        **{"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 1.3, "attention_multiplier": 0.1},
    },
    "cohere": {**_NARROW, "logit_scale": 0.3},
    "cohere2": {**_WINDOWS, **_NARROW, "logit_scale": 0.3},
    "starcoder2": {**_WINDOWS, **_NARROW},
    "ministral": _WINDOWS,
    "ministral3": {
        **_WINDOWS,
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 8},
            "llama_4_scaling_beta": 0.5,
        },
    },
    "smollm3": {**_WINDOWS, **_NARROW, "use_sliding_window": True},
    "helium": _NARROW,
    "cwm": _WINDOWS,
    "phi3": {**_WINDOWS, **_NARROW},
    "mixtral": {**_WINDOWS, "num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 32},
    "qwen2_moe": {
        **_NARROW,
        **{"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "mlp_only_layers": [1]},
        "shared_expert_intermediate_size": 48,
    },
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "olmoe": {**_NARROW, "num_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 32},
}
# Families whose models mostly go without a setting that some of them have.
_SOME_WINDOWS = {**_WINDOWS, "use_sliding_window": True, "max_window_layers": 2}
_WINDOWED = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")
MORE_SETTINGS |= {f"{name}-windows": MORE_SETTINGS.get(name, {}) | _SOME_WINDOWS for name in _WINDOWED}
VARIANTS = tuple(f"{name}-windows" for name in _WINDOWED)
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")


def tiny_config(family: str, **changes: Any) -> Any:
    """Five layers, eight query heads over four key/value heads, head_dim that is not hidden / heads where allowed.

    `family`: its name, or one of VARIANTS.
    """
    model_type = family.partition("-")[0]
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    if family == "mistral":
        values["sliding_window"] = SLIDING_WINDOW
    if family == "gemma2":
        # Caps that are low enough to bend these models' logits.
        values |= {"sliding_window": SLIDING_WINDOW, "query_pre_attn_scalar": 16}
        values |= {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0}
    if model_type in ("qwen2", "olmo2"):
        del values["head_dim"]
    values |= copy.deepcopy(MORE_SETTINGS.get(family, {}))
    return CONFIG_MAPPING[model_type](**(values | changes))


def some_tokens(count: int = SHORTLIST, vocab_size: int = VOCAB) -> list[int]:
    """Token ids for a shortlist, in no order that anything else has."""
    return torch.randperm(vocab_size, generator=torch.Generator().manual_seed(9))[:count].tolist()


def spec_of(config: Any, layers: Sequence[int], kind: str, head: str, rank: int = 4) -> ExitSpec:
    """The spec of exits on a tiny model; a shortlist head scores `some_tokens`."""
    spec = exit_spec(config, layers, kind, head, rank, min(SHORTLIST, config.vocab_size // 2))
    return replace(spec, shortlist_ids=tuple(some_tokens(spec.shortlist, config.vocab_size)))


def write_model(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """Write a random model in fp32. Every vector is random too: a neutral norm or a zero bias would hide mistakes."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
            else:
                neutral = NEUTRAL[model.config.model_type]
                nn.init.normal_(parameter, 0.0 if name.endswith(".bias") else neutral, 0.2)
    model.save_pretrained(folder)
    return folder


def load_whole(folder: Path) -> nn.Module:
    """transformers' own model, fp32, frozen."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
