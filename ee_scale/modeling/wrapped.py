"""Models that read images too: the language model inside is what takes exits, and what a text alone goes through."""

import copy
import re
from typing import Any

from transformers import PreTrainedConfig

# What their tensors are called, now and by older versions -> as in the language model's own folders.
KEY_MAPPING = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.": "model.",
    r"^model\.language_model\.": "model.",
}
OF_THE_WHOLE = ("dtype", "tie_word_embeddings", "early_exit")  # said of the language model beside its config
MARK = "language_model_of"


def language_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the language model in a wrapper, which MARK says; any other config is returned as it is."""
    inside = getattr(config, "text_config", None)
    if not isinstance(inside, PreTrainedConfig):
        return config
    found = copy.deepcopy(inside)
    for name in OF_THE_WHOLE:
        if (value := getattr(config, name, None)) is not None:
            setattr(found, name, value)
    setattr(found, MARK, config.model_type)
    return found


def is_wrapped(config: PreTrainedConfig) -> bool:
    """Whether a config is one of `language_config`, out of a wrapper's folder."""
    return getattr(config, MARK, None) is not None


def language_name(config: PreTrainedConfig, name: str) -> str:
    """What a tensor of the folder that `config` comes from is called in a folder of the language model alone."""
    for pattern, start in KEY_MAPPING.items() if is_wrapped(config) else ():
        name = re.sub(pattern, start, name)
    return name


def opening(config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the class of `config`, in the folder that it comes from."""
    return {"config": config, **({"key_mapping": KEY_MAPPING} if is_wrapped(config) else {})}
