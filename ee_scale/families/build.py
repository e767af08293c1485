"""The transformers model of a config, without memory."""

import copy

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from ee_scale.errors import UserError, one_line

AUTO_CLASS = {"causal_lm": AutoModelForCausalLM, "classify": AutoModelForSequenceClassification}


def meta_model(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    *,
    task: str = "causal_lm",
) -> PreTrainedModel:
    """The whole model as transformers builds it, on the meta device. Raises `UserError` if it cannot."""
    extra = {"attn_implementation": attn_implementation} if attn_implementation else {}
    try:
        with torch.device("meta"):
            return AUTO_CLASS[task].from_config(copy.deepcopy(config), dtype=dtype, **extra).eval()
    except Exception as error:  # a setting of its config that the model's code has no answer to
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"model.path: transformers builds no '{config.model_type}' of its config ({reason})") from error
