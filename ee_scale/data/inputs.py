"""What several verbs read: data lists and tokenizers."""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ee_scale.config.groups import DataConfig
from ee_scale.data.dataset import build_gpt_dataset, check_tokens, checked_weights
from ee_scale.data.epochs import Epochs
from ee_scale.data.text import prepare_text
from ee_scale.errors import UserError, one_line

# What tokenizers of some families need beside transformers.
PACKAGES = re.compile(r"sentencepiece|tiktoken|protobuf|blobfile|sacremoses|fugashi|mistral_common|rjieba|jinja2")


def sources(path: str | Sequence[str]) -> list[str]:
    """`data.path` as a list."""
    return [str(path)] if isinstance(path, str) else [str(item) for item in path]


def check_run_text(data: DataConfig, model_dir: Path, vocab_size: int, *, progress: bool) -> dict[str, Any]:
    """Tokenise what is not cached, check it against the model, and say which data it is. Raises `UserError`."""
    tokenizer, names = load_tokenizer(model_dir), sources(data.path)
    prefixes = prepare_text(names, tokenizer, model_dir, data.cache_dir, data.text_key, progress, errors=data.errors)
    digests = check_tokens(prefixes, vocab_size, data.seq_length, names=names, tokenizer=tokenizer)
    return data_identity(digests, tokenizer)


def data_identity(digests: list[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the data is, whatever its path: digests of the tokens of each source, and the marks that losses know."""
    return {"tokens": digests, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}


def run_prefixes(data: DataConfig, model_dir: Path) -> list[str]:
    """Megatron prefixes of text that `check_run_text` has tokenised."""
    given = (load_tokenizer(model_dir), model_dir, data.cache_dir, data.text_key)
    return prepare_text(sources(data.path), *given, progress=False, errors=data.errors)


def run_dataset(
    data: DataConfig, model_dir: Path, vocab_size: int, num_samples: int, own_text: str | None = None
) -> Epochs:
    """Megatron's GPT dataset of text that `check_run_text` has tokenised, in epochs of `data.sequences`.

    own_text: prefix of what the model has written; `data.own_text` is its share.
    """
    tokenizer, prefixes = load_tokenizer(model_dir), run_prefixes(data, model_dir)
    weights = list(data.weights) if data.weights else None
    if own_text is not None:
        weights = checked_weights(prefixes, weights) or [1.0]
        corpus = (1 - data.own_text) / sum(weights)
        prefixes, weights = [*prefixes, own_text], [*(weight * corpus for weight in weights), data.own_text]
    dataset = build_gpt_dataset(
        prefixes,
        weights,
        data.seq_length,
        data.sequences or num_samples,
        data.seed,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        vocab_size,
        data.cache_dir,
    )
    whole = len(dataset)  # type: ignore[arg-type]
    return Epochs(dataset, data.sequences or whole, max(num_samples, whole), data.seed)


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
