"""Files and folders that are either whole or absent."""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from ee_scale.errors import UserError


def cache_folder() -> Path:
    """Where is kept what can be made again: EE_SCALE_CACHE, or `ee_scale` in the user's cache (XDG_CACHE_HOME)."""
    given = os.environ.get("EE_SCALE_CACHE")
    return Path(given or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ee_scale").expanduser()


def named_file(folder: Path, name: object, place: Path) -> Path:
    """The file of `folder` that `place`, a file in it, names. Raises `UserError` for what is no name of such a file."""
    if not isinstance(name, str) or not name or name in (".", "..") or re.search(r"[/\\\0]", name):
        raise UserError(f"{place}: names {name!r}, which is no name of a file beside it")
    return own_file(folder / name)


def own_file(path: Path) -> Path:
    """The path itself. Raises `UserError` for a link that leads out of its folder: what came from others with a folder
    must not choose what else is read. The blobs of the hub's cache belong to the folders that link to them.
    """
    if os.path.islink(path):  # False also for names that no file can have
        target = path.resolve()
        in_cache = target.parent.name == "blobs" and target.parent.parent.name.startswith(("models--", "datasets--"))
        if not in_cache and not target.is_relative_to(path.parent.resolve()):
            raise UserError(f"{path}: a link to {target}, out of its folder; put the file itself there")
    return path


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, sync, and rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.replace(path)


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` as a whole when the block succeeds, and is removed when it fails.

    Another process may publish the same folder first: then its content stays.
    """
    temporary = folder.parent / f".{folder.name}.{uuid4().hex}"
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.iterdir():
            sync(path)
        try:
            publish(temporary, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


@contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """`new_folder` for a file: a path to write to, which becomes `file` when the block succeeds."""
    if file.exists():
        raise UserError(f"out={file}: exists already; choose another name")
    temporary = file.with_name(f".{file.name}.{uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        publish(temporary, file)
    except OSError as error:
        raise UserError(f"out={file}: cannot write there ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, folder: Path) -> None:
    """Give a file, or a folder whose files are synced, its name. Raises OSError."""
    sync(temporary)
    temporary.rename(folder)
    sync(folder.parent)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_file(path: Path) -> bool:
    """Whether a file is there; False also for names that no file can have."""
    try:
        return path.is_file()
    except OSError:
        return False


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Delete a folder of ours, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)
