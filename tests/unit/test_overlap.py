"""Passages that stand verbatim in a corpus: found wherever they lie, and none that is a character too short."""

import random
import string

from ee_scale.palettes import overlap
from ee_scale.palettes.overlap import LEAST, Overlap, overlaps

RANDOM = random.Random(3)


def letters(count: int) -> str:
    return "".join(RANDOM.choice(string.ascii_letters + " \u00e9\u00df") for _ in range(count))


CORPUS = [letters(300), "", letters(20), letters(1000)]


def test_passages_are_found_at_any_place() -> None:
    for first in (0, 137, len(CORPUS[3]) - LEAST):
        passage = CORPUS[3][first : first + LEAST]
        found = overlaps({"a": [f"#{passage}#", letters(80)]}, CORPUS)["a"]
        assert found == Overlap(2, 1, LEAST, LEAST / (LEAST + 2 + 80))


def test_a_character_less_is_none() -> None:
    whole, other = CORPUS[0], CORPUS[3]
    for text in (whole[: LEAST - 1], whole[:30] + other[:30], whole[-25:] + other[:25], "", "short"):
        assert overlaps({"a": [text]}, CORPUS)["a"].found == 0
    changed = f"{whole[:10]}#{whole[11:LEAST]}"
    assert overlaps({"a": [changed]}, CORPUS)["a"] == Overlap(1, 0, 0, 0.0)


def test_writers_apart_and_lengths() -> None:
    text = CORPUS[0][40:160] + "#" * 40 + CORPUS[3][:60] + "#" * 80
    found = overlaps({"a": [text], "b": ["#" * 200], "c": []}, CORPUS)
    assert found == {"a": Overlap(1, 1, 120, 180 / 300), "b": Overlap(1, 0, 0, 0.0), "c": Overlap(0, 0, 0, 0.0)}


def test_pieces_of_a_long_document_lose_nothing(monkeypatch) -> None:
    monkeypatch.setattr(overlap, "STRIDE", 64)
    for first in range(0, 900, 31):
        assert overlaps({"a": [CORPUS[3][first : first + 70]]}, CORPUS)["a"].longest == min(70, 1000 - first)


def test_equal_hashes_are_not_equal_texts(monkeypatch) -> None:
    monkeypatch.setattr(overlap, "BASE", overlap.np.uint64(0))  # only the last character counts
    assert overlaps({"a": [letters(LEAST - 1) + CORPUS[0][100]]}, CORPUS)["a"].found == 0
    assert overlaps({"a": [CORPUS[0]]}, CORPUS)["a"].longest == 300
