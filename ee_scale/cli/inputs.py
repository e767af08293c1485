"""What several verbs read: data lists and tokenizers."""

import importlib.util
import re
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ee_scale.config.schema import TrainingConfig
from ee_scale.data.dataset import build_gpt_dataset
from ee_scale.errors import UserError, one_line

# What tokenizers of some families need beside transformers.
PACKAGES = re.compile(r"sentencepiece|tiktoken|protobuf|blobfile|sacremoses|fugashi|mistral_common|rjieba|jinja2")


def sources(path: Any) -> list[str]:
    """`data.path` as a list."""
    return [str(path)] if isinstance(path, str) else [str(item) for item in path]


def text_dataset(
    config: TrainingConfig, tokenizer: PreTrainedTokenizerBase, prefixes: list[str], num_samples: int, vocab_size: int
) -> Dataset:
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


def load_tokenizer(folder: Path, field: str = "model.path") -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises `UserError`, which names the package that is missing where one is."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        if (package := _missing_package(folder, error)) is not None:
            raise UserError(
                f"{field}={folder}: its tokenizer needs the package {package}; pip install {package}"
            ) from error
        raise UserError(f"{field}={folder}: no tokenizer in it ({one_line(error)})") from error


def _missing_package(folder: Path, error: BaseException | None) -> str | None:
    """What to install; the last one that transformers tried to do without is not always what lacks."""
    models = [] if (folder / "tokenizer.json").is_file() else [*folder.glob("*.model"), *folder.glob("*.tiktoken")]
    for path in models:
        package = "tiktoken" if _is_tiktoken(path) else "sentencepiece"
        if not _is_there(package):
            return package
    readers = ("sentencepiece", "tiktoken") if models else ()  # the right one is there
    while error is not None:
        if isinstance(error, ImportError):
            named = PACKAGES.search(f"{error.name} {error}".lower())
            if named is not None and named[0] not in readers and not _is_there(named[0]):
                return named[0]
        error = error.__cause__ or error.__context__
    return None


def _is_tiktoken(path: Path) -> bool:
    """Whether a file holds lines of base64 and a number; sentencepiece's is a protobuf."""
    with path.open("rb") as file:
        return re.fullmatch(rb"[A-Za-z0-9+/=]+ [0-9]+", file.readline(1024).strip()) is not None


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec({"protobuf": "google.protobuf"}.get(package, package)) is not None
    except ModuleNotFoundError:
        return False
