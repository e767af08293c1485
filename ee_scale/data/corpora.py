"""Where data comes from: text files, folders, the sources of CPython, and Megatron prefixes that exist already."""

import codecs
import hashlib
import json
import os
import struct
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, get_bin_path, get_idx_path

from ee_scale.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")
PYTHON_KEYWORDS = {"python": "train", "python:train": "train", "python:valid": "valid"}
PIECE_SIZE = 64 * 1024
# pydoc_data holds the topics' prose, which would otherwise be in both splits.
SKIPPED_PYTHON_FOLDERS = {
    "test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings", "__pycache__",
    "pydoc_data",
}  # fmt: skip
INDEX_MAGIC, INDEX_HEADER = b"MMIDIDX\x00\x00", "<9sQBQQ"


@dataclass(frozen=True)
class Piece:
    """A part of a document, at most 2 * PIECE_SIZE long, and how much of the source was read for it."""

    text: str
    num_bytes: int
    starts_document: bool


@dataclass(frozen=True)
class Source:
    """Text that can be read: `identity` (JSON-able) changes whenever the text does."""

    name: str
    identity: list[Any]
    num_bytes: int
    pieces: Callable[[], Iterator[Piece]]


def setting_name(fields: str, name: str) -> str:
    """What a person calls a setting of the data: `data.path`, or `data` in a config that has no group (fields='').

    `data.valid` (fields='data.valid') is a path that shares the other settings of `data`.
    """
    if fields == "data.valid":
        return fields if name == "path" else f"data.{name}"
    return f"{fields}.{name}" if fields else {"path": "data"}.get(name, name)


def open_source(source: str, text_key: str, fields: str = "data") -> Source:
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
    files = list_files(source, fields)
    stats = [(str(path.resolve()), path.stat()) for path in files]
    return Source(
        source,
        [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats],
        sum(stat.st_size for _, stat in stats),
        lambda: (piece for path in files for piece in file_pieces(path, text_key, fields)),
    )


def list_files(source: str, fields: str = "data") -> list[Path]:
    """The file itself, or every text file below a folder, sorted. Raises `UserError`."""
    here = f"{setting_name(fields, 'path')}='{source}'"
    path = Path(source).expanduser()
    if path.suffix in (".bin", ".idx"):
        raise UserError(f"{here}: give a Megatron dataset as its prefix, without {path.suffix}")
    if path.is_file():
        return [path]
    if not path.is_dir():
        for found, lost in ((".bin", ".idx"), (".idx", ".bin")):
            if Path(f"{path}{found}").is_file():
                raise UserError(f"{here}: {path.name}{found} is there, {path.name}{lost} is missing")
        raise UserError(f"{here}: no such file or folder")
    files = []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(folder, name) for name in names if name.endswith(TEXT_SUFFIXES) and not name.startswith(".")]
    if not files:
        raise UserError(f"{here}: no {', '.join(TEXT_SUFFIXES)} file in it")
    return sorted(files)


def file_pieces(path: Path, text_key: str, fields: str = "data") -> Iterator[Piece]:
    """A text file as one document, or a `.jsonl` as one document per line. Raises `UserError` naming file and line."""
    here = f"{setting_name(fields, 'path')}='{path}'"
    try:
        if path.suffix == ".jsonl":
            yield from _jsonl_pieces(path, text_key, here, setting_name(fields, "text_key"))
        else:
            yield from _text_pieces(path)
    except UnicodeDecodeError as error:
        bad = error.object[error.start]
        raise UserError(f"{here}: not UTF-8 text (byte 0x{bad:02x}: {error.reason})") from error
    except OSError as error:
        raise UserError(f"{here}: cannot read ({error.strerror})") from error


def document_pieces(documents: Iterable[tuple[str, str]]) -> Iterator[Piece]:
    """Documents (name, text) in memory, cut into pieces."""
    for _, text in documents:
        for index, part in enumerate(split_text(text)):
            yield Piece(part, len(part), starts_document=index == 0)


def split_text(text: str) -> Iterator[str]:
    """Parts of at least PIECE_SIZE characters that end with a line where a line ends in time; '' gives one part."""
    start = 0
    while True:
        newline = text.find("\n", start + PIECE_SIZE - 1, start + 2 * PIECE_SIZE)
        end = newline + 1 if newline >= 0 else start + 2 * PIECE_SIZE
        yield text[start:end]
        start = end
        if start >= len(text):
            return


def _text_pieces(path: Path) -> Iterator[Piece]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    starts = True
    with path.open("rb") as stream:
        while (chunk := stream.read(PIECE_SIZE) + stream.readline(PIECE_SIZE)) or starts:
            yield Piece(decoder.decode(chunk), len(chunk), starts)
            starts = False
    decoder.decode(b"", final=True)


def _jsonl_pieces(path: Path, text_key: str, here: str, key_name: str) -> Iterator[Piece]:
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if not raw.strip():
                continue
            text = _jsonl_text(raw, text_key, f"{here} line {number}", key_name)
            for index, part in enumerate(split_text(text)):
                yield Piece(part, len(raw) if index == 0 else 0, starts_document=index == 0)


def _jsonl_text(raw: bytes, text_key: str, here: str, key_name: str) -> str:
    try:
        record = json.loads(raw.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{here}: not valid JSON ({error.msg}: column {error.colno})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{here}: not UTF-8 text (byte 0x{raw[error.start]:02x}: {error.reason})") from error
    if not isinstance(record, dict):
        raise UserError(f"{here}: not a JSON object but {type(record).__name__}")
    if text_key not in record:
        names = ", ".join(sorted(record)[:12])
        raise UserError(f"{here}: no field '{text_key}' (fields: {names}); set {key_name}")
    text = record[text_key]
    if not isinstance(text, str):
        raise UserError(f"{here}: field '{text_key}' is not text but {type(text).__name__}")
    # An escaped half of a surrogate pair is valid JSON and no valid text.
    return text.encode("utf-8", "replace").decode() if b"\\u" in raw else text


def python_documents(split: str = "train") -> Iterator[tuple[str, str]]:
    """(name, text) of the documentation topics and the standard library of this Python, sorted by name.

    A tenth of them, chosen by a hash of the name, is the split 'valid'; the others are 'train'.
    """
    for name, text in sorted(topics.topics.items()):
        if _python_split(f"topics/{name}") == split:
            yield f"topics/{name}", text
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if SKIPPED_PYTHON_FOLDERS.intersection(name.split("/")[:-1]) or _python_split(name) != split:
            continue
        try:
            yield name, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


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


def num_tokens(dataset: IndexedDataset) -> int:
    """All tokens of a dataset."""
    return int(dataset.sequence_lengths.sum(dtype=np.int64))


def read_tokens(dataset: IndexedDataset, start: int, count: int) -> np.ndarray:
    """[count] int64, a copy: tokens `start`.. of a dataset taken as one stream (documents lie one after the other)."""
    dtype = dataset.index.dtype
    return dataset.bin_reader.read(dtype, count, start * DType.size(dtype)).astype(np.int64)
