"""From the `exits` config to loss weights, costs and the spec that is stored with a model."""

from collections.abc import Sequence
from math import prod

from transformers import PreTrainedConfig

from ee_scale.errors import UserError
from ee_scale.families.registry import decoder_family
from ee_scale.families.sizes import ModelShape, shape_of
from ee_scale.modeling.heads import SHORTLIST, ExitSpec
from ee_scale.modeling.kinds import KINDS, ExitKind


def resolve_loss_weights(weights: float | Sequence[float], exit_layers: Sequence[int]) -> dict[int, float]:
    """`exits.loss_weights` by exit layer. Raises `UserError` if the counts differ or a weight is negative."""
    values = [float(weights)] * len(exit_layers) if isinstance(weights, int | float) else [float(w) for w in weights]
    if len(values) != len(exit_layers):
        raise UserError(f"exits.loss_weights={values}: {len(values)} weights for {len(exit_layers)} exits")
    if min(values) < 0:
        raise UserError(f"exits.loss_weights={values}: weights cannot be negative")
    return dict(zip(exit_layers, values, strict=True))


def has_router(kind: ExitKind) -> bool:
    """Whether exits of a kind would train one in a model with experts."""
    return kind.body is not None and not kind.body.inside


def check_experts(model_config: PreTrainedConfig, kind: str, mode: str) -> None:
    """Refuse (`UserError`) to train a router: `kind` of exits, `mode` of the backbone."""
    experts = shape_of(model_config).experts
    wrong = f"backbone.mode={mode}" if mode != "frozen" else f"exits.kind={kind}" if has_router(KINDS[kind]) else ""
    if experts and wrong:
        raise UserError(
            f"{wrong}: '{model_config.model_type}' chooses among {experts.count} experts, and the losses that keep its "
            "routers balanced are not here; use backbone=frozen with exits.kind=mlp (dense), norm or embedding"
        )


def exit_spec(
    model_config: PreTrainedConfig, layers: Sequence[int], kind: str, head: str, rank: int, shortlist: float = 0
) -> ExitSpec:
    """The spec of these exits on this model, `shortlist_ids` left open; `shortlist` below 1: a share of the words.

    Raises `UserError` if nothing would be trained, or a shortlist is longer than the vocabulary.
    """
    shortlist = max(2, round(shortlist * model_config.vocab_size)) if 0 < shortlist < 1 else int(shortlist)
    if head == SHORTLIST and shortlist > model_config.vocab_size:
        raise UserError(f"exits.shortlist={shortlist} is above the model's vocab_size={model_config.vocab_size}")
    if not KINDS[kind].trains and head == "tied":
        raise UserError(f"exits.kind={kind} with exits.head=tied has nothing to train; use head=low_rank or full")
    family = decoder_family(model_config)
    if family.parallel and KINDS[kind].tapped:
        raise UserError(
            f"exits.kind={kind}: '{model_config.model_type}' runs attention and MLP of a layer side by side, so no MLP "
            "reads what its attention gives; use exits.kind=norm or layer"
        )
    return ExitSpec(
        layers=tuple(layers),
        kind=kind,
        head=head,
        rank=rank,
        shortlist=shortlist if head == SHORTLIST else 0,
        **family.exit_settings(model_config),
    )


def exit_parameters(spec: ExitSpec, shape: ModelShape) -> int:
    """Trainable parameters of one exit (norms and biases left out)."""
    head = spec.head_shapes(shape.hidden_size, spec.scored(shape.vocab_size)).values()
    return spec.exit_kind.parameters(shape) + sum(map(prod, head))


def exit_cost(spec: ExitSpec, shape: ModelShape) -> float:
    """Training cost of one exit, in multiply-adds per token of a forward pass through as many parameters.

    Trained matrices cost forward, input gradient and weight gradient; the frozen lm_head the first two.
    """
    frozen_head = 2 * shape.vocab_size * shape.hidden_size * spec.reads_lm_head
    return 3 * exit_parameters(spec, shape) + frozen_head
