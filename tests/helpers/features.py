"""What layers and heads of some families do beside Llama's, and for each the mistake that leaves it out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ee_scale.modeling.heads import rotary_by_type
from helpers.models import tiny_config

LENGTH = 24  # of the texts that models are compared on: three sliding windows


@dataclass(frozen=True)
class Feature:
    """By its words in `docs/extend.md`.

    has: whether a tiny model has it; may: whether a family's config could ask for it; spoil: leave it out of a model.
    """

    words: str
    has: Callable[[PreTrainedModel], bool]
    may: Callable[[PreTrainedModel], bool]
    spoil: Callable[[Any], None]


def _kinds(model: PreTrainedModel) -> set[str]:
    return set(getattr(model.config, "layer_types", None) or [])


def _has_windows(model: PreTrainedModel) -> bool:
    window, kinds = getattr(model.config, "sliding_window", None), _kinds(model)
    return bool(window) and window < LENGTH and (not kinds or "sliding_attention" in kinds)


def _see_all(model: Any) -> None:
    model.config.sliding_window = 10 * LENGTH


def _without_positions(model: Any) -> list[nn.Module]:
    """Attention that gives the same whatever the cosines and sines are."""
    x, ids = torch.randn(1, 3, model.config.hidden_size), torch.arange(3)[None]
    kind = {"layer_type": min(_kinds(model))} if rotary_by_type(model.model.rotary_emb) else {}
    tables = model.model.rotary_emb(x, position_ids=ids, **kind)
    calls = [tuple(part * factor for part in tables) for factor in (1.0, 0.5)]

    def out(attention: nn.Module, table: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return attention(hidden_states=x, position_embeddings=table, attention_mask=None, position_ids=ids)[0]

    attentions = [layer.self_attn for layer in model.model.layers]
    return [each for each in attentions if torch.equal(*(out(each, table) for table in calls))]


def _lacks_positions(model: PreTrainedModel) -> bool:
    return bool(_without_positions(model))


def _turn_all(model: Any) -> None:
    for attention in _without_positions(model):
        attention.use_rope, attention.is_sliding, attention.sliding_window = True, True, 1


def _has_tables(model: PreTrainedModel) -> bool:
    if not rotary_by_type(model.model.rotary_emb):
        return False
    return len({str(model.config.rope_parameters[kind]) for kind in _kinds(model)}) > 1


def _swap_tables(model: Any) -> None:
    rotary, kinds = model.model.rotary_emb, sorted(_kinds(model))
    turn, other = rotary.forward, dict(zip(kinds, reversed(kinds), strict=True))
    rotary.forward = lambda x, position_ids, layer_type: turn(x, position_ids, other[layer_type])


def _caps_attention(model: PreTrainedModel) -> bool:
    return getattr(model.config, "attn_logit_softcapping", None) is not None


def _lift_attention_caps(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None


def _caps_logits(model: PreTrainedModel) -> bool:
    return getattr(model.config, "final_logit_softcapping", None) is not None


def _lift_cap(model: Any) -> None:
    model.config.final_logit_softcapping = None


def _grows(model: PreTrainedModel) -> bool:
    return bool(model.config.rope_parameters.get("llama_4_scaling_beta"))


def _grow_nothing(model: Any) -> None:
    model.config.rope_parameters["llama_4_scaling_beta"] = 0.0


FEATURES = (
    Feature(
        "a sliding window, in all layers or in some",
        _has_windows,
        lambda model: hasattr(model.config, "sliding_window"),
        _see_all,
    ),
    Feature("layers that turn no positions", _lacks_positions, _lacks_positions, _turn_all),
    Feature(
        "a rotary table for each type of layer",
        _has_tables,
        lambda model: rotary_by_type(model.model.rotary_emb),
        _swap_tables,
    ),
    Feature(
        "capped attention",
        _caps_attention,
        # Gemma 3 has the setting, and no published model sets it.
        lambda model: hasattr(model.config, "attn_logit_softcapping") and model.config.model_type != "gemma3_text",
        _lift_attention_caps,
    ),
    Feature("capped logits", _caps_logits, lambda model: hasattr(model.config, "final_logit_softcapping"), _lift_cap),
    Feature("queries that grow with their position", _grows, _grows, _grow_nothing),
)


@torch.no_grad()
def tiny_model(name: str) -> PreTrainedModel:
    """With random weights."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(name)).eval()


@torch.no_grad()
def features_of(model: PreTrainedModel) -> list[Feature]:
    """Those that it has."""
    return [feature for feature in FEATURES if feature.has(model)]
