"""The texts of rows that come and go.

Each is a `Sequences` of one row, without padding, with the processors, criteria, length and random numbers of its own
request: what it says does not depend on its neighbours. B places for rows, T columns, V vocabulary.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria

from .sequences import Sequences
from .transfers import send


@dataclass(frozen=True)
class Ranking:
    """A new token's log-probability, before temperature and other processors, at the layer that it came from; and the
    most likely tokens there, as (token, log-probability), best first.
    """

    logprob: float
    best: tuple[tuple[int, float], ...]


class RowTexts:
    """What the loops ask of `Sequences`, for rows that need not be equally long and differ in what they want."""

    def __init__(self, places: int, columns: int, device: torch.device):
        """columns: of the longest text, with tokens on trial."""
        self.ids = torch.zeros(places, columns, dtype=torch.long, device=device)
        self.none_ended = torch.empty(0, dtype=torch.bool, device=device)
        self.parts: dict[int, Sequences] = {}
        self.generators: dict[int, torch.Generator | None] = {}
        self.lengths, self.done = [0] * places, [False] * places
        self.layers: list[list[int]] = [[] for _ in range(places)]
        self.confidences: list[list[float]] = [[] for _ in range(places)]
        self.rankings: dict[int, tuple[int, list[Ranking]]] = {}  # of rows that are ranked: how many best ones; found
        self.scored: dict[tuple[int, int], torch.Tensor] = {}  # (row, column) -> log-probabilities [V]

    def begin(
        self, row: int, part: Sequences, generator: torch.Generator | None, best: int | None, rankings: list[Ranking]
    ) -> None:
        """A text takes a place; its ids are those of the place. generator: what it is sampled with (None: torch's).

        best: rank each new token, with so many of the most likely ones, into `rankings`; None: do not.
        """
        self.parts[row], self.generators[row] = part, generator
        if best is not None:
            self.rankings[row] = best, rankings
        self.layers[row], self.confidences[row] = part.layers[0], part.confidences[0]
        self._follow([row])

    def end(self, row: int) -> list[int]:
        """A text gives its place up; its new tokens."""
        part = self.parts.pop(row)
        del self.generators[row]
        self.rankings.pop(row, None)
        self.scored = {place: logprobs for place, logprobs in self.scored.items() if place[0] != row}
        return part.ids[0, part.prompt_length : part.lengths[0]].tolist()

    def prompt(self, row: int, pad: int) -> torch.Tensor:
        """The prompt of a row [S]."""
        return self.parts[row].prompt(0, pad)

    @property
    def in_step(self) -> bool:
        """Whether some row's processors or criteria remember what they were asked; see `Sequences`."""
        return any(part.in_step for part in self.parts.values())

    @property
    def do_sample(self) -> bool:
        return any(part.do_sample for part in self.parts.values())

    @property
    def processors(self) -> LogitsProcessorList:
        """Of all rows."""
        return LogitsProcessorList(self._all("processors"))

    @property
    def draft_processors(self) -> LogitsProcessorList:
        """Of all rows."""
        return LogitsProcessorList(self._all("draft_processors"))

    @property
    def criteria(self) -> list[StoppingCriteria]:
        """Of all rows."""
        return self._all("criteria")

    def _all(self, name: str) -> list[LogitsProcessor | StoppingCriteria]:
        return [item for part in self.parts.values() for item in getattr(part, name)]

    def room(self, row: int) -> int:
        """Tokens that row may still get."""
        return self.parts[row].room(0)

    def process(
        self, logits: torch.Tensor, rows: list[int], prefixes: list[int], *, draft: bool = False
    ) -> torch.Tensor:
        """As `Sequences.process`; each row by its own processors."""
        logits = logits.float()
        groups = defaultdict(list)
        for index, row in enumerate(rows):
            if self.parts[row].processors:
                groups[row].append(index)
        if not groups:
            return logits
        scores = logits.clone()
        for row, members in groups.items():
            where, own = send(members, logits.device), [prefixes[index] for index in members]
            scores[where] = self.parts[row].process(logits[where], [0] * len(members), own, draft=draft)
        return scores

    def pick(self, scores: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """Processed scores [N, V] of rows -> tokens [N], sampled with the numbers of each, or the most likely."""
        tokens = scores.argmax(-1)
        for index, row in enumerate(rows):
            if self.parts[row].do_sample:
                chances = scores[index].softmax(-1)
                tokens[index] = torch.multinomial(chances, 1, generator=self.generators[row])[0]
        return tokens

    @property
    def keeps_scores(self) -> bool:
        """Whether some row is ranked."""
        return bool(self.rankings)

    def keep_scores(self, row: int, column: int, scores: torch.Tensor, logits: torch.Tensor) -> None:
        """Logits [V] that the token in a column is chosen from, of a row that is ranked; `scores` are not needed."""
        if row in self.rankings:
            self.scored[row, column] = logits.float().log_softmax(-1)

    def _rank(self, row: int) -> None:
        """Tokens that stand since the last time."""
        part, (best, rankings) = self.parts[row], self.rankings[row]
        for column in range(part.prompt_length + len(rankings), part.lengths[0]):
            logprobs = self.scored.pop((row, column))
            top = logprobs.topk(best)
            own = float(logprobs[part.ids[0, column]])
            rankings.append(Ranking(own, tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))))

    def try_tokens(self, index: torch.Tensor, rows: list[int], drafted: int, tokens: torch.Tensor) -> None:
        """Put tokens [N] on trial behind rows and `drafted` drafts."""
        self.ids[index, send([self.lengths[row] + drafted for row in rows], self.ids.device)] = tokens

    def write(self, rows: list[int], index: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Put one token [N] behind each of these rows; `index` [N]: they on the device.

        Returns what criteria say, bool [B]; [0] where there are none, or streamers have to hear of the tokens before.
        """
        self.try_tokens(index, rows, 0, tokens)
        asked = [row for row in rows if self.parts[row].criteria and self.parts[row].streamer is None]
        if not asked:
            return self.none_ended
        told = self.none_ended.new_zeros(len(self.lengths))
        for row in asked:
            told[row] = self.parts[row].ended(self.lengths[row] + 1)[0]
        return told

    def append_to_all(
        self, rows: list[int], tokens: list[int], layers: list[int], confidences: list[float], ended: list[bool]
    ) -> None:
        """What `write` has put behind these rows, as the host has read it."""
        for row, token, layer, confidence in zip(rows, tokens, layers, confidences, strict=True):
            self.parts[row].append_to_all([0], [token], [layer], [confidence], ended[row : row + 1])
        self._follow(rows)

    def append(
        self,
        rows: list[int],
        tokens: list[list[int]],
        layers: list[list[int]],
        confidences: list[list[float]],
        width: int,
    ) -> list[int]:
        """As `Sequences.append`."""
        counts = [
            self.parts[row].append([0], [new], [where], [seen], width)[0]
            for row, new, where, seen in zip(rows, tokens, layers, confidences, strict=True)
        ]
        self._follow(rows)
        return counts

    def _follow(self, rows: list[int]) -> None:
        for row in rows:
            self.lengths[row], self.done[row] = self.parts[row].lengths[0], self.parts[row].done[0]
            if row in self.rankings:
                self._rank(row)
