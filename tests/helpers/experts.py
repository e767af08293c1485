"""Tiny random models with experts."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from helpers.models import VOCAB

EXPERTS, CHOSEN = 8, 3
SETTINGS: dict[str, dict[str, Any]] = {
    "mixtral": {"head_dim": 16, "sliding_window": None, "num_local_experts": EXPERTS},
    "qwen3_moe": {"head_dim": 16, "moe_intermediate_size": 20, "num_experts": EXPERTS, "norm_topk_prob": True},
    "olmoe": {"num_experts": EXPERTS},
}


def expert_config(family: str, **changes: Any) -> PreTrainedConfig:
    """Four layers, eight query heads over four key/value heads; Qwen3's experts are narrower than a dense MLP."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_experts_per_tok": CHOSEN,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return CONFIG_MAPPING[family](**(values | SETTINGS[family] | changes))


def write_expert_model(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """Write a random model in fp32; no vector in it is neutral."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(expert_config(family, **changes), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):  # zeros in some families: all experts alike
                nn.init.normal_(parameter, 0.0, 0.3)
            elif parameter.ndim > 1:
                parameter.mul_(3)
            else:
                nn.init.normal_(parameter, 1.0, 0.2)
    model.save_pretrained(folder)
    return folder
