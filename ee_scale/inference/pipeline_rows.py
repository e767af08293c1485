"""The texts of a batch in pipeline decoding: settings, processors, sampling, and when a text ends."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)

from ee_scale.backbone.digest import named_seed
from ee_scale.errors import UserError
from ee_scale.families.build import meta_model
from ee_scale.inference.pipeline_messages import Decision
from ee_scale.inference.settings import check_settings, end_marks, stop_criterion
from ee_scale.modeling.sequences import without_memory
from ee_scale.modeling.speculate import accept_sampled
from ee_scale.modeling.transfers import send


@dataclass(frozen=True)
class Draft:
    """A token that an exit proposes: its score there, and the distribution [1, V] it was drawn from (None: it is the
    most likely one)."""

    token: int
    score: float
    q: torch.Tensor | None = None


@dataclass
class Row:
    """One text.

    Attributes:
        ids: int64 [1, S], the prompt and what came so far.
        processors: transformers' logits processors for this row.
        stop: transformers' criterion for stop strings, or None.
        settings: those of the batch.
        seed, generator: random numbers of this row alone: its text does not depend on the other rows.
        tokens, layers, scores: the new tokens (with the end mark), the layer each came from, and its score.
        ended: whether the text is finished.
    """

    ids: torch.Tensor
    processors: LogitsProcessorList
    stop: StoppingCriteria | None
    settings: GenerationConfig
    seed: int
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    ended: bool = False

    def choose(self, decision: Decision) -> int:
        """The next token by what a layer said."""
        if decision.logits is None:
            return decision.token
        scores = self.processors(self.ids, decision.logits.float())
        if not self.settings.do_sample:
            return int(scores.argmax(-1))
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))

    def keep(self, token: int, layer: int, score: float) -> None:
        """Put a token behind the text."""
        self.ids = self._followed_by([token])
        self.tokens.append(token)
        self.layers.append(layer)
        self.scores.append(score)
        self.ended = self.ends(token) or len(self.tokens) >= self.settings.max_new_tokens
        if not self.ended and self.stop is not None:
            self.ended = bool(self.stop(self.ids, None)[0])

    def ends(self, token: int) -> bool:
        """Whether a token is an end mark."""
        return token in end_marks(self.settings)

    @cached_property
    def _draft_processors(self) -> LogitsProcessorList:
        return without_memory(self.processors)

    def draft(self, decision: Decision, before: Iterable[int]) -> Draft:
        """What an exit proposes behind the text and the drafts `before`."""
        if decision.logits is None:
            return Draft(decision.token, decision.score)
        ids, logits = self._followed_by(before), decision.logits.float()
        scores = self._draft_processors(ids, logits)
        if not self.settings.do_sample:
            return Draft(int(scores.argmax(-1)), decision.score)
        q = scores.softmax(-1)
        if bool(q.isnan().any()):  # processors forbid all that the exit scores: any token will do, and is judged
            q = torch.full_like(q, 1 / q.shape[-1])
        return Draft(int(torch.multinomial(q, 1, generator=self._dice("draft", ids.shape[1]))), decision.score, q)

    def judge(self, decision: Decision, draft: Draft) -> int:
        """The next token by what the final layer said where `draft` was proposed; a draft that was drawn has to be
        judged, whether it is in flight or not."""
        if draft.q is None:
            return self.choose(decision)
        p = self.processors(self.ids, decision.logits.float()).softmax(-1)
        tried = send([[draft.token]], p.device)
        dice = self._dice("verdict", self.ids.shape[1])
        accepted, other = accept_sampled(torch.stack([p, p], 1), tried, [draft.q], dice)
        return draft.token if int(accepted) else int(other)

    def _followed_by(self, tokens: Iterable[int]) -> torch.Tensor:
        return torch.cat([self.ids, send([list(tokens)], self.ids.device)], dim=1)

    def _dice(self, purpose: str, position: int) -> torch.Generator:
        """Random numbers for one purpose at one position: how often others were drawn before must not matter.

        A position that is drafted anew, behind another token, may see the same numbers: what was decided until then did
        not depend on them.
        """
        return self.generator.manual_seed(named_seed(f"{purpose} {position}", self.seed))


def row_seed(seed: int, row: int) -> int:
    """What the random numbers of a text begin with; no text of another seed has the same."""
    return named_seed(f"row {row}", seed)


class RowMaker:
    """Reads the settings of `generate` as transformers does, with its own code on a model without memory."""

    def __init__(self, model_config: PreTrainedConfig, generation_config: GenerationConfig, device: torch.device):
        self.owner = meta_model(model_config, torch.float32)
        self.owner.generation_config = generation_config
        self.device = device

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        seed: int,
        first_row: int,
        changes: dict[str, Any],
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> tuple[list[Row], GenerationConfig]:
        """The rows of a batch, and their settings. Raises `UserError` for what several devices cannot do."""
        settings, unknown = self.owner._prepare_generation_config(None, **{"max_new_tokens": 20, **changes})
        if unknown:
            raise UserError(f"pipeline decoding does not know {', '.join(unknown)}")
        if (settings.num_beams or 1) > 1:
            raise UserError(f"num_beams={settings.num_beams}: pipeline decoding has no beam search; use 1")
        check_settings(settings, own_loop=True, grid=True)
        stop = stop_criterion(settings, tokenizer)
        if any(len(prompt) == 0 for prompt in prompts):
            raise UserError("empty prompt: give at least one token")
        tensors = copy.deepcopy(settings)
        self.owner._prepare_special_tokens(tensors, True, device=self.device)
        rows = []
        for number, prompt in enumerate(prompts):
            ids = torch.tensor([list(prompt)], device=self.device)
            processors = self.owner._get_logits_processor(tensors, ids.shape[1], device=self.device)
            own = row_seed(seed, first_row + number)
            rows.append(Row(ids, processors, stop, settings, own, torch.Generator(self.device).manual_seed(own)))
        return rows, settings
