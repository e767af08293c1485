"""The texts that grow: sampling, stopping and streaming, by transformers' own parts.

Rows of a batch may have different lengths, because drafts are accepted row by row. T columns of ids, V vocabulary.
"""

from collections import defaultdict
from inspect import isfunction
from itertools import chain
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from .policies import most_likely
from .transfers import read, send

# transformers' processors that do not look at the text before: one call for any number of positions.
WITHOUT_HISTORY = {
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "MinPLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopHLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TypicalLogitsWarper",
}
# Those that remember nothing between calls: text and logits decide alone. All others, SynthID's watermark and what a
# user brings, are called once per token, as plain decoding does, unless they have no place to remember anything in.
WITHOUT_MEMORY = WITHOUT_HISTORY | {
    "ExponentialDecayLengthPenalty",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor",
    "WatermarkLogitsProcessor",
}
CRITERIA_WITHOUT_MEMORY = {"MaxTimeCriteria", "StopStringCriteria"}


def known(part: LogitsProcessor | StoppingCriteria, names: set[str], base: type) -> bool:
    """Whether a processor or criterion is one of transformers' own, and not a class that somebody made of it."""
    return type(part).__module__ == base.__module__ and type(part).__name__ in names


def remembers(part: LogitsProcessor | StoppingCriteria, names: set[str], base: type) -> bool:
    """Whether a processor or criterion may act by what it was called with before."""
    if known(part, names, base):
        return False
    classes = [cls for cls in type(part).__mro__ if cls not in (base, *base.__mro__)]
    items = [item for cls in classes for item in vars(cls).items()]
    held = [value for name, value in items if name == "__call__" or not name.startswith("__")]
    return bool(vars(part)) or not all(isfunction(value) and keeps_nothing(value) for value in held)


def without_memory(processors: LogitsProcessorList) -> LogitsProcessorList:
    """Those that may hear of drafts: what was drafted must not be remembered."""
    return LogitsProcessorList(item for item in processors if not remembers(item, WITHOUT_MEMORY, LogitsProcessor))


def keeps_nothing(function: FunctionType) -> bool:
    """Whether a function has no place to keep anything in: all that it reads from outside is torch."""
    code, there = function.__code__, function.__globals__
    places = [function.__closure__, function.__defaults__, function.__kwdefaults__]
    inner = [value for value in code.co_consts if isinstance(value, CodeType)]
    outside = [there[name] for name in code.co_names if name in there]
    torch_only = all(isinstance(value, ModuleType) and value.__name__.split(".")[0] == "torch" for value in outside)
    return torch_only and not inner and not any(places)


def looks_back(processors: LogitsProcessorList) -> bool:
    """Whether some processor may read the text before."""
    return not all(known(processor, WITHOUT_HISTORY, LogitsProcessor) for processor in processors)


class Sequences:
    """Prompts and new tokens of B rows, left-padded as they came: ids [B, T], `lengths` columns of each in use.

    `layers` and `confidences`, one list per row, tell where each new token came from.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: BaseStreamer | None = None,
        draft_room: int = 0,
        ids: torch.Tensor | None = None,
    ):
        """config: a prepared GenerationConfig; draft_room: columns behind the longest text, for tokens on trial; ids:
        where the texts are kept, [B, columns that are enough].
        """
        self.batch_size, self.prompt_length = input_ids.shape
        # Where the caller brings one of these, transformers has put it in the place of the config's.
        lengths = [item.max_length for item in criteria if type(item) is MaxLengthCriteria]
        self.max_length = max(min(lengths, default=config.max_length), self.prompt_length + 1)
        ends = [item.eos_token_id.flatten().tolist() for item in criteria if type(item) is EosTokenCriteria]
        self.eos = set(chain(*ends))
        self.pad = int(config._pad_token_tensor) if config._pad_token_tensor is not None else 0
        self.processors, self.streamer, self.do_sample = processors, streamer, config.do_sample
        self.draft_processors = without_memory(processors)
        self.criteria = StoppingCriteriaList(
            item for item in criteria if type(item) not in (MaxLengthCriteria, EosTokenCriteria)
        )
        # Token by token, with all rows at the same length, where somebody would notice any other order.
        self.in_step = (
            len(self.draft_processors) < len(processors)
            or any(remembers(item, CRITERIA_WITHOUT_MEMORY, StoppingCriteria) for item in self.criteria)
            or (streamer is not None and self.batch_size > 1)
        )
        shape = self.batch_size, self.max_length + draft_room
        self.ids = input_ids.new_empty(shape) if ids is None else ids
        self.ids.fill_(self.pad)
        self.ids[:, : self.prompt_length] = input_ids
        self.lengths = [self.prompt_length] * self.batch_size
        self.done = [False] * self.batch_size
        self.none_ended = torch.empty(0, dtype=torch.bool, device=input_ids.device)
        self.layers: list[list[int]] = [[] for _ in self.lengths]
        self.confidences: list[list[float]] = [[] for _ in self.lengths]
        wants = config.return_dict_in_generate
        self.scores = {} if wants and config.output_scores else None
        self.logits = {} if wants and config.output_logits else None

    def room(self, row: int) -> int:
        """Tokens that row may still get."""
        return self.max_length - self.lengths[row]

    def process(
        self, logits: torch.Tensor, rows: list[int], prefixes: list[int], *, draft: bool = False
    ) -> torch.Tensor:
        """Logits [N, V] -> processed scores, fp32. Position i follows the first prefixes[i] columns of rows[i].

        `draft`: only by processors that remember nothing.
        """
        logits, processors = logits.float(), self.draft_processors if draft else self.processors
        if not processors:
            return logits
        if not looks_back(processors):
            return processors(self.ids[:1, :1].expand(len(rows), 1), logits)
        groups = defaultdict(list)
        for index, prefix in enumerate(prefixes):
            groups[prefix].append(index)
        if len(groups) == 1 and len(rows) == self.batch_size:
            return processors(self.ids[:, : prefixes[0]], logits.clone())  # some write into what they get
        scores = torch.empty_like(logits)
        for prefix, members in groups.items():
            # Processors may go by the place of a row in the batch, so they see all of it.
            where = send(members, logits.device)
            owners = send([rows[index] for index in members], logits.device)
            whole = logits.new_zeros(self.batch_size, logits.shape[1])
            whole[owners] = logits[where]
            scores[where] = processors(self.ids[:, :prefix], whole)[owners]
        return scores

    def prompt(self, row: int, pad: int) -> torch.Tensor:
        """The prompt of a row behind so many columns of padding, [S]."""
        return self.ids[row, pad : self.prompt_length]

    def pick(self, scores: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """Processed scores [N, V] of so many rows -> tokens [N], sampled or the most likely."""
        if self.do_sample:
            return torch.multinomial(scores.softmax(-1), 1)[:, 0]
        return most_likely(scores)

    def keep_scores(self, row: int, column: int, scores: torch.Tensor, logits: torch.Tensor) -> None:
        """Remember what the token in a column was chosen from ([V] each), if the caller wants it."""
        if self.scores is not None:
            self.scores[row, column] = scores.clone()
        if self.logits is not None:
            self.logits[row, column] = logits.to(torch.float32, copy=True)

    @property
    def keeps_scores(self) -> bool:
        return self.scores is not None or self.logits is not None

    def try_tokens(self, index: torch.Tensor, rows: list[int], drafted: int, tokens: torch.Tensor) -> None:
        """Put tokens [N] on trial behind rows and `drafted` drafts."""
        columns = send([self.lengths[row] + drafted for row in rows], self.ids.device)
        self.ids[index, columns] = tokens

    def forget_trials(self, width: int) -> None:
        """Take back what is on trial behind rows that are equally long."""
        length = max(self.lengths)
        self.ids[:, length : length + width] = self.pad

    def write(self, rows: list[int], index: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Put one token [N] behind each of these rows, which are equally long; `index` [N]: they on the device.

        Returns what criteria say of the whole batch, bool [B]; [0] where there are none, or a streamer has to hear of
        the tokens before they do.
        """
        length = max(self.lengths)
        self.ids[index, length] = tokens
        return self.ended(length + 1) if self.criteria and self.streamer is None else self.none_ended

    def append_to_all(
        self, rows: list[int], tokens: list[int], layers: list[int], confidences: list[float], ended: list[bool]
    ) -> None:
        """What `write` has put behind these rows, as the host has read it."""
        for row, token, layer, confidence in zip(rows, tokens, layers, confidences, strict=True):
            self._extend(row, [token], [layer], [confidence])
        length = self.lengths[rows[0]]
        self._stream(slice(None), length - 1)
        if self.criteria and self.streamer is not None:
            (ended,) = read(self.ended(length))
        for row in rows if ended else ():
            self.done[row] = self.done[row] or ended[row]

    def ended(self, length: int) -> torch.Tensor:
        """What criteria say of the first `length` columns, bool [B]."""
        return self.criteria(self.ids[:, :length], self.gathered(self.scores, float("-inf"), length))

    def append(
        self,
        rows: list[int],
        tokens: list[list[int]],
        layers: list[list[int]],
        confidences: list[list[float]],
        width: int,
    ) -> list[int]:
        """Add tokens to each row until one ends its text; returns how many were added.

        width: columns behind the texts that may hold tokens on trial. Criteria and the streamer hear of one row after
        the other, token by token.
        """
        counts = [self._until_end(row, new) for row, new in zip(rows, tokens, strict=True)]
        places = [[row, *range(self.lengths[row], self.lengths[row] + width)] for row in rows]
        # What was on trial behind the text must not be taken for text.
        kept = [new[:n] + [self.pad] * (width - n) for new, n in zip(tokens, counts, strict=True)]
        sent = send([place + new for place, new in zip(places, kept, strict=True)], self.ids.device)
        self.ids[sent[:, :1], sent[:, 1 : width + 1]] = sent[:, width + 1 :]
        if self.criteria:
            counts = self._until_told(rows, counts)
        for row, new, n, where, seen in zip(rows, tokens, counts, layers, confidences, strict=True):
            self._extend(row, new[:n], where[:n], seen[:n])
            for column in range(self.lengths[row] - n, self.lengths[row]) if self.streamer is not None else ():
                self._stream(slice(row, row + 1), column)
        return counts

    def _until_end(self, row: int, tokens: list[int]) -> int:
        """How many of these tokens come up to and with an end mark, and fit."""
        room = self.room(row)
        return next((i for i, token in enumerate(tokens[:room], 1) if token in self.eos), min(room, len(tokens)))

    def _until_told(self, rows: list[int], counts: list[int]) -> list[int]:
        """The same for the criteria, which remember nothing: asked behind every token, heard in one wait."""
        said = [
            self.criteria(self.ids[row : row + 1, : self.lengths[row] + i], None)
            for row, count in zip(rows, counts, strict=True)
            for i in range(1, count + 1)
        ]
        (ended,), first, kept = read(torch.cat(said)), 0, []
        for row, count in zip(rows, counts, strict=True):
            own = ended[first : first + count]
            first += count
            if any(own):
                self.done[row], count = True, own.index(True) + 1
                self.ids[row, self.lengths[row] + count : self.lengths[row] + len(own)] = self.pad
            kept.append(count)
        return kept

    def _extend(self, row: int, tokens: list[int], layers: list[int], confidences: list[float]) -> None:
        self.lengths[row] += len(tokens)
        self.layers[row] += layers
        self.confidences[row] += confidences
        if tokens[-1] in self.eos or self.lengths[row] >= self.max_length:
            self.done[row] = True

    def _stream(self, rows: slice, column: int) -> None:
        """The tokens in one column to the streamer: [R], as plain decoding hands them on."""
        if self.streamer is None:
            return
        tokens, place = self.ids[rows, column].cpu(), column - self.prompt_length
        if hasattr(self.streamer, "put_exits"):
            layers = [row[place] if place < len(row) else 0 for row in self.layers[rows]]
            self.streamer.put_exits(tokens.tolist(), layers)
        self.streamer.put(tokens)

    def finish(self) -> torch.Tensor:
        """End the stream; ids [B, longest]."""
        if self.streamer is not None:
            self.streamer.end()
        return self.ids[:, : max(self.lengths)].clone()

    def per_token(self, kept: list[list[Any]], dtype: torch.dtype) -> torch.Tensor:
        """`layers` or `confidences` as [B, new tokens], zeros behind the end of a row."""
        new = max(self.lengths) - self.prompt_length
        return torch.tensor([row + [0] * (new - len(row)) for row in kept], dtype=dtype).view(self.batch_size, new)

    def gathered(
        self, kept: dict[tuple[int, int], torch.Tensor] | None, end: float, length: int | None = None
    ) -> tuple[torch.Tensor, ...] | None:
        """Per-step [B, V] tensors, up to `length` columns, as transformers has them; `end` fills ended rows."""
        if kept is None:
            return None
        some = next(iter(kept.values()))
        steps = range(self.prompt_length, max(self.lengths) if length is None else length)
        filler = torch.full_like(some, end)
        return tuple(torch.stack([kept.get((b, c), filler) for b in range(self.batch_size)]) for c in steps)
