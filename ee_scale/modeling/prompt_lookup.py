"""Drafts from the text itself: what stood behind the last words when they were there before.

transformers' prompt lookup with three changes: the latest place counts, not the first; what is copied may run into
itself, as a loop does; and an index that grows with the text takes the place of a search through all of it.
"""

from collections.abc import Sequence

from .drafting import PROMPT, Drafting
from .sequences import Sequences
from .sources import Cycle, Draft, Source
from .transfers import read, send

LONGEST = 3  # tokens that are looked up together
COMPARED = 8  # tokens that a match is told to have at most
REHEARSED = 512  # last tokens of a prompt that say how good its own lookups are


class TextIndex:
    """One row's text on the host, and where its n-grams of 1 to `LONGEST` tokens stood last. Padding is no part of it.

    Attributes:
        match: tokens before the end of the text that stood before `place` too, 0 (nowhere) to `COMPARED`.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.places: dict[tuple[int, ...], int] = {}  # n-gram -> the place behind it
        self.match = self.place = 0

    def append(self, token: int) -> tuple[int, bool]:
        """One more token. Returns the match before it, and whether what stood there was the same token."""
        tokens, before = self.tokens, self.match
        right = before > 0 and tokens[self.place] == token
        end = len(tokens)
        for n in range(1, min(LONGEST, end) + 1):
            self.places[tuple(tokens[end - n :])] = end
        tokens.append(token)
        self._look(end + 1)
        return before, right

    def _look(self, end: int) -> None:
        tokens = self.tokens
        self.match = 0
        for n in range(min(LONGEST, end - 1), 0, -1):
            place = self.places.get(tuple(tokens[end - n :]))
            if place is not None:
                self.match, self.place = n, place
                break
        else:
            return
        while (
            self.match < min(COMPARED, self.place)
            and tokens[self.place - self.match - 1] == tokens[end - self.match - 1]
        ):
            self.match += 1

    def continuation(self, count: int) -> list[int]:
        """What stood behind the match, `count` tokens; a match that reaches the end of the text repeats itself."""
        end, place = len(self.tokens), self.place
        period = end - place
        return [self.tokens[place + i % period] for i in range(count)]


class PromptSource(Source):
    """Drafts copied from the prompt and the text so far; they cost next to nothing, and every layer checks them.

    How often lookups are right is seen at every new token, whoever drafted it, and in the prompt.
    """

    name = PROMPT

    def __init__(self, num_layers: int, sequences: Sequences, pads: Sequence[int], drafting: Drafting):
        self.layer, self.sequences, self.pads, self.drafting = num_layers, sequences, pads, drafting
        self.texts: dict[int, TextIndex] = {}

    def matches(self, rows: list[int]) -> list[int]:
        """For each row, how many tokens a match has; 0: none."""
        found = [text.match for text in self._texts_of(rows)]
        # In step, a row that rejects its draft holds up all others.
        return found if all(found) or not self.sequences.in_step else [0] * len(rows)

    def _texts_of(self, rows: list[int]) -> list[TextIndex]:
        if new := [row for row in rows if row not in self.texts]:
            self._read_texts(new)
        return [self.texts[row] for row in rows]

    def _read_texts(self, rows: list[int]) -> None:
        """Texts that began on the device: one wait for all of them."""
        sequences = self.sequences
        width = max(sequences.lengths[row] for row in rows)
        ids = sequences.ids[send(rows, sequences.ids.device), :width]
        (flat,) = read(ids.flatten())
        for slot, row in enumerate(rows):
            text = flat[slot * width + self.pads[row] : slot * width + sequences.lengths[row]]
            index = self.texts[row] = TextIndex()
            for place, token in enumerate(text, REHEARSED - len(text)):
                match, right = index.append(token)
                if match and place >= 0:
                    self.drafting.looked_up(match, right)
        self.drafting.rehearsed()

    def draft(self, cycle: Cycle) -> Draft:
        count = min(self.drafting.planned, cycle.most)
        texts = [self.texts[row] for row in cycle.rows]
        # Any token will do as the draft of a row that has none.
        copied = [text.continuation(count) if text.match else text.tokens[-1:] * count for text in texts]
        counts = [count if text.match else 0 for text in texts]
        tokens = send(copied, cycle.tokens.device)
        cycle.clock.lap("check")
        return Draft(list(tokens.unbind(1)), [None] * count, counts=counts)

    def forget(self, row: int) -> None:
        self.texts.pop(row, None)

    def grew(self, row: int, tokens: list[int]) -> None:
        if row not in self.texts:
            return
        for token in tokens:
            match, right = self.texts[row].append(token)
            if match:
                self.drafting.looked_up(match, right)
