"""The `args` of a Megatron checkpoint and the config of the Hugging Face model: one told in the words of the other."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from ee_scale.conversion import expert_args
from ee_scale.errors import UserError, one_line
from ee_scale.families.decoders import DECODERS
from ee_scale.families.registry import FAMILIES, megatron_family
from ee_scale.families.sizes import check_sizes, shape_of

# What Megatron's rotary embedding has for the type llama3, and no argument changes.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# args that must have this value (or be absent), because no Hugging Face family here has another.
FIXED = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
    "window_attn_skip_freq": None,
    "no_rope_freq": None,
    "qk_l2_norm": False,
    "softmax_type": "vanilla",
    "attention_output_gate": False,
    "multi_latent_attention": False,
    "mtp_num_layers": None,
    "heterogeneous_layers_config_path": None,
}
NEEDED = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "max_position_embeddings",
)


def check_config(config: PreTrainedConfig) -> None:
    """Raise `UserError` for a Hugging Face config that Megatron's GPT model cannot compute."""
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            raise UserError(f"config.{name}=true: Megatron's layers have no such biases alone; it cannot be converted")
    if config.hidden_act != "silu":
        raise UserError(f"config.hidden_act={config.hidden_act}: only silu (swiglu) can be converted")
    rope = rope_of(config)
    kind = rope["rope_type"]
    if kind not in ("default", "linear", "llama3"):
        raise UserError(f"config.rope_parameters.rope_type={kind}: Megatron knows default, linear and llama3")
    if kind == "llama3":
        for name, value in LLAMA3.items():
            if rope.get(name, value) != value:
                raise UserError(f"config.rope_parameters.{name}={rope[name]}: Megatron has {value} built in")
    if float(rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"config.rope_parameters.partial_rotary_factor={rope['partial_rotary_factor']}: only 1.0")
    if rope["rope_theta"] != int(rope["rope_theta"]):
        raise UserError(
            f"config.rope_parameters.rope_theta={rope['rope_theta']}: Megatron's --rotary-base is an integer"
        )
    if getattr(config, "clip_qkv", None) is not None:
        raise UserError(f"config.clip_qkv={config.clip_qkv}: Megatron's layers do not clip queries, keys and values")
    window_of(config)
    expert_args.check_experts(config)


def rope_of(config: PreTrainedConfig) -> dict[str, Any]:
    """rope_parameters of a config as transformers 5 normalises them: at least rope_type and rope_theta."""
    return {"rope_type": "default", "rope_theta": 10000.0, **(config.rope_parameters or {})}


def window_of(config: PreTrainedConfig) -> int | None:
    """Width of the sliding window that every layer has; None: none. Raises `UserError` if layers differ."""
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds == {"full_attention"} or window is None:
        return None
    if len(kinds) > 1:
        raise UserError(
            f"config.layer_types: {' and '.join(sorted(kinds))} in one model (use_sliding_window); "
            "Megatron's --window-size holds for every layer"
        )
    return window


def to_args(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    tp: int,
    pp: int,
    padded_vocab: int,
    divisor: int,
    uneven: tuple[int | None, int | None] = (None, None),
    ep: int = 1,
) -> Namespace:
    """`args` of plain values only, so that a reader needs nothing but `argparse.Namespace` to open them.

    `uneven`: layers of the first and of the last stage, where they are not those of every stage.
    """
    shape, rope, window = shape_of(config), rope_of(config), window_of(config)
    names = megatron_family(config).megatron
    return Namespace(
        num_layers=shape.num_layers,
        encoder_num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.intermediate_size,
        num_attention_heads=shape.num_heads,
        group_query_attention=shape.num_kv_heads != shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        seq_length=shape.max_positions,
        vocab_size=shape.vocab_size,
        padded_vocab_size=padded_vocab,
        make_vocab_size_divisible_by=divisor,
        norm_epsilon=config.rms_norm_eps,
        layernorm_epsilon=config.rms_norm_eps,
        rotary_base=int(rope["rope_theta"]),
        use_rotary_position_embeddings=True,
        add_position_embedding=True,
        use_rope_scaling=rope["rope_type"] == "llama3",
        rope_scaling_factor=float(rope.get("factor", 8.0)),
        rotary_seq_len_interpolation_factor=rope["factor"] if rope["rope_type"] == "linear" else None,
        add_qkv_bias=names.qkv_bias,
        qk_layernorm=names.qk_norms,
        window_size=None if window is None else (window - 1, 0),
        untie_embeddings_and_output_weights=not shape.tied_embeddings,
        attention_dropout=config.attention_dropout,
        hidden_dropout=0.0,
        init_method_std=config.initializer_range,
        tensor_model_parallel_size=tp,
        expert_model_parallel_size=ep,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=None,
        decoder_first_pipeline_num_layers=uneven[0],
        decoder_last_pipeline_num_layers=uneven[1],
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        tokenizer_type="HuggingFaceTokenizer",
        iteration=1,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        **(FIXED | expert_args.expert_args(config)),
    )


def to_config(args: Namespace, vocab_size: int | None) -> Any:
    """The Hugging Face config that computes the same.

    `vocab_size`: words of the tokenizer; None: as `args` say. Raises `UserError` for what no family here has.
    """
    for name, value in FIXED.items():
        if (found := getattr(args, name, value)) != value and (found or value):
            raise UserError(f"args.{name}={found}: only {value} can be told to Hugging Face's families")
    if missing := [name for name in NEEDED if getattr(args, name, None) is None]:
        raise UserError(f"args: no {missing[0]} in the checkpoint; give model=<Hugging Face folder with config.json>")
    family = family_of_args(args)
    names = FAMILIES[family].megatron
    words = vocab_size or getattr(args, "vocab_size", None)
    if words is None:
        raise UserError(
            "vocab_size: the checkpoint has padded vocabulary matrices and does not say how many rows are words; "
            "give model=<Hugging Face folder with config and tokenizer>"
        )
    heads = args.num_attention_heads
    values: dict[str, Any] = {
        "vocab_size": words,
        "hidden_size": args.hidden_size,
        "intermediate_size": args.ffn_hidden_size,
        "num_hidden_layers": args.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": args.num_query_groups if getattr(args, "group_query_attention", False) else heads,
        "max_position_embeddings": args.max_position_embeddings,
        "rms_norm_eps": getattr(args, "norm_epsilon", None) or getattr(args, "layernorm_epsilon", 1e-5),
        "tie_word_embeddings": not getattr(args, "untie_embeddings_and_output_weights", False),
        "rope_parameters": _rope(args),
        "attention_dropout": getattr(args, "attention_dropout", 0.0),
        "initializer_range": getattr(args, "init_method_std", 0.02),
    }
    head_dim = getattr(args, "kv_channels", None) or args.hidden_size // heads
    if names.head_dim:
        values["head_dim"] = head_dim
    elif head_dim * heads != args.hidden_size:
        raise UserError(
            f"args.kv_channels={head_dim}: {family.capitalize()} has hidden_size / num_attention_heads only"
        )
    if window := getattr(args, "window_size", None):
        values |= {"sliding_window": window[0] + 1}
        if not names.windowed:
            values |= {"use_sliding_window": True, "max_window_layers": 0}
    elif names.windowed:
        values["sliding_window"] = None
    if names.experts:
        values |= expert_args.expert_values(args, names.experts)
    check_sizes(values, "args")
    try:
        config = AutoConfig.for_model(family, **values, bos_token_id=None, eos_token_id=None)
    except Exception as error:  # each class of transformers fails in its own way over odd values
        raise UserError(f"args: {one_line(error)}; give model=<Hugging Face folder with config.json>") from error
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    return config


AGREEING = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "rotary_base",
    "use_rope_scaling",
    "add_qkv_bias",
    "qk_layernorm",
    "untie_embeddings_and_output_weights",
    "norm_epsilon",
    "window_size",
    "rotary_seq_len_interpolation_factor",
    "num_experts",
)


def check_agrees(args: Namespace, config: PreTrainedConfig, place: Path) -> None:
    """Raise `UserError` if a checkpoint's `args`, where they say something, describe another model than `config`."""
    wanted = vars(to_args(config, torch.float32, 1, 1, 0, 1))
    names = [*AGREEING, *(["num_query_groups"] if getattr(args, "group_query_attention", False) else [])]
    names += ["rope_scaling_factor"] if wanted["use_rope_scaling"] else []
    if wanted["num_experts"]:
        names = [*(name for name in names if name != "ffn_hidden_size"), *expert_args.AGREEING]
        args = expert_args.plain(args)
    for name in names:
        found = getattr(args, name, wanted[name])
        found = tuple(found) if isinstance(found, list) else found
        if (found or None) != (wanted[name] or None):
            raise UserError(
                f"{place}: its config means {name}={wanted[name]}, but the checkpoint's args say {found}; "
                "give the config of this very model"
            )


def family_of_args(args: Namespace) -> str:
    """`model_type` of the family that has the parts which `args` name, and windows as they say. Raises `UserError`."""
    names = ("add_qkv_bias", "qk_layernorm", "num_experts")
    parts, window = tuple(bool(getattr(args, name, False)) for name in names), bool(getattr(args, "window_size", None))
    fitting = [
        (family.name, known.windowed)
        for family in DECODERS
        if (known := family.megatron)
        and (known.qkv_bias, known.qk_norms, known.experts is not None) == parts
        and not known.wide_norms
    ]
    if not fitting:
        told = ", ".join(f"args.{name}" for name, part in zip(names, parts, strict=True) if part)
        raise UserError(f"{told}: no family here has all of these")
    return next((family for family, windowed in fitting if windowed == window), fitting[0][0])


def flags_to_pass(config: PreTrainedConfig, uneven: tuple[int | None, int | None] = (None, None)) -> list[str]:
    """Settings that Megatron-LM's `--use-checkpoint-args` does not restore, as command line flags."""
    rope, window = rope_of(config), window_of(config)
    flags = [f"--norm-epsilon {config.rms_norm_eps:g}"]
    if rope["rope_type"] == "llama3":
        flags.append(f"--use-rope-scaling --rope-scaling-factor {rope['factor']:g}")
    if rope["rope_type"] == "linear":
        flags.append(f"--rotary-seq-len-interpolation-factor {rope['factor']:g}")
    if megatron_family(config).megatron.qk_norms:
        flags.append("--qk-layernorm")
    if window is not None:
        flags.append(f"--window-size {window - 1},0")
    for name, count in zip(("first", "last"), uneven, strict=True):
        if count is not None:
            flags.append(f"--decoder-{name}-pipeline-num-layers {count}")
    return flags


def _rope(args: Namespace) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(getattr(args, "rotary_base", 10000))}
    if getattr(args, "use_rope_scaling", False):
        rope |= {"rope_type": "llama3", "factor": float(getattr(args, "rope_scaling_factor", 8.0)), **LLAMA3}
    elif factor := getattr(args, "rotary_seq_len_interpolation_factor", None):
        rope |= {"rope_type": "linear", "factor": float(factor)}
    return rope
