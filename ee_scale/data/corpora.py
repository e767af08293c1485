"""Where data comes from: text files, folders, the sources of CPython, and Megatron prefixes that exist already."""

import hashlib
import os
import struct
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, get_bin_path, get_idx_path

from ee_scale.data.chat import Conversation, document_of
from ee_scale.data.folders import bad_bytes, find_files, setting_name
from ee_scale.data.readers import TEXT, read_records, read_text
from ee_scale.errors import UserError

PYTHON_KEYWORDS = {"python": "train", "python:train": "train", "python:valid": "valid"}
PIECE_SIZE = 64 * 1024
# pydoc_data holds the topics' prose, which would otherwise be in both splits.
SKIPPED_PYTHON_FOLDERS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "__pycache__", "pydoc_data"}
SKIPPED_PYTHON_FOLDERS |= {"site-packages", "dist-packages"}
INDEX_MAGIC, INDEX_HEADER = b"MMIDIDX\x00\x00", "<9sQBQQ"


@dataclass(frozen=True)
class Piece:
    """A part of a document, at most PIECE_SIZE characters, and how much of the source was read for it."""

    text: str
    num_bytes: int
    starts_document: bool


@dataclass(frozen=True)
class Source:
    """Text and conversations that can be read: `identity` (JSON-able) changes whenever they do.

    `told` says in a line each what is read as what, and what is left out and why.
    """

    name: str
    identity: list[Any]
    num_bytes: int
    pieces: Callable[[], Iterator[Piece | Conversation]]
    told: tuple[str, ...] = ()


def open_source(source: str, text_key: str, fields: str = "data", errors: str = "strict") -> Source:
    """The text behind `source`: a file, a folder (hidden names are skipped) or a keyword of PYTHON_KEYWORDS.

    Raises `UserError` when there is nothing to read; errors of the content come while its pieces are read.
    """
    if source in PYTHON_KEYWORDS:
        documents = list(python_documents(PYTHON_KEYWORDS[source]))
        digest = hashlib.sha256()
        for name, text in documents:
            digest.update(f"{name}\0{text}\0".encode())
        num_bytes = sum(len(text) for _, text in documents)
        return Source(source, [sys.version, digest.hexdigest()], num_bytes, lambda: document_pieces(documents))
    found = find_files(source, text_key, fields, errors)
    stats = [(str(path.resolve()), kind, path.stat()) for path, kind in found.files]
    return Source(
        source,
        # A file that was copied over another one may have its size and time of writing, but not this inode and ctime.
        [[path, kind, at.st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_ino] for path, kind, at in stats],
        sum(at.st_size for *_, at in stats),
        lambda: (piece for path, kind in found.files for piece in file_pieces(path, kind, text_key, fields, errors)),
        tuple(found.told()),
    )


def file_pieces(
    path: Path, kind: str, text_key: str, fields: str = "data", errors: str = "strict"
) -> Iterator[Piece | Conversation]:
    """A text file as one document, or one document per record. Raises `UserError` naming file and line."""
    here, bad = f"{setting_name(fields, 'path')}='{path}'", bad_bytes(fields, errors)
    if kind == TEXT:
        for index, (text, num_bytes) in enumerate(read_text(path, here, bad)):
            yield Piece(text, num_bytes, starts_document=index == 0)
        return
    setting = setting_name(fields, "text_key")
    for found in read_records(path, kind, here, bad):
        document = document_of(found.record, text_key, f"{here} {found.place}", setting, bad, found.num_bytes)
        if isinstance(document, Conversation):
            yield document
            continue
        for index, part in enumerate(split_text(document)):
            yield Piece(part, found.num_bytes if index == 0 else 0, starts_document=index == 0)


def document_pieces(documents: Iterable[tuple[str, str]]) -> Iterator[Piece]:
    """Documents (name, text) in memory, cut into pieces."""
    for _, text in documents:
        for index, part in enumerate(split_text(text)):
            yield Piece(part, len(part), starts_document=index == 0)


def split_text(text: str) -> Iterator[str]:
    """Parts of PIECE_SIZE characters; '' gives one part."""
    for start in range(0, len(text) or 1, PIECE_SIZE):
        yield text[start : start + PIECE_SIZE]


def python_documents(split: str = "train") -> Iterator[tuple[str, str]]:
    """(name, text) of the documentation topics and the standard library of this Python, sorted by name.

    A tenth of them, chosen by a hash of the name, is the split 'valid'; the others are 'train'.
    """
    for name, text in sorted(topics.topics.items()):
        if _python_split(f"topics/{name}") == split:
            yield f"topics/{name}", text
    for name, path in _python_files():
        if _python_split(name) != split:
            continue
        try:
            yield name, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


@cache
def _python_files() -> list[tuple[str, Path]]:
    """Names and paths. Folders that are skipped are not looked into: all installed packages may lie there."""
    root, found = Path(sysconfig.get_path("stdlib")), []
    for folder, inner, files in os.walk(root):
        inner[:] = set(inner) - SKIPPED_PYTHON_FOLDERS
        found += [Path(folder, file) for file in files if file.endswith(".py")]
    return [(path.relative_to(root).as_posix(), path) for path in sorted(found)]


def _python_split(name: str) -> str:
    return "valid" if hashlib.sha256(name.encode()).digest()[0] % 10 == 0 else "train"


def open_tokens(prefix: str, name: str | None = None, fields: str = "data") -> IndexedDataset:
    """The dataset at a Megatron prefix. Raises `UserError` (naming `name`, else the prefix) where a file is damaged.

    Its arrays are views of a mapped file that is closed with the dataset: copy them, or keep the dataset.
    """
    here = f"{setting_name(fields, 'path')}='{name or prefix}'"
    # Megatron finds a torn file only when training reads that far, and its half-built objects complain when deleted.
    with open(get_idx_path(prefix), "rb") as stream:
        header = stream.read(struct.calcsize(INDEX_HEADER))
    if len(header) < struct.calcsize(INDEX_HEADER) or not header.startswith(INDEX_MAGIC):
        raise UserError(f"{here}: its .idx is not a Megatron index")
    _, version, code, num_sequences, num_documents = struct.unpack(INDEX_HEADER, header)
    if version != 1 or code not in [dtype.value for dtype in DType]:
        raise UserError(f"{here}: its .idx has version {version} and dtype code {code}, which are not known")
    if os.path.getsize(get_bin_path(prefix)) == 0:
        raise UserError(f"{here}: no tokens in it")
    expected = len(header) + 12 * num_sequences + 8 * num_documents
    if (size := os.path.getsize(get_idx_path(prefix))) < expected:
        raise UserError(f"{here}: its .idx is cut off ({size} bytes, {expected} expected)")
    dataset = IndexedDataset(prefix)
    expected = num_tokens(dataset) * DType.size(dataset.index.dtype)
    if (size := os.path.getsize(get_bin_path(prefix))) != expected:
        raise UserError(f"{here}: its .bin has {size} bytes, its .idx describes {expected}")
    return dataset


def mask_prefix(prefix: str) -> str:
    """Where the mask of what is learned lies beside the tokens of a Megatron prefix."""
    return f"{prefix}_loss_mask"


def open_mask(prefix: str, name: str | None = None, fields: str = "data") -> IndexedDataset | None:
    """The mask of the tokens at a prefix, a dataset of the same documents: 1 where a token is learned, else 0.

    None where there is none: every token is learned. Raises `UserError` for one that is damaged or of other documents.
    """
    there, here = mask_prefix(prefix), f"{setting_name(fields, 'path')}='{name or prefix}'"
    paths = [get_bin_path(there), get_idx_path(there)]
    found = [path for path in paths if os.path.exists(path)]
    if not found:
        return None
    if len(found) == 1:
        raise UserError(f"{here}: {found[0]} is there, its .bin or .idx beside it is missing")
    mask, tokens = open_tokens(there, name, fields), open_tokens(prefix, name, fields)
    if mask.index.dtype != np.uint8 or not np.array_equal(mask.sequence_lengths, tokens.sequence_lengths):
        raise UserError(f"{here}: {there} is no mask of its documents (a byte for each token)")
    return mask


def num_tokens(dataset: IndexedDataset) -> int:
    """All tokens of a dataset."""
    return int(dataset.sequence_lengths.sum(dtype=np.int64))


def read_tokens(dataset: IndexedDataset, start: int, count: int) -> np.ndarray:
    """[count] int64, a copy: tokens `start`.. of a dataset taken as one stream (documents lie one after the other)."""
    dtype = dataset.index.dtype
    return dataset.bin_reader.read(dtype, count, start * DType.size(dtype)).astype(np.int64)
