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
    ):
        """config: a prepared GenerationConfig; draft_room: columns behind the longest text, for tokens on trial."""
        self.batch_size, self.prompt_length = input_ids.shape
        # Where the caller brings one of these, transformers has put it in the place of the config's.
        lengths = [item.max_length for item in criteria if type(item) is MaxLengthCriteria]
        self.max_length = max(min(lengths, default=config.max_length), self.prompt_length + 1)
        ends = [item.eos_token_id.flatten().tolist() for item in criteria if type(item) is EosTokenCriteria]
        self.eos = set(chain(*ends))
        self.pad = int(config._pad_token_tensor) if config._pad_token_tensor is not None else 0
        self.processors, self.streamer, self.do_sample = processors, streamer, config.do_sample
        # Drafts must not be heard of by processors that remember.
        self.draft_processors = LogitsProcessorList(
            processor for processor in processors if not remembers(processor, WITHOUT_MEMORY, LogitsProcessor)
        )
        self.criteria = StoppingCriteriaList(
            item for item in criteria if type(item) not in (MaxLengthCriteria, EosTokenCriteria)
        )
        # Token by token, with all rows at the same length, where somebody would notice any other order.
        self.in_step = (
            len(self.draft_processors) < len(processors)
            or any(remembers(item, CRITERIA_WITHOUT_MEMORY, StoppingCriteria) for item in self.criteria)
            or (streamer is not None and self.batch_size > 1)
        )
        self.ids = torch.full(
            (self.batch_size, self.max_length + draft_room), self.pad, dtype=input_ids.dtype, device=input_ids.device
        )
        self.ids[:, : self.prompt_length] = input_ids
        self.lengths = [self.prompt_length] * self.batch_size
        self.done = [False] * self.batch_size
        self.draft_room = draft_room
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
        scores = torch.empty_like(logits)
        for prefix, members in groups.items():
            # Processors may go by the place of a row in the batch, so they see all of it.
            where = torch.tensor(members, device=logits.device)
            owners = torch.tensor([rows[index] for index in members], device=logits.device)
            whole = logits.new_zeros(self.batch_size, logits.shape[1])
            whole[owners] = logits[where]
            scores[where] = processors(self.ids[:, :prefix], whole)[owners]
        return scores

    def pick(self, scores: torch.Tensor) -> torch.Tensor:
        """Processed scores [N, V] -> tokens [N], sampled or the most likely."""
        if self.do_sample:
            return torch.multinomial(scores.softmax(-1), 1)[:, 0]
        return scores.argmax(-1)

    def keep_scores(self, row: int, column: int, scores: torch.Tensor, logits: torch.Tensor) -> None:
        """Remember what the token in a column was chosen from ([V] each), if the caller wants it."""
        if self.scores is not None:
            self.scores[row, column] = scores.clone()
        if self.logits is not None:
            self.logits[row, column] = logits.float()

    @property
    def keeps_scores(self) -> bool:
        return self.scores is not None or self.logits is not None

    def append_to_all(self, rows: list[int], tokens: list[int], layers: list[int], confidences: list[float]) -> None:
        """One token for each of these rows, which are equally long: criteria then see the batch, as in transformers."""
        for row, token, layer, confidence in zip(rows, tokens, layers, confidences, strict=True):
            self.append(row, [token], [layer], [confidence], alone=False)
        length = self.lengths[rows[0]]
        self._stream(slice(None), length - 1)
        if self.criteria:
            ended = self.criteria(self.ids[:, :length], self.gathered(self.scores, float("-inf"), length)).tolist()
            for row in rows:
                self.done[row] = self.done[row] or ended[row]

    def append(
        self, row: int, tokens: list[int], layers: list[int], confidences: list[float], alone: bool = True
    ) -> int:
        """Add tokens until one ends the text; returns how many were added.

        `alone`: criteria and the streamer hear of this row, token by token; else they hear of the batch elsewhere.
        """
        first = self.lengths[row]
        count = len(tokens)
        for index, token in enumerate(tokens):
            if token in self.eos or first + index + 1 >= self.max_length:
                self.done[row], count = True, index + 1
                break
        self.ids[row, first : first + count] = torch.tensor(tokens[:count], device=self.ids.device)
        for index in range(count) if alone and self.criteria else ():
            if bool(self.criteria(self.ids[row : row + 1, : first + index + 1], None)[0]):
                self.done[row], count = True, index + 1
                break
        self.lengths[row] = first + count
        self.layers[row] += layers[:count]
        self.confidences[row] += confidences[:count]
        if self.draft_room:
            # What was on trial behind the text must not be taken for text.
            self.ids[row, first + count :] = self.pad
        for column in range(first, first + count) if alone else ():
            self._stream(slice(row, row + 1), column)
        return count

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
