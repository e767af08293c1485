"""What of some texts stands verbatim in a corpus: passages of LEAST characters and more."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from ee_scale.reading import whole

LEAST = 50  # characters: about ten words
BASE = np.uint64(1_000_003)
STRIDE = 1 << 20  # characters of the corpus whose windows are looked up together


@whole
@dataclass(frozen=True)
class Overlap:
    """Of the texts that one model wrote.

    Attributes:
        texts: written; `found`: of them, those with a passage that stands in the corpus.
        longest: characters of the longest passage; 0: none of LEAST.
        share: of all characters written, those inside such passages.
    """

    texts: int
    found: int
    longest: int
    share: float


def overlaps(written: dict[str, Sequence[str]], corpus: Iterable[str]) -> dict[str, Overlap]:
    """By writer, of the documents of a corpus, which is read once. Passages do not cross documents."""
    wanted = {window for texts in written.values() for text in texts for window in _windows(text)}
    found = _standing(wanted, corpus)
    return {name: _overlap(texts, found) for name, texts in written.items()}


def _windows(text: str) -> list[str]:
    return [text[i : i + LEAST] for i in range(len(text) - LEAST + 1)]


def _standing(wanted: set[str], corpus: Iterable[str]) -> set[str]:
    """Those windows that stand in the corpus. A hash finds them, and the text itself decides."""
    hashes, found = np.sort(_hashes("".join(sorted(wanted)))[::LEAST]), set()
    for document in corpus:
        for start in range(0, max(0, len(document) - LEAST + 1), STRIDE):
            piece = document[start : start + STRIDE + LEAST - 1]
            places = np.flatnonzero(np.isin(_hashes(piece), hashes))
            found |= wanted & {piece[i : i + LEAST] for i in places.tolist()}
    return found


def _hashes(text: str) -> np.ndarray:
    """uint64 [len - LEAST + 1]: a polynomial of each window's characters, modulo 2^64."""
    letters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    total = np.zeros(max(0, len(letters) - LEAST + 1), dtype=np.uint64)
    for i in range(LEAST):
        total = total * BASE + letters[i : i + len(total)]
    return total


def _overlap(texts: Sequence[str], standing: set[str]) -> Overlap:
    passages = [_passages(text, standing) for text in texts]
    inside, written = sum(map(sum, passages)), sum(map(len, texts))
    longest = max((length for lengths in passages for length in lengths), default=0)
    return Overlap(len(texts), sum(map(bool, passages)), longest, inside / max(1, written))


def _passages(text: str, standing: set[str]) -> list[int]:
    """Characters of each stretch of the text whose windows all stand in the corpus."""
    covered = [False] * len(text)
    for i, window in enumerate(_windows(text)):
        if window in standing:
            covered[i : i + LEAST] = [True] * LEAST
    return [len(list(run)) for inside, run in groupby(covered) if inside]
