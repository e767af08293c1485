"""What several verbs read: data lists and tokenizers."""

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import AutoTokenizer

from ee_scale.data.dataset import build_gpt_dataset
from ee_scale.errors import UserError


def sources(path: Any) -> list[str]:
    """`data.path` as a list."""
    return [str(path)] if isinstance(path, str) else [str(item) for item in path]


def text_dataset(config: Any, tokenizer: Any, prefixes: list[str], num_samples: int, vocab_size: int) -> Dataset:
    """Megatron's GPT dataset of a run's `data` group."""
    return build_gpt_dataset(
        prefixes,
        list(config.data.weights) if config.data.weights else None,
        config.data.seq_length,
        num_samples,
        config.data.seed,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        vocab_size,
        config.data.cache_dir,
    )


def load_tokenizer(folder: Path, field: str = "model.path") -> Any:
    """The model's tokenizer. Raises `UserError`."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{field}={folder}: no tokenizer in it ({str(error).splitlines()[0]})") from error
