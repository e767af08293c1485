"""GGUF files of tiny models, written as llama.cpp's converter writes them."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import PreTrainedTokenizerFast

from ee_scale.data.builtin import train_tokenizer
from helpers.models import load_whole, write_model

PAIRED, SHIFTED = ("llama", "mistral", "smollm3", "granite"), ("gemma", "gemma2", "gemma3_text")
VOCAB = 301  # odd; a byte-level tokenizer takes 257 of them
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEXT = "one token reads the hidden state of a layer and an exit says what comes next. " * 4


def chat_model(folder: Path, family: str, vocab_size: int = VOCAB, **changes: Any) -> Path:
    """A random model with a tokenizer for chats: marks of turns, and a word of its own that is no mark."""
    write_model(
        folder, family, vocab_size=vocab_size, bos_token_id=0, eos_token_id=VOCAB - 2, pad_token_id=0, **changes
    )
    tokenizer = train_tokenizer([TEXT], VOCAB - 3)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>"])
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", CHAT
    tokenizer.save_pretrained(folder)
    return folder


def write_gguf(
    path: Path,
    folder: Path,
    kinds: dict[str, Kind] | Kind = Kind.F16,
    *,
    name: str = "tiny",
    architecture: str | None = None,
    settings: dict[str, int | float | str | bool] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    pieces: bool = False,
) -> Path:
    """The model of a Hugging Face folder as one file, of its architecture or one that it only says.

    kinds: type of all matrices, or of those whose gguf name ends so (others are F16); vectors are F32. settings: more
    of '<architecture>.*', or others than the model's; extra: more tensors; pieces: a vocabulary as of sentencepiece,
    not the tokenizer of the folder.
    """
    model = load_whole(folder)
    config = model.config
    arch_name = "llama" if config.model_type == "mistral" else config.model_type
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch_name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    architecture = architecture or arch_name
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    for key, value in (_settings(config) | (settings or {})).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{architecture}.{key}", value)
    if pieces:
        _add_pieces(writer, config.vocab_size)
    else:
        _add_tokenizer(writer, PreTrainedTokenizerFast.from_pretrained(folder), config.vocab_size)
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    for parameter, value in model.state_dict().items():
        if parameter in tied:
            continue
        stored, array = names.get_name(parameter, (".weight", ".bias")), stored_value(parameter, value, config)
        kind = Kind.F32 if array.ndim == 1 else _kind(stored, kinds)
        writer.add_tensor(stored, _quantized(array, kind), raw_dtype=kind)
    for stored, array in (extra or {}).items():
        writer.add_tensor(stored, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _settings(config: Any) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }
    if config.model_type in ("llama", "mistral"):
        return {**values, "rope.dimension_count": head_dim, "vocab_size": config.vocab_size}
    values |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if config.model_type == "gemma2":
        values["attention.sliding_window"] = config.sliding_window
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            values[name] = float(getattr(config, name))
    return values


def stored_value(parameter: str, value: torch.Tensor, config: Any) -> np.ndarray:
    """As convert_hf_to_gguf.py turns a parameter: Llama's rotary pairs side by side, Gemma's norms with their 1."""
    array = value.float().numpy()
    if config.model_type in PAIRED and (part := parameter.split(".")[-2]) in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
        halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
    return array + 1 if config.model_type in SHIFTED and parameter.endswith("norm.weight") else array


def parameter_value(parameter: str, array: np.ndarray, config: Any) -> torch.Tensor:
    """The way back."""
    if config.model_type in PAIRED and (part := parameter.split(".")[-2]) in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
        pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
        array = np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(array.shape))
    shifted = config.model_type in SHIFTED and parameter.endswith("norm.weight")
    return torch.tensor(array - 1 if shifted else array)


def _quantized(array: np.ndarray, kind: Kind) -> np.ndarray:
    """Rows in a type; one that gguf can only decode gets random blocks, whose fp16 scales are finite."""
    try:
        return gguf.quantize(array, kind)
    except NotImplementedError:
        shape = gguf.quant_shape_to_byte_shape(array.shape, kind)
        return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8) & 0xBF


def _kind(stored: str, kinds: dict[str, Kind] | Kind) -> Kind:
    if isinstance(kinds, dict):
        return next((kind for end, kind in kinds.items() if stored.endswith(end)), Kind.F16)
    return kinds


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, size: int) -> None:
    """A byte-level BPE vocabulary of `size` tokens, with what it lacks as unused ones."""
    vocab = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens = [vocab.get(index, f"[PAD{index}]") for index in range(size)]
    special = set(tokenizer.all_special_ids)
    added = set(tokenizer.get_added_vocab().values()) - special
    types = [gguf.TokenType.NORMAL if index in vocab else gguf.TokenType.UNUSED for index in range(size)]
    for ids, kind in ((added, gguf.TokenType.USER_DEFINED), (special, gguf.TokenType.CONTROL)):
        for index in ids:
            types[index] = kind
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for name in ("bos", "eos", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _add_pieces(writer: gguf.GGUFWriter, size: int) -> None:
    """Pieces with scores, and bytes for all other text."""
    types = gguf.TokenType
    words = [("<unk>", types.UNKNOWN), ("<s>", types.CONTROL), ("</s>", types.CONTROL)]
    words += [(f"<0x{byte:02X}>", types.BYTE) for byte in range(256)]
    words += [
        (piece, types.NORMAL) for piece in ("\u2581", *"tokenhadsir", "to", "he", "\u2581t", "th", "en", "\u2581to")
    ]
    words += [("<think>", types.USER_DEFINED)]
    words += [(f"<unused{i}>", types.NORMAL) for i in range(size - len(words))]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece for piece, _ in words])
    writer.add_token_types([kind for _, kind in words])
    writer.add_token_scores([-float(i) for i in range(size)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT)
