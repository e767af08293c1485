"""Text to Megatron `.bin/.idx`: tokenised once, kept in a cache, never half-written."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import groupby
from pathlib import Path

from megatron.core.datasets.indexed_dataset import IndexedDataset
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from ee_scale.data.chat import ChatEncoder, Conversation
from ee_scale.data.corpora import Source, open_mask, open_source, open_tokens
from ee_scale.data.encode import DocumentEncoder, tokenizer_digest
from ee_scale.data.folders import setting_name
from ee_scale.data.writer import MASKED, TOKENS, Writer
from ee_scale.errors import UserError
from ee_scale.files import cache_folder, published
from ee_scale.log import Terminal, log

FORMAT_VERSION = 3


def prepare_text(
    sources: list[str],
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_dir: Path | str,
    cache_dir: Path | str | None,
    text_key: str,
    progress: bool,
    *,
    fields: str = "data",
    errors: str = "strict",
) -> list[str]:
    """Megatron prefixes (paths without .bin/.idx), one per source; what is not in the cache is tokenised.

    A source is a file of text or of records, a folder, 'python', 'python:valid', or a Megatron prefix, which is
    returned as it is: check its ids with `check_tokens`. Each text ends with EOS, a conversation as its chat template
    ends it; empty ones are skipped. With conversations a mask lies beside the tokens (`open_mask`). Several processes
    may call this at once, but let one rank do the work first. Raises `UserError`; `fields` is the config group it
    names; `errors`: strict or replace, for bytes that are no text.
    """
    prefixes = []
    for source in sources:
        prefix = str(Path(source).expanduser())
        if IndexedDataset.exists(prefix):
            open_tokens(prefix, source, fields)
            open_mask(prefix, source, fields)
        else:
            text = open_source(source, text_key, fields, errors)
            for line in text.told:
                _tell(line)
            key = _cache_key(text, tokenizer, tokenizer_dir, [text_key, errors])
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


def _cache_key(
    source: Source, tokenizer: PreTrainedTokenizerBase, tokenizer_dir: Path | str, settings: list[str]
) -> str:
    """Changes whenever the ids would; raises `UserError` for a tokenizer that cannot end a document."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer of {tokenizer_dir}: no eos_token; documents need an end mark")
    digest = tokenizer_digest(tokenizer, tokenizer_dir)
    identity = [FORMAT_VERSION, source.identity, settings, digest, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _tokenised(source: Source, tokenizer: PreTrainedTokenizerBase, folder: Path, progress: bool, fields: str) -> str:
    """The prefix of a source in its cache folder, tokenised now if it is not there."""
    for name in (TOKENS, MASKED):
        if _is_complete(prefix := str(folder / name)):
            log.debug("%s: tokenised before, %s", source.name, prefix)
            return prefix
    shutil.rmtree(folder, ignore_errors=True)
    here = f"{setting_name(fields, 'path')}='{source.name}'"
    with published(folder) as temporary:
        writer = Writer(temporary, tokenizer)
        with _progress_bar(source, progress) as advance:
            encoder, chat = DocumentEncoder(tokenizer, here), ChatEncoder(tokenizer)
            for is_chat, pieces in groupby(source.pieces(), lambda piece: isinstance(piece, Conversation)):
                if is_chat:
                    for conversation in pieces:
                        writer.add_conversation([] if conversation.blank else chat.encode(conversation))
                        advance(conversation.num_bytes)
                    continue
                for part in encoder.encode(pieces):
                    writer.add(part)
                    advance(part.num_bytes)
        name = writer.finish()
        if writer.num_documents == 0:
            raise UserError(f"{here}: no text in it")
    log.info("%s: %s", source.name, "; ".join(writer.told()))
    if chat.num_cut:
        words = "conversations are a document per answer: the chat template writes earlier answers otherwise"
        log.info("%s: %d %s", source.name, chat.num_cut, words)
    return str(folder / name)


def _is_complete(prefix: str) -> bool:
    try:
        if not IndexedDataset.exists(prefix) or open_tokens(prefix) is None:
            return False
        return (open_mask(prefix) is not None) == prefix.endswith(MASKED)
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
