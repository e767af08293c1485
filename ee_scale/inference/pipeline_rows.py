"""The texts of a batch in pipeline decoding: settings, processors, sampling, and when a text ends."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
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
from ee_scale.modeling.transfers import send


@dataclass
class Row:
    """One text.

    Attributes:
        ids: int64 [1, S], the prompt and what came so far.
        processors: transformers' logits processors for this row.
        stop: transformers' criterion for stop strings, or None.
        generator: random numbers of this row alone: its text does not depend on the other rows.
        tokens, layers, scores: the new tokens (with the end mark), the layer each came from, and its score.
    """

    ids: torch.Tensor
    processors: LogitsProcessorList
    stop: StoppingCriteria | None
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def take(self, decision: Decision, settings: GenerationConfig) -> torch.Tensor | None:
        """Choose and keep the new token; returns it as [1, 1], or None when the text is finished."""
        if decision.logits is None:
            token = decision.token
            new = send([[token]], self.ids.device)
        else:
            scores = self.processors(self.ids, decision.logits.float())
            new = scores.argmax(-1, keepdim=True)
            if settings.do_sample:
                new = torch.multinomial(scores.softmax(-1), 1, generator=self.generator)
            token = int(new)
        self.ids = torch.cat([self.ids, new], dim=1)
        self.tokens.append(token)
        self.layers.append(decision.layer)
        self.scores.append(decision.score)
        ended = self.tokens[-1] in end_marks(settings) or len(self.tokens) >= settings.max_new_tokens
        return None if ended or (self.stop is not None and bool(self.stop(self.ids, None)[0])) else new


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
            generator = torch.Generator(self.device).manual_seed(row_seed(seed, first_row + number))
            rows.append(Row(ids, processors, stop, generator))
        return rows, settings
