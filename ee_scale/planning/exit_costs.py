"""What training one exit costs: FLOPs, and the bytes of its passes."""

import torch
from torch import nn
from transformers import PreTrainedModel

from ee_scale.families.sizes import ModelShape
from ee_scale.modeling.heads import ExitSpec
from ee_scale.modeling.kinds import Tap
from ee_scale.planning.passes import Passes, final_norm, layer_call, watch


def exit_flops(
    spec: ExitSpec,
    shape: ModelShape,
    seq_length: int = 0,
    *,
    through: bool = False,
    trains_matrix: bool = False,
    teacher: bool = False,
    confidence: bool = False,
    pre_norm: bool = True,
) -> float:
    """Training one exit on one token.

    through: its gradient goes on into the backbone; trains_matrix: the lm_head that a tied or low-rank head reads
    trains too; teacher: the final layer's logits are computed for a KL term; confidence: one more pass of the head,
    for the weights of the tokens; pre_norm: a layer reads a normed state.
    """
    width, vocabulary = shape.hidden_size, 2 * spec.scored(shape.vocab_size) * shape.hidden_size
    kind = spec.exit_kind
    reaches = kind.trains or through  # a gradient is wanted in front of the head
    passes = 2 if spec.owns_matrix or trains_matrix else 1  # forward; and gradients of the matrix
    if reaches:
        passes += 1
    once, head = vocabulary, passes * vocabulary
    if spec.head == "low_rank":
        down, up = 2 * spec.rank * width, 2 * spec.rank * shape.vocab_size
        once += down + up
        head += (3 if reaches else 2) * down + 3 * up
    flops = kind.training_flops(shape, seq_length, through=through, pre_norm=pre_norm) + head
    if teacher:
        flops += vocabulary
    if confidence:
        flops += once
    return flops


def exit_passes(local: PreTrainedModel, spec: ExitSpec, rows: int, length: int, *, through: bool) -> Passes:
    """The modules of one exit in front of its head."""
    layer, call = layer_call(local, rows, length)
    kind, norm = spec.exit_kind, final_norm(local)
    body = kind.body_in(layer)
    parts = nn.ModuleList(part for part in (body, norm if kind.normed else None) if part is not None)

    def run(x: torch.Tensor) -> torch.Tensor:
        x = kind.states(body, Tap(x, x), None, lambda _, hidden: call(hidden))
        return norm(x) if kind.normed else x

    x = torch.empty(rows, length, local.config.hidden_size, dtype=local.dtype, device="meta")
    return watch(run, parts, x, needs=through)
