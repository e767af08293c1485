"""A batch that stays full: prompts wait in a queue, and where a row ends the next prompt takes its place.

queue = RowQueue(model, {"exit_policy": "lossless"}, size=8, longest=4096)
with queue:
    queue.add(QueuedRow(ids, {"max_new_tokens": 100}))
    while queue.busy:
        for row in queue.step():
            row.tokens, row.layers

No threads: rows join and leave between steps. What a row says is what it says alone. Whoever wants packed weights packs
them around it (`packing`).
"""

import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .decode import check_request, choose_policy, make_loop, take_options, take_stop_strings, totals
from .heads import ModelWithExits
from .loop import DecodeLoop
from .policies import NEVER, ExitPolicy, Threshold
from .row_texts import Ranking, RowTexts
from .sequences import Sequences
from .trail import Trail

CHUNK = 256  # positions


@dataclass(eq=False)
class QueuedRow:
    """One prompt, and what becomes of it.

    Attributes:
        prompt: token ids.
        settings: those of transformers' `generate`, over the queue's: max_new_tokens, do_sample, stop_strings and
            tokenizer, ...
        tag, request: names for calibrated limits and for the decision log.
        threshold: limits of this row alone, as `exit_threshold`; None: those of the queue, or of the tag.
        seed: of its own random numbers; None: torch's. (In `lossless` mode always torch's.)
        streamer: transformers', for this row.
        best: rank each new token, with so many of the most likely ones; None: no `rankings`.
        tokens, layers, confidences: what is new, with the end mark; the layer of each; see `EarlyExitGenerateOutput`.
        rankings: see `Ranking`, with `best`; they grow from step to step.
        ended: whether the text is done, and not just taken out.
    """

    prompt: list[int]
    settings: dict[str, Any] = field(default_factory=dict)
    tag: str | None = None
    request: str | int | None = None
    threshold: Threshold | None = None
    seed: int | None = None
    streamer: BaseStreamer | None = None
    best: int | None = None
    tokens: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    rankings: list[Ranking] = field(default_factory=list)
    ended: bool = False


class Preparation:
    """What transformers makes of a row's settings: `generate` hands it to the loop that it is told to run."""

    def __call__(
        self,
        model: ModelWithExits,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: object,
    ) -> torch.Tensor:
        check_request(generation_config, {})
        self.ids, self.processors, self.criteria = input_ids, logits_processor, stopping_criteria
        self.config = generation_config
        return input_ids


class RowQueue:
    """Decodes rows of any number, `size` of them at a time."""

    def __init__(
        self,
        model: ModelWithExits,
        options: dict[str, Any],
        size: int,
        longest: int,
        settings: dict[str, Any] | None = None,
        tags: list[str] | None = None,
    ):
        """options: the `exit_*` arguments of `generate`; longest: tokens of a text, its prompt included; settings: of
        all rows; tags: those that rows may have, if the exits' limits go by them. Raises ValueError in one line.
        """
        self.model, self.size, self.longest, self.settings = model, size, longest, settings or {}
        self.options = take_options(options := dict(options), model.generation_config)
        if options:
            raise ValueError(f"{next(iter(options))}: no option of exits")
        self.lossless = self.options.get("exit_policy") == "lossless"
        policy = self._policy(tags, self.options.get("exit_threshold"))
        if policy.name in NEVER:
            policy = replace(policy, limits=((NEVER[policy.name],) * len(policy.layers),) * size)
        self.policy = policy
        room = policy.max_draft + 1 if self.lossless else 0
        self.texts = RowTexts(size, longest + room, model.device)
        self.trail = Trail(self.options, policy, self.texts.ids[:, :0], model)
        self.capacity = min(longest, 512) + max(room, policy.max_pending + 1)
        self.samples: bool | None = None  # what rows do; None as long as there were none
        self.waiting: deque[QueuedRow] = deque()
        self.places: dict[int, QueuedRow] = {}
        self.chunk = getattr(model.generation_config, "prefill_chunk_size", None) or CHUNK
        self.started = time.perf_counter()

    def __enter__(self) -> "RowQueue":
        pads = [0] * self.size
        self.loop: DecodeLoop = make_loop(
            self.model, self.options, self.policy, self.texts, self.trail, pads, self.capacity
        )
        self.loop.runner.clear()
        self.loop.runner.freeze()
        return self

    def __exit__(self, *error: object) -> None:
        self.loop.runner.close()

    @property
    def busy(self) -> bool:
        """Whether some row has not ended."""
        return bool(self.waiting or self.places)

    def add(self, row: QueuedRow) -> None:
        """Put a row at the end of the queue. Raises ValueError, in one line, for what it cannot have."""
        if not row.prompt:
            raise ValueError("the prompt is empty: there is no token to start from")
        made = self._prepare(row, None)
        config = made.config
        if config.max_length > self.longest:
            raise ValueError(f"a text of {config.max_length} tokens, but the queue's have at most {self.longest}")
        if self.lossless and config.do_sample != self.samples and self.samples is not None:
            raise ValueError("exit_policy=lossless: rows of one queue are all sampled, or none is")
        if self.lossless and Sequences(made.ids, made.processors, made.criteria, config).in_step:
            raise ValueError("exit_policy=lossless: what remembers earlier calls needs rows in step: use generate")
        self._limits(row)
        self.samples = config.do_sample
        self.waiting.append(row)

    def cancel(self, row: QueuedRow) -> None:
        """Take a row out, wherever it is; it keeps what it has. Rows that are done or unknown are left alone."""
        if row in self.waiting:
            self.waiting.remove(row)
        for place, other in list(self.places.items()):
            if other is row:
                self.loop.leave(place)
                self._settle(place)

    def step(self) -> list[QueuedRow]:
        """Free places are taken; then a chunk of prompts that join, and a step of the rows that decode.

        Returns the rows that are done.
        """
        news = []
        while self.waiting and len(self.places) < self.size:
            row = self.waiting.popleft()
            place = next(place for place in range(self.size) if place not in self.places)
            self._begin(place, row)
            news.append(place)
        if news:
            self.loop.join(news)
        ended = self.loop.turn(self.chunk)
        for place in ended:
            self.places[place].ended = True
        return [self._settle(place) for place in ended]

    def stats(self) -> dict[str, Any]:
        """As `exit_stats`, of all rows so far."""
        return totals(self.loop, self.started)

    def _begin(self, place: int, row: QueuedRow) -> None:
        made, limits = self._prepare(row, row.streamer), self._limits(row)
        ids, columns = made.ids, self.texts.ids[place : place + 1]
        part = Sequences(ids, made.processors, made.criteria, made.config, row.streamer, ids=columns)
        generator = None if row.seed is None else torch.Generator(ids.device).manual_seed(row.seed)
        self.texts.begin(place, part, generator, row.best, row.rankings)
        self.trail.begin(place, ids, row.request, row.tag)
        if limits is not None:
            self.loop.limit(place, limits)
        self.places[place] = row

    def _prepare(self, row: QueuedRow, streamer: BaseStreamer | None) -> Preparation:
        """Time limits count from here; a streamer gets the prompt."""
        settings = {**self.settings, **row.settings, "return_dict_in_generate": False, "streamer": streamer}
        take_stop_strings(settings, self.model.generation_config)
        ids, made = torch.tensor([row.prompt], device=self.model.device), Preparation()
        mask = torch.ones_like(ids)
        GenerationMixin.generate(self.model, ids, attention_mask=mask, custom_generate=made, **settings)
        return made

    def _policy(self, tags: list[str] | None, threshold: Threshold | None) -> ExitPolicy:
        options = {**self.options, "exit_tags": tags, "exit_threshold": threshold}
        rows = len(tags) if tags else 1
        return choose_policy(options, self.model, self.model.generation_config, rows)

    def _limits(self, row: QueuedRow) -> list[float] | None:
        """A row's limit for each exit of the queue's policy. Raises ValueError where it would leave at another one."""
        never = NEVER.get(self.policy.name)
        if never is None:
            return None
        threshold = self.options.get("exit_threshold") if row.threshold is None else row.threshold
        own = self._policy(None if row.tag is None else [row.tag], threshold)
        by_layer = dict(zip(own.layers, own.limits[0], strict=True))
        if other := sorted(set(by_layer) - set(self.policy.layers)):
            raise ValueError(f"exit_threshold: no row of this queue leaves at layer {other[0]}")
        return [by_layer.get(k, never) for k in self.policy.layers]

    def _settle(self, place: int) -> QueuedRow:
        """What a row has said, and its decisions to the log; its place is free."""
        row = self.places.pop(place)
        self.trail.end(place, self.texts)
        row.layers, row.confidences = self.texts.layers[place], self.texts.confidences[place]
        row.tokens = self.texts.end(place)
        if row.streamer is not None:
            row.streamer.end()
        return row
