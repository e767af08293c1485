"""The texts that grow: sampling, stopping and streaming, by transformers' own parts. Copied into exported folders.

Rows of a batch may have different lengths, because drafts are accepted row by row. T columns of ids, V vocabulary.
"""

from collections import defaultdict
from typing import Any

import torch
from transformers import (
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

# Processors that do not look at the text before: one call for any number of positions.
WITHOUT_HISTORY = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)


class Sequences:
    """Prompts and new tokens of B rows, left-padded as they came: ids [B, T], `lengths` columns of each in use.

    `layers` and `confidences`, one list per row, tell where each new token came from.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: Any,
        streamer: Any = None,
        draft_room: int = 0,
    ):
        """config: a prepared GenerationConfig; draft_room: columns behind the longest text, for tokens on trial."""
        self.batch_size, self.prompt_length = input_ids.shape
        self.max_length = config.max_length
        self.pad = int(config._pad_token_tensor) if config._pad_token_tensor is not None else 0
        eos = config._eos_token_tensor
        self.eos = set() if eos is None else set(eos.flatten().tolist())
        self.processors, self.streamer, self.do_sample = processors, streamer, config.do_sample
        self.stateless = all(isinstance(processor, WITHOUT_HISTORY) for processor in processors)
        self.criteria = StoppingCriteriaList(
            item for item in criteria if not isinstance(item, MaxLengthCriteria | EosTokenCriteria)
        )
        room = self.max_length - self.prompt_length
        self.ids = torch.full(
            (self.batch_size, self.max_length + draft_room), self.pad, dtype=input_ids.dtype, device=input_ids.device
        )
        self.ids[:, : self.prompt_length] = input_ids
        self.lengths = [self.prompt_length] * self.batch_size
        self.done = [room <= 0] * self.batch_size
        self.draft_room = draft_room
        self.layers: list[list[int]] = [[] for _ in self.lengths]
        self.confidences: list[list[float]] = [[] for _ in self.lengths]
        wants = config.return_dict_in_generate
        self.scores = {} if wants and config.output_scores else None
        self.logits = {} if wants and config.output_logits else None

    def room(self, row: int) -> int:
        """Tokens that row may still get."""
        return self.max_length - self.lengths[row]

    def process(self, logits: torch.Tensor, rows: list[int], prefixes: list[int]) -> torch.Tensor:
        """Logits [N, V] -> processed scores, fp32. Position i follows the first prefixes[i] columns of rows[i]."""
        logits = logits.float()
        if not self.processors:
            return logits
        if self.stateless:
            return self.processors(self.ids[:1, :1].expand(len(rows), 1), logits)
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
            scores[where] = self.processors(self.ids[:, :prefix], whole)[owners]
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
            self.append(row, [token], [layer], [confidence], check=False)
        if self.criteria:
            ended = self.criteria(self.ids[:, : self.lengths[rows[0]]], None).tolist()
            for row in rows:
                self.done[row] = self.done[row] or ended[row]

    def append(
        self, row: int, tokens: list[int], layers: list[int], confidences: list[float], check: bool = True
    ) -> int:
        """Add tokens until one ends the text; returns how many were added. Criteria see this row alone."""
        first = self.lengths[row]
        count = len(tokens)
        for index, token in enumerate(tokens):
            if token in self.eos or first + index + 1 >= self.max_length:
                self.done[row], count = True, index + 1
                break
        self.ids[row, first : first + count] = torch.tensor(tokens[:count], device=self.ids.device)
        for index in range(count) if check and self.criteria else ():
            if bool(self.criteria(self.ids[row : row + 1, : first + index + 1], None)[0]):
                self.done[row], count = True, index + 1
                break
        self.lengths[row] = first + count
        self.layers[row] += layers[:count]
        self.confidences[row] += confidences[:count]
        if self.draft_room:
            # What was on trial behind the text must not be taken for text.
            self.ids[row, first + count :] = self.pad
        if self.streamer is not None and row == 0:
            if hasattr(self.streamer, "put_exits"):
                self.streamer.put_exits(tokens[:count], layers[:count])
            self.streamer.put(self.ids[row, first : first + count].cpu())
        return count

    def finish(self) -> torch.Tensor:
        """End the stream; ids [B, longest]."""
        if self.streamer is not None:
            self.streamer.end()
        return self.ids[:, : max(self.lengths)].clone()

    def per_token(self, kept: list[list[Any]], dtype: torch.dtype) -> torch.Tensor:
        """`layers` or `confidences` as [B, new tokens], zeros behind the end of a row."""
        new = max(self.lengths) - self.prompt_length
        return torch.tensor([row + [0] * (new - len(row)) for row in kept], dtype=dtype).view(self.batch_size, new)

    def gathered(self, kept: dict[tuple[int, int], torch.Tensor] | None, end: float) -> tuple[torch.Tensor, ...] | None:
        """Per-step [B, V] tensors as transformers returns them; `end` fills rows that have ended."""
        if kept is None:
            return None
        some = next(iter(kept.values()))
        steps = range(self.prompt_length, max(self.lengths))
        filler = torch.full_like(some, end)
        return tuple(torch.stack([kept.get((b, c), filler) for b in range(self.batch_size)]) for c in steps)
