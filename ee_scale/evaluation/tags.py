"""Windows of held-out text that know which document and which group (tag) they belong to."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ee_scale.data.chat import ChatEncoder, Conversation, document_of
from ee_scale.data.corpora import num_tokens, open_mask, open_tokens, read_tokens
from ee_scale.data.folders import bad_bytes, find_files
from ee_scale.data.loader import read_learned, windows
from ee_scale.data.readers import RECORDS, Number, read_records, text_of
from ee_scale.errors import UserError
from ee_scale.evaluation.records import Window

SCAN_TOKENS = 1 << 22
SHUFFLE_SEED = 0
Document = tuple[torch.Tensor, torch.Tensor]  # token ids [n] int64, and which are learned, bool [n]


def stream_windows(prefixes: list[str], seq_length: int, max_tokens: int) -> list[Window]:
    """The windows of `data.loader.windows` (documents lie one after the other), each a unit of its own; those of which
    nothing is learned are left out.
    """
    rows = ((tokens[0], learned[0]) for tokens, learned in windows(prefixes, seq_length, 1, max_tokens))
    return [Window(row, unit, None, learned) for unit, (row, learned) in enumerate(rows) if learned.any()]


def document_windows(
    prefixes: list[str], eos_id: int, seq_length: int, max_tokens: int = 0, unit: str = "window"
) -> list[Window]:
    """Windows that never cross the end of a document, chosen at random over the whole text.

    A text ends with `eos_id`; a conversation, which may hold that mark after every message, where its dataset says.

    A window predicts at most `seq_length` tokens. `unit`: every window counts as drawn independently, or only documents
    do. About `max_tokens` are predicted (0: all).
    """
    documents = (document for prefix in prefixes for document in _split(prefix, eos_id))
    return _chosen(_cut(documents, seq_length), max_tokens, unit)


def tagged_windows(
    sources: list[str],
    tokenizer: PreTrainedTokenizerBase,
    text_key: str,
    tag_key: str,
    seq_length: int,
    max_tokens: int = 0,
    unit: str = "window",
    errors: str = "strict",
) -> list[Window]:
    """As `document_windows`, from files of records (or folders of them) that name a tag in the field `tag_key`.

    Raises `UserError` for other data, and for a record without the tag, naming file and line.
    """
    documents: list[Document] = []
    tags, bad = [], bad_bytes("", errors)
    chat = ChatEncoder(tokenizer)
    for path, kind in (item for source in sources for item in find_files(source, text_key, "", errors).files):
        if kind not in RECORDS:
            raise UserError(f"tag_key={tag_key}: data='{path}' is read as {kind}; tags are fields of records (.jsonl)")
        for found in read_records(path, kind, f"data='{path}'", bad, as_written=True):
            here = f"data='{path}' {found.place}"
            document = document_of(found.record, text_key, here, "text_key", bad)
            tag = _tag(found.record, tag_key, here)
            for item in _encoded(document, tokenizer, chat):
                documents.append(item)
                tags.append(tag)
    return _chosen(_cut(documents, seq_length, tags), max_tokens, unit)


def _encoded(document: str | Conversation, tokenizer: PreTrainedTokenizerBase, chat: ChatEncoder) -> Iterator[Document]:
    """Token ids and what is learned of them; nothing of what is blank."""
    if isinstance(document, Conversation):
        for found in [] if document.blank else chat.encode(document):
            yield torch.from_numpy(found.ids), torch.from_numpy(found.learned)
    elif document.strip():
        tails = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        ids = torch.tensor([*tokenizer(document, add_special_tokens=False, verbose=False).input_ids, *tails])
        yield ids, torch.ones(len(ids), dtype=torch.bool)


def _tag(record: dict[str, Any], tag_key: str, here: str) -> str:
    """The tag of a record; a number or a bool is its text, as it was written."""
    tag = record.get(tag_key)
    if isinstance(tag, bool):
        return json.dumps(tag)
    return str(tag) if isinstance(tag, Number) else text_of(record, tag_key, here, "tag_key")


def _split(prefix: str, eos_id: int) -> Iterator[Document]:
    """The documents of a dataset, with their end mark; text files hold marks inside their one document too."""
    dataset, mask = open_tokens(prefix), open_mask(prefix)
    total, ends = num_tokens(dataset), []
    if mask is not None:
        ends = np.cumsum(dataset.sequence_lengths, dtype=np.int64)[dataset.document_indices[1:] - 1].tolist()
    for start in range(0, total if mask is None else 0, SCAN_TOKENS):
        ids = read_tokens(dataset, start, min(SCAN_TOKENS, total - start))
        ends += (start + 1 + np.flatnonzero(ids == eos_id)).tolist()
    start = 0
    for end in [*ends, total]:
        if end > start:
            yield torch.from_numpy(read_tokens(dataset, start, end - start)), read_learned(mask, start, end - start)
        start = end


def _cut(documents: Iterable[Document], seq_length: int, tags: list[str] | None = None) -> list[Window]:
    """Windows of documents that share no predicted token and learn at least one; `unit` is the document."""
    found = []
    for number, (ids, learned) in enumerate(documents):
        tag = None if tags is None else tags[number]
        # The last token of a window is the first of the next: it is predicted in one and read in the other.
        for start in range(0, len(ids) - 1, seq_length):
            window = slice(start, start + seq_length + 1)
            if learned[window][1:].any():
                found.append(Window(ids[window], number, tag, learned[window][1:]))
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
        chosen += [replace(window, unit=number) for window in group]
        tokens += sum(window.num_predicted for window in group)
    return chosen
