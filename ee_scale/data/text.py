"""Text to Megatron `.bin/.idx`: tokenised once, kept in a cache, never half-written."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from ee_scale.data.corpora import Source, open_source, open_tokens
from ee_scale.data.encode import DocumentEncoder, Ids, tokenizer_digest
from ee_scale.data.folders import setting_name
from ee_scale.errors import UserError
from ee_scale.files import cache_folder, published
from ee_scale.log import Terminal, log

FORMAT_VERSION = 2


def prepare_text(
    sources: list[str],
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_dir: Path | str,
    cache_dir: Path | str | None,
    text_key: str,
    progress: bool,
    *,
    fields: str = "data",
) -> list[str]:
    """Megatron prefixes (paths without .bin/.idx), one per source; what is not in the cache is tokenised.

    A source is a file of text or of records, a folder, 'python', 'python:valid', or a Megatron prefix, which is
    returned as it is: check its ids with `check_tokens`. Each document ends with EOS; empty ones are skipped. Several
    processes may call this at once, but let one rank do the work first. Raises `UserError`; `fields` is the config
    group it names.
    """
    prefixes = []
    for source in sources:
        prefix = str(Path(source).expanduser())
        if IndexedDataset.exists(prefix):
            open_tokens(prefix, source, fields)
        else:
            text = open_source(source, text_key, fields)
            for line in text.told:
                _tell(line)
            key = _cache_key(text, tokenizer, tokenizer_dir, text_key)
            folder = cache_root(cache_dir, fields) / f"text-{key}"
            prefix = _tokenised(text, tokenizer, folder, progress, fields)
        prefixes.append(prefix)
    return prefixes


def cache_root(cache_dir: Path | str | None, fields: str = "data") -> Path:
    """The folder of tokenised data and sample orders, made if missing. Raises `UserError` when it cannot be written."""
    root = cache_folder() / "data" if cache_dir is None else Path(cache_dir).expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{setting_name(fields, 'cache_dir')}='{root}': cannot write ({error.strerror})") from error
    return root


@cache
def _tell(line: str) -> None:
    """Say a line once, however often the data is opened."""
    log.info("%s", line)


def _cache_key(source: Source, tokenizer: PreTrainedTokenizerBase, tokenizer_dir: Path | str, text_key: str) -> str:
    """Changes whenever the ids would; raises `UserError` for a tokenizer that cannot end a document."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer of {tokenizer_dir}: no eos_token; documents need an end mark")
    identity = [FORMAT_VERSION, source.identity, text_key, tokenizer_digest(tokenizer, tokenizer_dir)]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _tokenised(source: Source, tokenizer: PreTrainedTokenizerBase, folder: Path, progress: bool, fields: str) -> str:
    """The prefix of a source in its cache folder, tokenised now if it is not there."""
    prefix = str(folder / "tokens")
    if _is_complete(prefix):
        log.debug("%s: tokenised before, %s", source.name, prefix)
        return prefix
    shutil.rmtree(folder, ignore_errors=True)
    with published(folder) as temporary:
        writer = _Writer(str(temporary / "tokens"), tokenizer)
        with _progress_bar(source, progress) as advance:
            encoder = DocumentEncoder(tokenizer, f"{setting_name(fields, 'path')}='{source.name}'")
            for part in encoder.encode(source.pieces()):
                writer.add(part)
                advance(part.num_bytes)
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


class _Writer:
    """Ids of documents into `prefix`.bin and `prefix`.idx, one sequence per document."""

    def __init__(self, prefix: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.prefix = prefix
        self.end_mark = np.array([tokenizer.eos_token_id])
        largest = max(len(tokenizer) - 1, tokenizer.eos_token_id, *tokenizer.get_vocab().values())
        self.builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(largest + 1))
        self.num_documents = self.num_empty = self.num_tokens = 0
        self.waiting: list[np.ndarray] = []  # white space, as long as nothing else came
        self.lengths: list[int] = []

    def add(self, part: Ids) -> None:
        """Append; a document may go on in the next call."""
        self.waiting.append(part.ids)
        if self.lengths or not part.blank:
            for ids in self.waiting:
                self._append(ids)
            self.waiting = []
        if part.last:
            self._end_document()

    def finish(self) -> None:
        """Write the index."""
        self.builder.finalize(f"{self.prefix}.idx")

    def _append(self, ids: np.ndarray) -> None:
        if len(ids):
            self.builder.add_item(torch.from_numpy(ids))
            self.lengths.append(len(ids))

    def _end_document(self) -> None:
        self.waiting = []
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
        self.lengths = []
