"""A model and a tokenizer that need no download: for debug configs, the demo and tests."""

import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ee_scale.backbone.hub import find_model
from ee_scale.data.corpora import python_documents
from ee_scale.data.text import cache_root
from ee_scale.errors import UserError
from ee_scale.files import published

TINY = "tiny"
END = "<|end|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with one special token that ends documents (and pads)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, bos_token=END)


def llama_config(tokenizer: PreTrainedTokenizerFast, *, layers: int, hidden: int, max_positions: int) -> LlamaConfig:
    """A small Llama: heads of 32, half as many KV heads, tied embeddings."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        head_dim=32,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def made_of(*parts: object) -> str:
    """Eight letters for a cached folder's name: they change with what a model is made of, and with who makes it."""
    makers = [version(name) for name in ("torch", "transformers", "tokenizers")]
    return hashlib.sha256(json.dumps([*makers, *parts]).encode("utf-8", "replace")).hexdigest()[:8]


def training_model(path: str) -> Path:
    """The folder of `model.path`: `tiny`, or what `find_model` finds. Raises `UserError`."""
    return tiny_model() if path == TINY else find_model(path)


def tiny_model(cache_dir: Path | str | None = None) -> Path:
    """Folder of the random 4-layer Llama `model=tiny`, built on first use."""
    texts = [text for _, text in islice(python_documents(), 200)]
    name = f"tiny-v1-{made_of(*texts)}"
    folder = cache_root(cache_dir).parent / "models" / name if cache_dir is None else Path(cache_dir) / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"model.path={TINY}: cannot write {folder.parent} ({error.strerror})") from error
    tokenizer = train_tokenizer(texts, 512)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(llama_config(tokenizer, layers=4, hidden=64, max_positions=512))
    with published(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder
