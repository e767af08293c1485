"""Files that are either whole or absent, and digests that tell."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ee_scale.errors import UserError

DIGEST_KEY = "sha256"


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, sync, and rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.replace(path)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON with a digest of itself."""
    write_text(path, json.dumps({**value, DIGEST_KEY: _json_digest(value)}, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read JSON that `write_json` wrote. Raises `UserError` if it is torn or was edited."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        digest = value.pop(DIGEST_KEY)
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise UserError(f"{path}: not a whole file of ours ({type(error).__name__}: {error})") from error
    if digest != _json_digest(value):
        raise UserError(f"{path}: its content does not match its digest; it was edited or damaged")
    return value


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(folder: Path, digests: dict[str, str]) -> None:
    """Raise `UserError` naming the first file that is missing or not what was written."""
    for name, digest in digests.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing")
        if file_digest(folder / name) != digest:
            raise UserError(f"{folder / name}: its content does not match its digest; it was cut off or edited")


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block succeeds, and is removed when it fails.

    Raises `UserError` if `folder` exists or cannot be made.
    """
    if folder.exists():
        raise UserError(f"out={folder}: exists already; choose another folder")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"out={folder}: cannot write there ({error.strerror})") from error
    try:
        yield temporary
        for path in temporary.iterdir():
            sync(path)
        sync(temporary)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder of ours, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)


def _json_digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
