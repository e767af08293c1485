"""Token ids of documents of any length: those of the whole text, in bounded memory."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ee_scale.data.corpora import Piece
from ee_scale.errors import UserError

WINDOW = 1 << 17  # characters that are tokenised together; a shorter document is never cut
OVERLAP = 1 << 13  # characters that two neighbours share
BATCH_CHARS = 1 << 20
# Two neighbours must say the same in the middle half of what they share: a cut only changes the tokens beside it.
MIDDLE = (OVERLAP // 4, OVERLAP - OVERLAP // 4)
LEAST_AGREEMENT = 8  # tokens
TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.py", "*.tiktoken", "*.bpe", "*.codes", "*.vocab")

# Tokens of a text from `begin` on as (id, first character, end), characters counted from `begin`.
Run = list[tuple[int, int, int]]


@dataclass(frozen=True)
class Window:
    """A stretch of a document; all but the first begin with the last OVERLAP characters of the one before."""

    text: str
    first: bool
    last: bool
    num_bytes: int


@dataclass(frozen=True)
class Ids:
    """Ids [N] that follow the ones before them; `blank`: the text that was read for them is white space."""

    ids: np.ndarray
    first: bool
    last: bool
    blank: bool
    num_bytes: int


class DocumentEncoder:
    """Documents to the ids that `tokenizer(text, add_special_tokens=False)` gives for each as a whole.

    Documents above WINDOW characters are tokenised in windows that overlap, and joined where both neighbours give the
    same tokens at the same characters. That is the whole document's answer: a sequence of byte pairs is the right one
    if each two neighbours in it are; the best path of a unigram model goes through places that the best paths of both
    sides share; and what splits text before that is in step again once it stood on the same place. Windows that do not
    agree (a number of ten thousand digits, a word without end) grow until they do, at the worst to the whole document.
    A tokenizer without a backend of the `tokenizers` library gets whole documents: memory grows with them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str = "data"):
        """`name`: what errors call the text."""
        self.name, self.tokenizer = name, tokenizer
        self.backend = own_backend(tokenizer)

    def encode(self, pieces: Iterable[Piece]) -> Iterator[Ids]:
        """Raises `UserError` for a document whose ids depend on text further away than any window reaches."""
        if self.backend is None:
            for window in windows(pieces, None):
                ids = self.tokenizer(window.text, add_special_tokens=False, verbose=False)["input_ids"]
                yield Ids(np.array(ids, np.int64), True, True, not window.text.strip(), window.num_bytes)
            return
        yield from self._joined(pair for batch in _batched(windows(pieces, WINDOW)) for pair in self._encoded(batch))

    def _encoded(self, batch: list[Window]) -> list[tuple[Window, Encoding]]:
        """Windows with their tokens; places in the text are kept for those that are joined."""
        whole = [window.text for window in batch if window.first and window.last]
        parts = [window.text for window in batch if not (window.first and window.last)]
        found = iter(self.backend.encode_batch_fast(whole, add_special_tokens=False) if whole else [])
        joined = iter(self.backend.encode_batch(parts, add_special_tokens=False) if parts else [])
        return [(window, next(found if window.first and window.last else joined)) for window in batch]

    def _joined(self, encoded: Iterable[tuple[Window, Encoding]]) -> Iterator[Ids]:
        for window, encoding in encoded:
            ids: list[int] = []
            if window.first:
                text, found, begin, run, goal = window.text, encoding, 0, [], 0
            elif not goal and (seam := _seam(found, len(text) - OVERLAP, encoding)):
                ids = found.ids[begin : seam[0]]
                text, found, begin, run = window.text, encoding, *seam[1:]
            else:
                text += window.text[OVERLAP:]
                goal = goal or 2 * len(text)  # so that all windows together cost a few times the document
                if len(text) >= goal or window.last:
                    found, goal = self.backend.encode(text, add_special_tokens=False), 0
                    begin = self._found_again(found, run)
            if window.last:
                ids = ids + found.ids[begin:]
            yield Ids(np.array(ids, np.int64), window.first, window.last, not window.text.strip(), window.num_bytes)

    def _found_again(self, found: Encoding, run: Run) -> int:
        """Where the ids go on in a window that has grown. Raises `UserError` if what was given out has changed."""
        if not run:
            return 0
        index, again = _run(found, MIDDLE)
        if again != run:
            raise UserError(
                f"{self.name}: in a document of more than {WINDOW:,} characters the tokenizer's choice depends on text "
                "too far away to be found in parts; cut that document"
            )
        return index


def windows(pieces: Iterable[Piece], size: int | None) -> Iterator[Window]:
    """The documents in windows of `size` characters (None: whole)."""
    text, num_bytes, first, inside = "", 0, True, False
    parts: list[str] = []
    for piece in pieces:
        if piece.starts_document and inside:
            yield Window(text + "".join(parts), first, True, num_bytes)
            text, parts, num_bytes, first = "", [], 0, True
        inside = True
        parts.append(piece.text)
        num_bytes += piece.num_bytes
        if size is None:
            continue
        text, parts = text + "".join(parts), []
        while len(text) > size:
            yield Window(text[:size], first, False, num_bytes)
            text, num_bytes, first = text[size - OVERLAP :], 0, False
    if inside:
        yield Window(text + "".join(parts), first, True, num_bytes)


def _batched(found: Iterable[Window]) -> Iterator[list[Window]]:
    """Lists of windows of about BATCH_CHARS characters together."""
    batch, size = [], 0
    for window in found:
        batch.append(window)
        size += len(window.text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _seam(left: Encoding, shared: int, right: Encoding) -> tuple[int, int, Run] | None:
    """The token of each at which they are joined, and the tokens from there on that both have; None: they differ."""
    end, before = _run(left, (shared + MIDDLE[0], shared + MIDDLE[1]))
    start, after = _run(right, MIDDLE)
    return (end, start, after) if before == after and len(after) >= LEAST_AGREEMENT else None


def _run(found: Encoding, span: tuple[int, int]) -> tuple[int, Run]:
    """The first token that begins within the characters of `span`, and all from there that end within them."""
    begin, end = span
    index = next((i for place in range(begin, end) if (i := found.char_to_token(place)) is not None), None)
    run: Run = []
    if index is None:
        return 0, run
    while index < len(found) and found.token_to_chars(index)[0] < begin:
        index += 1
    ids = found.ids  # a new list of all of them each time it is asked for
    for i in range(index, len(found)):
        first, last = found.token_to_chars(i)
        if last > end:
            break
        run.append((ids[i], first - begin, last - begin))
    return index, run


def own_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """The library's tokenizer behind transformers', a copy that neither truncates nor pads; None if there is none.

    transformers' own call makes lists of everything, which takes three times as long [measured].
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    calls = ("__call__", "_encode_plus")
    if backend is None or any(
        getattr(type(tokenizer), name, None) is not getattr(PreTrainedTokenizerFast, name) for name in calls
    ):
        return None
    try:
        own = Tokenizer.from_str(backend.to_str())
    except Exception:  # a part written in Python has no text
        return None
    own.no_truncation()
    own.no_padding()
    own.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
    return own


def without_row(tokenizer: PreTrainedTokenizerBase, token: int, vocab_size: int) -> str:
    """What to say of an id that a tokenizer made and the model has no row for: of a special token, most times."""
    name = tokenizer.convert_ids_to_tokens(token)
    where = "each document ends with" if token == tokenizer.eos_token_id else "the text holds"
    return (
        f"{where} the token {name!r} (id {token}), which has no row: its tokenizer has {len(tokenizer)} tokens, but "
        f"the model's vocab_size is {vocab_size}; take it out, or give the model more rows (resize_token_embeddings)"
    )


def token_with_row(vocab_size: int, *candidates: int | None) -> int:
    """The first of some ids that the model has a row for, else 0: what padding may be, since nobody looks at it."""
    return next((token for token in candidates if token is not None and 0 <= token < vocab_size), 0)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase, folder: Path | str) -> str:
    """SHA-256 of all that ids depend on: the tokenizer as it was loaded, its end mark, and the library that runs it."""
    backend = own_backend(tokenizer)
    content: list[Any] = [type(tokenizer).__name__, tokenizer.eos_token_id]
    if backend is not None:
        content += [backend.to_str(), backend.encode_special_tokens, _version("tokenizers")]
    else:
        files = sorted({path for pattern in TOKENIZER_FILES for path in Path(folder).glob(pattern) if path.is_file()})
        digests = [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in files]
        content += [sorted(tokenizer.get_vocab().items()), digests, _version("transformers"), _version("sentencepiece")]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
