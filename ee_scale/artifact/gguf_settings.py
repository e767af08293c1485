"""What llama.cpp computes of an architecture, and what of a config its file must say: nothing else may be asked for."""

from collections.abc import Iterator
from math import pi
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from transformers import PreTrainedConfig

from ee_scale.backbone.gguf_file import gguf
from ee_scale.errors import UserError
from ee_scale.families.llama_cpp import LlamaCpp
from ee_scale.families.registry import FAMILIES
from ee_scale.reading import shown

# Settings that change nothing that is computed here, and those that are written or that the tensors show.
SILENT = {
    *("_name_or_path", "architectures", "attention_dropout", "cache_implementation", "dtype", "early_exit", "id2label"),
    *("initializer_range", "is_decoder", "label2id", "max_window_layers", "output_attentions", "output_hidden_states"),
    *("pretraining_tp", "return_dict", "tie_word_embeddings", "transformers_version", "use_cache"),
    "use_sliding_window",
}
WRITTEN = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "sliding_window"),
    *("layer_types", "sliding_window_pattern", "_sliding_window_pattern", "attention_bias", "mlp_bias"),
}


def architecture_of(config: PreTrainedConfig, folder: Path) -> LlamaCpp:
    """What runs a model of this config. Raises `UserError` for a family that is not known, or a setting that llama.cpp
    does not follow.
    """
    family = FAMILIES.get(config.model_type)
    if family is None or family.llama_cpp is None:
        known = ", ".join(name for name, known in FAMILIES.items() if known.llama_cpp is not None)
        raise UserError(f"src={folder}: config.model_type={config.model_type}: format=gguf knows {known}")
    found, usual, values = family.llama_cpp, type(config)().to_dict(), config.to_dict()
    known_names = SILENT | WRITTEN | found.settings.keys()
    if found.head_scale is not None:
        known_names |= {"query_pre_attn_scalar"}
    if found.no_rope_every:
        known_names |= {"no_rope_layers", "no_rope_layer_interval"}
    for name in usual:
        if name not in known_names and not name.endswith("_token_id") and values.get(name) != usual[name]:
            _refuse(folder, name, values.get(name), f"computes with {shown(usual[name])}")
    for name in found.settings:
        if values[name] is None:
            _refuse(folder, name, None, "computes with a number")
    for name, holds, why in _taken(found, config):
        if not holds:
            _refuse(folder, name, getattr(config, name), why)
    _rope(config, found, folder)
    return found


def _refuse(folder: Path, name: str, value: object, why: str) -> NoReturn:
    raise UserError(
        f"src={folder}: config.{name}={shown(value)}: llama.cpp {why}, and no GGUF file of this architecture says else"
    )


def _taken(found: LlamaCpp, config: PreTrainedConfig) -> Iterator[tuple[str, bool, str]]:
    """(setting, whether it is what llama.cpp takes for granted, what that is)."""
    layers, size, head_dim = range(config.num_hidden_layers), config.max_position_embeddings, _head_dim(config)
    types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if every := found.window_every:
        wanted = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in layers]
        yield "layer_types", types == wanted, f"has a window in all layers but each {every}th"
    elif window is not None and (types is None or "sliding_attention" in types):
        yield "sliding_window", window >= size, f"has no window, and the model reads {size} tokens"
    if found.head_scale is not None:
        holds = config.query_pre_attn_scalar == head_dim and len(layers) != found.head_scale
        yield "query_pre_attn_scalar", holds, f"scales {len(layers)} layers by something else"
    if every := found.no_rope_every:
        with_rope = [int((i + 1) % every != 0) for i in layers]
        yield (
            "no_rope_layers",
            config.no_rope_layers == with_rope,
            f"leaves positions out of each {every}th layer",
        )
    if found.wide:
        narrow = config.hidden_size // config.num_attention_heads
        yield "head_dim", head_dim == narrow, f"takes hidden_size / num_attention_heads, {narrow}"
    if not found.own_head:
        yield "tie_word_embeddings", config.tie_word_embeddings, "takes the embedding as output matrix"


def _rope(config: PreTrainedConfig, found: LlamaCpp, folder: Path) -> dict[str, Any]:
    """The rotary settings of layers that read everything."""
    rope = config.rope_parameters
    if found.local_theta is not None:
        local, rope = rope["sliding_attention"], rope["full_attention"]
        if (local["rope_theta"], local["rope_type"]) != (found.local_theta, "default"):
            _refuse(folder, "rope_parameters.sliding_attention", local, f"takes {found.local_theta}")
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        _refuse(folder, "rope_parameters.rope_type", rope["rope_type"], "is told default, linear and llama3 here")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        _refuse(folder, "rope_parameters.partial_rotary_factor", rope["partial_rotary_factor"], "takes 1")
    return rope


def tensor_names(found: LlamaCpp, config: PreTrainedConfig) -> gguf.TensorNameMap:
    """Parameters of transformers -> tensors."""
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == found.name)
    return gguf.get_tensor_name_map(arch, config.num_hidden_layers)


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def add_settings(writer: gguf.GGUFWriter, found: LlamaCpp, config: PreTrainedConfig) -> None:
    """Write those of a config that `architecture_of` has taken, as llama.cpp's own converter names them."""
    rope, head_dim = _rope(config, found, Path()), _head_dim(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if found.window_every:
        writer.add_sliding_window(config.sliding_window)
    for name, add in found.settings.items():
        getattr(writer, add)(getattr(config, name))


def rope_factors(config: PreTrainedConfig) -> np.ndarray | None:
    """Llama 3.1's scaling: what each of the head's frequencies is divided by, fp32 [head_dim / 2]."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    dim, length = _head_dim(config), rope["original_max_position_embeddings"]
    waves = 2 * pi * rope["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((length / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)
