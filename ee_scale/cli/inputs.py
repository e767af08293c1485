"""What several verbs read: data lists and tokenizers."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ee_scale.errors import UserError


def sources(path: Any) -> list[str]:
    """`data.path` as a list."""
    return [str(path)] if isinstance(path, str) else [str(item) for item in path]


def load_tokenizer(folder: Path, field: str = "model.path") -> Any:
    """The model's tokenizer. Raises `UserError`."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise UserError(f"{field}={folder}: no tokenizer in it ({str(error).splitlines()[0]})") from error
