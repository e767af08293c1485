"""Does the result compute what the source computes: both run on random tokens, compared layer by layer."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ee_scale.conversion.check.hugging_face_run import HuggingFaceRun, Step
from ee_scale.conversion.check.megatron_run import MegatronRun
from ee_scale.conversion.copying import Source
from ee_scale.conversion.model import Opened
from ee_scale.errors import UserError

TOKENS = 48
# Largest difference, relative to the largest value: fp32 sums in another order; a rounding of every weight.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Agreement:
    """How many points were compared, and the largest relative differences there (exits count as logits)."""

    steps: int
    hidden: float
    logits: float
    same_tokens: float


def verify(source: Opened, result: Opened) -> Agreement:
    """Compare; a result in a coarser number type than its source may differ by the rounding.

    Raises `UserError` naming the first layer that departs.
    """
    words = source.model.map.shape.vocab_size
    ids = torch.randint(words, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    rounded = _finest(result) > _finest(source) or bool(source.updates)  # what was merged is rounded last
    merged = source.model.exits is not None and source.model.exits.head != result.model.exits.head
    worst, logits, same, count = 0.0, 0.0, [], 0
    for (label, expected), (other, found) in zip(_steps(source, ids), _steps(result, ids), strict=True):
        if label != other:
            raise UserError(f"verify: the source has {label} where the result has {other}")
        coarse = rounded or (merged and label.startswith("exit"))  # a merged head is rounded as a whole
        limit = TOLERANCE[result.model.dtype if coarse else torch.float32]
        difference = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
        if not difference <= limit:
            raise UserError(
                f"verify: {label} departs first: largest difference {difference:.2g} of the largest value, "
                f"limit {limit:g}; all before it agree within {max(worst, logits):.2g}"
            )
        count += 1
        if label == "logits" or label.startswith("exit"):
            logits = max(logits, difference)
            same.append((found.argmax(-1) == expected.argmax(-1)).float().mean().item())
        else:
            worst = max(worst, difference)
    return Agreement(count, worst, logits, min(same))


def _finest(opened: Opened) -> float:
    """Rounding of the finest number type among the tensors; a model may have several."""
    return min(torch.finfo(stored.extent.dtype).eps for stored in opened.stored)


def _steps(opened: Opened, ids: torch.Tensor) -> Iterator[Step]:
    if opened.format.startswith("megatron") and opened.args is not None and not opened.updates:
        return MegatronRun(opened).steps(ids)
    return HuggingFaceRun(opened.model, Source(opened.stored, updates=opened.updates)).steps(ids)
