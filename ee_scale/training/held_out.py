"""Loss on text that is not trained on: which checkpoint is the best one, and when a run has stopped getting better."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, cast

import torch
from torch import Tensor

from ee_scale.data.dataset import check_tokens
from ee_scale.data.inputs import load_tokenizer, sources
from ee_scale.data.loader import windows
from ee_scale.data.text import prepare_text
from ee_scale.exits.losses import LEAST_CHUNK
from ee_scale.exits.stage import TuningStage
from ee_scale.exits.vocab_parallel import cross_entropy, mask_padding
from ee_scale.grid import Grid
from ee_scale.log import log
from ee_scale.modeling.heads import ExitHead
from ee_scale.planning.tune import TunePlan
from ee_scale.training.recipe import BEST

FIELD = "train.held_out"


def held_out_prefixes(plan: TunePlan, *, progress: bool) -> list[str]:
    """`train.held_out` as Megatron prefixes, tokenised and checked. Raises `UserError`."""
    config, names = plan.config, sources(plan.config.train.held_out)
    tokenizer, data = load_tokenizer(plan.model_dir), config.data
    given = (names, tokenizer, plan.model_dir, data.cache_dir, data.text_key, progress)
    prefixes = prepare_text(*given, fields=FIELD, errors=data.errors)
    check_tokens(prefixes, plan.shape.vocab_size, 1, names=names, fields=FIELD, tokenizer=tokenizer)
    return prefixes


@dataclass
class HeldOut:
    """What a run knows of its held-out text.

    Attributes:
        patience: checkpoints in a row without a lower loss that end the run; 0: none do.
        loss, step: the lowest mean cross entropy of the exits so far (nats per token) and where it was.
        worse: checkpoints since then.
    """

    patience: int
    measure: Callable[[], float]
    loss: float = inf
    step: int = 0
    worse: int = 0

    def at(self, step: int) -> None:
        """Measure a step whose checkpoint is about to be written."""
        found = self.measure()
        better = found < self.loss
        if better:
            self.loss, self.step, self.worse = found, step, 0
        else:
            self.worse += 1
        words = "the lowest so far" if better else f"the lowest was {self.loss:.4f} at step {self.step}"
        log.info("step %d: loss on held-out text %.4f; %s", step, found, words)
        if self.ended:
            log.info("train.early_stop=%d: ends here, step %d is the one to export", self.patience, self.step)

    @property
    def ended(self) -> bool:
        """Whether it has not become better for long enough."""
        return 0 < self.patience <= self.worse

    def facts(self) -> dict[str, Any]:
        """For a checkpoint's state."""
        return {BEST: {"step": self.step, "loss": self.loss, "worse": self.worse}} if self.step else {}

    def recall(self, state: Mapping[str, Any]) -> None:
        """What the state of a checkpoint says."""
        best = state.get(BEST)
        if best is not None:
            self.loss, self.step, self.worse = best["loss"], best["step"], best["worse"]


def open_held_out(plan: TunePlan, prefixes: list[str], stage: TuningStage, grid: Grid) -> HeldOut:
    """Of a run whose exits lie on one stage. All ranks call it; rank 0's measurement is everyone's."""
    config, words = plan.config, plan.spec.scored(plan.shape.vocab_size)
    size, length, most = config.train.micro_batch_size, config.data.seq_length, config.train.held_out_tokens

    def measure() -> float:
        sums = torch.zeros(2, dtype=torch.float64)
        for ids, learned in windows(prefixes, length, size, most):
            sums += _loss(stage, words, ids.to(grid.device), learned.to(grid.device))
        return float(grid.from_rank_0((sums[0] / sums[1]).item()))

    return HeldOut(config.train.early_stop, measure)


@torch.no_grad()
def _loss(stage: TuningStage, words: int, ids: Tensor, learned: Tensor) -> Tensor:
    """Cross entropies of a batch [B, S+1], summed over exits and tokens, and how many they are: fp64 [2].

    words: how many a head scores. A shortlist head is measured on the positions that it trains on: those whose next
    token it scores.
    """
    _, taps = stage(ids[:, :-1])
    sums = torch.zeros(2, dtype=torch.float64)
    for k, tap in taps.items():
        head, labels = cast(ExitHead, stage.exit_heads[str(k)]), ids[:, 1:][learned]
        places = labels if head.shortlist is None else head.shortlist.places(labels)
        scored = places >= 0
        hidden = stage.exit_hidden(k, tap)[learned][scored]
        for piece, wanted in zip(hidden.split(LEAST_CHUNK), places[scored].split(LEAST_CHUNK), strict=True):
            losses = cross_entropy(mask_padding(head.scored_logits(piece, stage.backbone.lm_head), words), wanted)
            sums += torch.tensor([losses.double().sum(), len(losses)], dtype=torch.float64)
    return sums
