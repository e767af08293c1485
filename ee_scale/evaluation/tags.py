"""Windows of held-out text that know which document and which group (tag) they belong to."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ee_scale.data.corpora import num_tokens, open_tokens, read_tokens
from ee_scale.data.folders import find_files
from ee_scale.data.loader import windows
from ee_scale.data.readers import RECORDS, Number, read_records, text_of
from ee_scale.errors import UserError
from ee_scale.evaluation.records import Window

SCAN_TOKENS = 1 << 22
SHUFFLE_SEED = 0


def stream_windows(prefixes: list[str], seq_length: int, max_tokens: int) -> list[Window]:
    """The windows of `data.loader.windows` (documents lie one after the other), each a unit of its own."""
    rows = (row for batch in windows(prefixes, seq_length, 1, max_tokens) for row in batch)
    return [Window(row, unit) for unit, row in enumerate(rows)]


def document_windows(
    prefixes: list[str], eos_id: int, seq_length: int, max_tokens: int = 0, unit: str = "window"
) -> list[Window]:
    """Windows that never cross the end of a document (`eos_id`), chosen at random over the whole text.

    A window predicts at most `seq_length` tokens. `unit`: every window counts as drawn independently, or only documents
    do. About `max_tokens` are predicted (0: all).
    """
    documents = (ids for prefix in prefixes for ids in _split(prefix, eos_id))
    return _chosen(_cut(documents, seq_length), max_tokens, unit)


def tagged_windows(
    sources: list[str],
    tokenizer: PreTrainedTokenizerBase,
    text_key: str,
    tag_key: str,
    seq_length: int,
    max_tokens: int = 0,
    unit: str = "window",
) -> list[Window]:
    """As `document_windows`, from files of records (or folders of them) that name a tag in the field `tag_key`.

    Raises `UserError` for other data, and for a record without the tag, naming file and line.
    """
    documents, tags = [], []
    for path, kind in (item for source in sources for item in find_files(source, text_key, "").files):
        if kind not in RECORDS:
            raise UserError(f"tag_key={tag_key}: data='{path}' is read as {kind}; tags are fields of records (.jsonl)")
        for found in read_records(path, kind, f"data='{path}'", as_written=True):
            here = f"data='{path}' line {found.line}"
            text = text_of(found.record, text_key, here, "text_key")
            tag = _tag(found.record, tag_key, here)
            if text.strip():
                documents.append([*tokenizer(text, add_special_tokens=False, verbose=False).input_ids])
                tags.append(tag)
    tails = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids = (torch.tensor([*document, *tails]) for document in documents)
    return _chosen(_cut(ids, seq_length, tags), max_tokens, unit)


def _tag(record: dict[str, Any], tag_key: str, here: str) -> str:
    """The tag of a record; a number or a bool is its text, as it was written."""
    tag = record.get(tag_key)
    if isinstance(tag, bool):
        return json.dumps(tag)
    return str(tag) if isinstance(tag, Number) else text_of(record, tag_key, here, "tag_key")


def _split(prefix: str, eos_id: int) -> Iterator[torch.Tensor]:
    """The documents of a dataset, with their end mark; text files hold marks inside their one document too."""
    dataset = open_tokens(prefix)
    total, ends = num_tokens(dataset), []
    for start in range(0, total, SCAN_TOKENS):
        ids = read_tokens(dataset, start, min(SCAN_TOKENS, total - start))
        ends += (start + 1 + np.flatnonzero(ids == eos_id)).tolist()
    start = 0
    for end in [*ends, total]:
        if end > start:
            yield torch.from_numpy(read_tokens(dataset, start, end - start))
        start = end


def _cut(documents: Iterable[torch.Tensor], seq_length: int, tags: list[str] | None = None) -> list[Window]:
    """Windows of documents [n] that share no predicted token; `unit` is the document."""
    found = []
    for number, ids in enumerate(documents):
        tag = None if tags is None else tags[number]
        # The last token of a window is the first of the next: it is predicted in one and read in the other.
        for start in range(0, len(ids) - 1, seq_length):
            found.append(Window(ids[start : start + seq_length + 1], number, tag))
    return found


def _chosen(found: list[Window], max_tokens: int, unit: str) -> list[Window]:
    """Whole units in random order until `max_tokens` are predicted, numbered anew."""
    if not found:
        raise UserError("data: no document has the 2 tokens that a prediction needs")
    groups: dict[int, list[Window]] = {}
    for index, window in enumerate(found):
        groups.setdefault(index if unit == "window" else window.unit, []).append(window)
    keys, chosen, tokens = list(groups), [], 0
    for number, at in enumerate(np.random.default_rng(SHUFFLE_SEED).permutation(len(keys))):
        if max_tokens and tokens >= max_tokens:
            break
        group = groups[keys[at]]
        chosen += [Window(window.tokens, number, window.tag) for window in group]
        tokens += sum(len(window.tokens) - 1 for window in group)
    return chosen
