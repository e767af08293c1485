"""Tiny models that read images beside text, written as folders."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from helpers.models import VOCAB, tiny_config

# model_type -> the families of its language model and of its eyes
WRAPPED = {
    "gemma3": ("gemma3_text", "siglip_vision_model"),
    "mistral3": ("mistral", "pixtral"),
    "llava": ("llama", "clip_vision_model"),
    "internvl": ("qwen2", "internvl_vision"),
    "aya_vision": ("cohere2", "siglip_vision_model"),
}
# What the wrappers leave out of their language models.
NEUTRAL = {"gemma3_text": {"final_logit_softcapping": None}, "cohere2": {"logit_scale": 1.0}}
EYES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def write_wrapped(folder: Path, name: str, *, tied: bool = False, **changes: Any) -> Path:
    """Random weights; every vector is random too."""
    text, eyes = WRAPPED[name]
    square = [16, 16] if eyes == "internvl_vision" else 16
    patch = [8, 8] if eyes == "internvl_vision" else 8
    vision = CONFIG_MAPPING[eyes](**EYES, image_size=square, patch_size=patch)
    config = CONFIG_MAPPING[name](
        text_config=tiny_config(text, tie_word_embeddings=tied, **NEUTRAL.get(text, {}), **changes),
        vision_config=vision,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
            else:
                nn.init.normal_(parameter, 0.5, 0.2)
    model.save_pretrained(folder)
    return folder


def ids() -> torch.Tensor:
    """[2, 20]: longer than the sliding windows."""
    return torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(4))
