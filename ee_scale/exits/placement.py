"""From the `exits` config to loss weights, costs and the spec that is stored with a model."""

from collections.abc import Sequence
from typing import Any

from ee_scale.backbone.families import ModelShape, family_of
from ee_scale.errors import UserError
from ee_scale.modeling.heads import ExitSpec


def resolve_loss_weights(weights: Any, exit_layers: Sequence[int]) -> dict[int, float]:
    """`exits.loss_weights` by exit layer. Raises `UserError` if the counts differ or a weight is negative."""
    values = [float(weights)] * len(exit_layers) if isinstance(weights, int | float) else [float(w) for w in weights]
    if len(values) != len(exit_layers):
        raise UserError(f"exits.loss_weights={values}: {len(values)} weights for {len(exit_layers)} exits")
    if min(values) < 0:
        raise UserError(f"exits.loss_weights={values}: weights cannot be negative")
    return dict(zip(exit_layers, values, strict=True))


def exit_spec(model_config: Any, layers: Sequence[int], kind: str, head: str, rank: int) -> ExitSpec:
    """The spec of these exits on this model. Raises `UserError` if nothing would be trained."""
    if kind == "embedding" and head == "tied":
        raise UserError("exits.kind=embedding with exits.head=tied has nothing to train; use head=low_rank or full")
    family = family_of(model_config)
    return ExitSpec(
        layers=tuple(layers),
        kind=kind,
        head=head,
        rank=rank,
        mlp_input_norm=family.mlp_input_norm,
        mlp_output_norm=family.mlp_output_norm,
        logit_softcap=getattr(model_config, family.logit_softcap) if family.logit_softcap else None,
    )


def exit_parameters(spec: ExitSpec, shape: ModelShape) -> int:
    """Trainable parameters of one exit (norms and biases left out)."""
    body = {"mlp": shape.mlp_parameters, "layer": shape.layer_parameters}.get(spec.kind, 0)
    vocabulary = shape.vocab_size * shape.hidden_size
    head = {"full": vocabulary, "low_rank": spec.rank * (shape.vocab_size + shape.hidden_size)}.get(spec.head, 0)
    return body + head


def exit_cost(spec: ExitSpec, shape: ModelShape) -> float:
    """Training cost of one exit, in multiply-adds per token of a forward pass through as many parameters.

    Trained matrices cost forward, input gradient and weight gradient; the frozen lm_head the first two.
    """
    frozen_head = 0 if spec.head == "full" else 2 * shape.vocab_size * shape.hidden_size
    return 3 * exit_parameters(spec, shape) + frozen_head
