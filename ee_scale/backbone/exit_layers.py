"""Which exits a model has, as some file or setting says it: layers 1..L, each of them once."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from transformers import PreTrainedConfig

from ee_scale.backbone.stages import balanced_bounds
from ee_scale.errors import UserError, one_line
from ee_scale.modeling.heads import ExitSpec
from ee_scale.modeling.shortlist import Shortlist


def read_spec(values: object, here: str | Path, config: PreTrainedConfig | None = None) -> ExitSpec:
    """`early_exit` as some file says it. Raises `UserError` for what no exit is, or what `config`'s model has not."""
    try:
        spec = ExitSpec.from_dict(values)
        if config is not None:
            resolve_exit_layers(list(spec.layers), config.num_hidden_layers)
            Shortlist(spec.shortlist_ids, config.vocab_size)
    except (ValueError, TypeError) as error:
        raise UserError(f"{here}: early_exit: {one_line(error).removeprefix('early_exit: ')}") from error
    return spec


def exits_of(here: str | Path, config: PreTrainedConfig) -> ExitSpec | None:
    """The exits that a config names; None without any. Raises `UserError` as `read_spec`."""
    values = getattr(config, "early_exit", None)
    return read_spec(values, here, config) if values else None


def resolve_exit_layers(
    wanted: str | float | Sequence[float], num_layers: int, pp: int = 1, stages: Sequence[int] | None = None
) -> list[int]:
    """`exits.layers` as sorted layer numbers 1..num_layers.

    Integers are layers, fractions (0 < x <= 1.0, written with a point) are shares of the depth, 'stages' is every
    boundary between pipeline stages. Raises `UserError` for a layer out of range or named twice.
    """
    if wanted == "stages":
        bounds = list(accumulate(stages)) if stages else balanced_bounds([1.0] * num_layers, pp)[1:]
        if pp == 1:
            raise UserError("exits.layers=stages: parallel.pp=1 has no stage boundary; give layer numbers")
        return list(bounds[:-1])
    items = [wanted] if isinstance(wanted, int | float) else list(wanted) if not isinstance(wanted, str) else []
    if not items or any(isinstance(item, bool) or not isinstance(item, int | float) for item in items):
        raise UserError(f"exits.layers={wanted}: give layer numbers [3,6], fractions [0.25,0.5] or 'stages'")
    layers = [_layer(item, num_layers) for item in items]
    if layers != sorted(layers):
        raise UserError(f"exits.layers={items}: name the exits in order of depth (loss weights follow that order)")
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice:
        raise UserError(f"exits.layers={items}: layer {twice[0]} is named twice (of {num_layers} layers)")
    return layers


def _layer(item: int | float, num_layers: int) -> int:
    if isinstance(item, float) and 0 < item <= 1:
        return max(1, round(item * num_layers))
    if not float(item).is_integer() or not 1 <= item <= num_layers:
        raise UserError(f"exits.layers: {item} is not in 1..{num_layers} (the model's layers)")
    return int(item)
