"""Files with digests that tell whether they are what was written, and folders for exports."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ee_scale.errors import UserError, one_line
from ee_scale.files import is_file, named_file, published, write_text
from ee_scale.reading import parse_json

DIGEST_KEY = "sha256"


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON with a digest of itself."""
    write_text(path, json.dumps({**value, DIGEST_KEY: _json_digest(value)}, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read JSON that `write_json` wrote. Raises `UserError` if it is torn or was edited."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a whole file of ours ({one_line(error)})") from error
    if not isinstance(value, dict) or DIGEST_KEY not in value:
        raise UserError(f"{path}: not a whole file of ours (no object with a '{DIGEST_KEY}')")
    if value.pop(DIGEST_KEY) != _json_digest(value):
        raise UserError(f"{path}: its content does not match its digest; it was edited or damaged")
    return value


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(folder: Path, digests: dict[str, str]) -> None:
    """Raise `UserError` naming the first file that is missing or not what was written."""
    for name, digest in digests.items():
        path = named_file(folder, name, folder)
        if not is_file(path):
            raise UserError(f"{path}: missing")
        if file_digest(path) != digest:
            raise UserError(f"{path}: its content does not match its digest; it was cut off or edited")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block succeeds.

    Raises `UserError` if `folder` exists or cannot be made.
    """
    if folder.exists():
        raise UserError(f"out={folder}: exists already; choose another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with published(folder) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"out={folder}: cannot write there ({error.strerror or error})") from error


def _json_digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
