"""Text to Megatron `.bin/.idx`: tokenised once, kept in a cache, never half-written."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from ee_scale.data.corpora import Piece, Source, open_source, open_tokens, setting_name
from ee_scale.errors import UserError
from ee_scale.files import published
from ee_scale.log import Terminal, log

FORMAT_VERSION = 1
BATCH_CHARS = 1 << 20

Encode = Callable[[list[str]], list[list[int]]]


def prepare_text(
    sources: list[str],
    tokenizer: Any,
    tokenizer_dir: Path | str,
    cache_dir: Path | str | None,
    text_key: str,
    progress: bool,
    *,
    fields: str = "data",
) -> list[str]:
    """Megatron prefixes (paths without .bin/.idx), one per source; what is not in the cache is tokenised.

    A source is a text file, a .jsonl, a folder, 'python', 'python:valid', or a Megatron prefix, which is returned as it
    is: check its ids with `check_tokens`. Each document ends with EOS; empty ones are skipped. Several processes may
    call this at once, but let one rank do the work first. Raises `UserError`; `fields` is the config group it names.
    """
    prefixes = []
    for source in sources:
        prefix = str(Path(source).expanduser())
        if IndexedDataset.exists(prefix):
            open_tokens(prefix, source, fields)
        else:
            text = open_source(source, text_key, fields)
            key = _cache_key(text, tokenizer, tokenizer_dir, text_key)
            folder = cache_root(cache_dir, fields) / f"text-{key}"
            prefix = _tokenised(text, tokenizer, folder, progress, fields)
        prefixes.append(prefix)
    return prefixes


def cache_root(cache_dir: Path | str | None, fields: str = "data") -> Path:
    """The folder of tokenised data and sample orders, made if missing. Raises `UserError` when it cannot be written."""
    if cache_dir is None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ee_scale" / "data"
    else:
        root = Path(cache_dir).expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{setting_name(fields, 'cache_dir')}='{root}': cannot write ({error.strerror})") from error
    return root


def _cache_key(source: Source, tokenizer: Any, tokenizer_dir: Path | str, text_key: str) -> str:
    """Changes whenever the ids would; raises `UserError` for a tokenizer that cannot end a document."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer of {tokenizer_dir}: no eos_token; documents need an end mark")
    identity = [FORMAT_VERSION, source.identity, text_key, _digest(tokenizer, tokenizer_dir), tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _tokenised(source: Source, tokenizer: Any, folder: Path, progress: bool, fields: str) -> str:
    """The prefix of a source in its cache folder, tokenised now if it is not there."""
    prefix = str(folder / "tokens")
    if _is_complete(prefix):
        log.debug("%s: tokenised before, %s", source.name, prefix)
        return prefix
    shutil.rmtree(folder, ignore_errors=True)
    with published(folder) as temporary:
        writer = _Writer(str(temporary / "tokens"), tokenizer)
        with _progress_bar(source, progress) as advance:
            for pieces in _batched(source.pieces()):
                writer.add(pieces)
                advance(sum(piece.num_bytes for piece in pieces))
        writer.finish()
        if writer.num_documents == 0:
            raise UserError(f"{setting_name(fields, 'path')}='{source.name}': no text in it")
    skipped = f" ({writer.num_empty} empty documents skipped)" if writer.num_empty else ""
    log.info("%s: %d documents, %d tokens%s", source.name, writer.num_documents, writer.num_tokens, skipped)
    return prefix


def _is_complete(prefix: str) -> bool:
    try:
        return IndexedDataset.exists(prefix) and open_tokens(prefix) is not None
    except UserError:
        return False


def _digest(tokenizer: Any, tokenizer_dir: Path | str) -> str:
    """What the ids depend on: tokenizer.json, else the tokenizer itself, else its vocabulary."""
    file = Path(tokenizer_dir) / "tokenizer.json"
    if file.is_file():
        content = file.read_bytes()
    elif (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        content = backend.to_str().encode()
    else:
        content = json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def _encoder(tokenizer: Any) -> Encode:
    """Texts to ids, without special tokens and without truncation, over all cores for a fast tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    # The tokenizer's own call also builds offsets and masks, which takes three times as long [measured].
    own = Tokenizer.from_str(backend.to_str())
    own.no_truncation()
    own.no_padding()
    return lambda texts: [item.ids for item in own.encode_batch_fast(texts, add_special_tokens=False)]


@contextmanager
def _progress_bar(source: Source, progress: bool) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of bytes that were done; draws on a terminal only."""
    columns = (
        TextColumn("tokenising {task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    console = Terminal(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not (progress and sys.stderr.isatty())) as bar:
        task = bar.add_task(source.name, total=source.num_bytes)
        yield lambda num_bytes: bar.advance(task, num_bytes)


def _batched(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Lists of pieces of about BATCH_CHARS characters together."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Writer:
    """Pieces of documents into `prefix`.bin and `prefix`.idx, one sequence per document."""

    def __init__(self, prefix: str, tokenizer: Any) -> None:
        self.prefix = prefix
        self.encode = _encoder(tokenizer)
        self.end_mark = [tokenizer.eos_token_id]
        largest = max(len(tokenizer) - 1, tokenizer.eos_token_id, *tokenizer.get_vocab().values())
        self.builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(largest + 1))
        self.num_documents = self.num_empty = self.num_tokens = 0
        self.lengths: list[int] | None = None

    def add(self, pieces: list[Piece]) -> None:
        """Tokenise and append; a document may go on in the next call."""
        for piece, ids in zip(pieces, self.encode([piece.text for piece in pieces]), strict=True):
            if piece.starts_document:
                self._end_document()
                self.lengths = []
            if ids and (self.lengths or piece.text.strip()):
                self._append(ids)

    def finish(self) -> None:
        """Close the last document and write the index."""
        self._end_document()
        self.builder.finalize(f"{self.prefix}.idx")

    def _append(self, ids: list[int]) -> None:
        self.builder.add_item(torch.tensor(ids))
        self.lengths.append(len(ids))

    def _end_document(self) -> None:
        if self.lengths is None:
            return
        if not self.lengths:
            self.num_empty += 1
            return
        self._append(self.end_mark)
        total = sum(self.lengths)
        if total <= np.iinfo(np.int32).max:
            # GPTDataset shuffles sequences: a document in pieces would come out as pieces of many documents.
            self.builder.sequence_lengths[-len(self.lengths) :] = [total]
        self.builder.end_document()
        self.num_documents += 1
        self.num_tokens += total
