"""When a small model's answer is kept and when a larger one is asked: the rule of `ee-scale defer`, and its score."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from transformers import PreTrainedModel

from ee_scale.backbone.fingerprint import fingerprint, is_model
from ee_scale.backbone.model_folder import SIDECAR_WEIGHTS, ModelFolder
from ee_scale.config.defer import AGREEMENT, SEQUENCE_SCORES
from ee_scale.errors import UserError
from ee_scale.files import file_digest
from ee_scale.modeling.policies import SCORES
from ee_scale.reading import checked, read_json, whole, write_json

VERSION = 1
EXITS = "+exits:"  # in a fingerprint, before that of a sidecar's exits
Share = Annotated[float, Field(ge=0, le=1)]


def _of(policy: str, reduce: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], float]:
    return lambda logits: float(reduce(SCORES[policy].of(logits.float().softmax(-1))))


# Logits [n, V], of an answer's n tokens or of a text's one class -> its score, 0 to 1.
_SCORES = {
    "margin": _of("margin", torch.mean),
    "min_margin": _of("margin", torch.amin),
    "probability": _of("threshold", torch.mean),
    "min_probability": _of("threshold", torch.amin),
}


@whole
@dataclass(frozen=True)
class DeferralRule:
    """`deferral.json`: an answer whose score is at least the limit is kept; for others the large model is asked.

    Attributes:
        limit: None: the large model is always asked. tags: own limits of groups.
        map_scores, map_errors: [k]: where the small model's chance of an error is known; straight lines between.
        small: fingerprint of the model that the limits belong to, see `fingerprint_of`.
        quality, loss, confidence, evidence: what was shown, and on what.
    """

    version: int
    task: str
    score: str
    limit: Share | None
    tags: dict[str, Share | None]
    map_scores: list[Share]
    map_errors: list[Share]
    small: str
    quality: str
    loss: float
    confidence: float
    evidence: dict[str, float | int | str | None]

    def keeps(self, score: float, tag: str | None = None) -> bool:
        """Whether the small model's answer stands."""
        limit = self.limit_of(tag)
        return limit is not None and score >= limit

    def limit_of(self, tag: str | None) -> float | None:
        """The limit that holds for a tag; one without limits of its own has that of all."""
        return self.limit if tag is None else self.tags.get(tag, self.limit)

    def check_model(self, folder: ModelFolder, here: str) -> None:
        """Raise `UserError`, which begins with `here`, unless the rule was made for this model."""
        base, _, exits = self.small.partition(EXITS)
        if not is_model(folder.base, base) or exits != _exits_digest(folder, self.score):
            raise UserError(f"{here}: the rule of another small model than {folder.path}; run ee-scale defer with it")

    def write(self, path: Path) -> None:
        """As `read_rule` reads it."""
        write_json(path, asdict(self))


def read_rule(path: Path) -> DeferralRule:
    """A rule that `ee-scale defer` wrote. Raises `UserError` for anything else."""
    values = read_json(path)
    if values.get("version") != VERSION:
        raise UserError(f"{path}: version={values.get('version')!r}, this ee-scale reads {VERSION}; run defer again")
    rule: DeferralRule = checked(DeferralRule, values, path)
    if rule.score not in SEQUENCE_SCORES:
        raise UserError(f"{path}: score={rule.score!r}: not one of {', '.join(SEQUENCE_SCORES)}")
    if not rule.map_scores or len(rule.map_scores) != len(rule.map_errors):
        sizes = f"{len(rule.map_scores)} map_scores and {len(rule.map_errors)} map_errors"
        raise UserError(f"{path}: {sizes}: give as many of both, at least one")
    if sorted(set(rule.map_scores)) != rule.map_scores or sorted(rule.map_errors, reverse=True) != rule.map_errors:
        raise UserError(f"{path}: map_scores do not grow, or map_errors do")
    return rule


def fingerprint_of(folder: ModelFolder, score: str) -> str:
    """Of the small model of a rule: its base, and a sidecar's exits where the score comes from them."""
    digest = _exits_digest(folder, score)
    return fingerprint(folder.base) + (EXITS + digest if digest else "")


def _exits_digest(folder: ModelFolder, score: str) -> str:
    return file_digest(folder.path / SIDECAR_WEIGHTS) if score == AGREEMENT and folder.sidecar is not None else ""


def score_of(name: str, logits: torch.Tensor, exits: Sequence[torch.Tensor] = ()) -> float:
    """Logits [n, V] -> the score `name`; `exits`: what each exit says there [n, V].

    `agreement`: how often, over exits and tokens, an exit's most likely token is the final layer's.
    """
    if name != AGREEMENT:
        return _SCORES[name](logits)
    said = torch.stack([own.float().argmax(-1) for own in exits])
    return float((said == logits.float().argmax(-1)).double().mean())


def type_name(model: PreTrainedModel) -> str:
    """The number type that scores are computed in, as a rule says it."""
    return str(model.dtype).removeprefix("torch.")


def plain(text: str) -> str:
    """What counts where answers are compared: case and white space do not."""
    return " ".join(text.casefold().split())


@torch.inference_mode()
def answer_score(model: PreTrainedModel, name: str, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """The score of an answer's tokens behind a prompt's, by one pass of the model over both.

    An answer without tokens is worth nothing: 0.
    """
    if not answer:
        return 0.0
    ids = torch.tensor([[*prompt, *answer][:-1]], device=model.device)
    options = {"output_exit_logits": name == AGREEMENT} if hasattr(model, "exit_spec") else {}
    output = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer), **options)
    exits = [own[0] for own in output.exit_logits.values()] if name == AGREEMENT else []
    return score_of(name, output.logits[0], exits)
