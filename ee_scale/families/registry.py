"""All families, and who has what. A model is asked for its family here."""

from collections.abc import Iterable

from transformers import PreTrainedConfig

from ee_scale.errors import UserError
from ee_scale.families.decoders import DECODERS
from ee_scale.families.encoders import ENCODERS
from ee_scale.families.family import Family

FAMILIES = {family.name: family for family in (*DECODERS, *ENCODERS)}


def find_family(config: PreTrainedConfig) -> Family | None:
    """The family of a transformers config; None: none that is known."""
    return FAMILIES.get(config.model_type)


def decoder_family(config: PreTrainedConfig) -> Family:
    """One that takes exits. Raises `UserError` with the names of those."""
    family = find_family(config)
    if family is None or not family.is_decoder:
        names = _names(DECODERS)
        raise UserError(f"model.path: architecture '{config.model_type}' is not supported; supported: {names}")
    return family


def elastic_family(config: PreTrainedConfig, task: str | None = None) -> Family:
    """One that supernets are made of. Raises `UserError` with the names of those, or for another task than its own."""
    family = find_family(config)
    if family is None or family.elastic is None:
        names = _names(family for family in FAMILIES.values() if family.elastic)
        raise UserError(f"model.path: architecture '{config.model_type}' is not elastic; known: {names}")
    if task not in (None, family.task):
        raise UserError(f"task={task}: '{config.model_type}' is trained with task={family.task}")
    if getattr(config, "is_decoder", False) and not family.is_decoder:
        raise UserError("model.path: config.is_decoder=true; an encoder is wanted")
    return family


def megatron_family(config: PreTrainedConfig) -> Family:
    """One that Megatron's GPT model computes. Raises `UserError` with the names of those."""
    family = find_family(config)
    if family is None or family.megatron is None:
        names = _names(family for family in FAMILIES.values() if family.megatron)
        raise UserError(f"config.model_type={config.model_type}: no map to Megatron; known: {names}")
    return family


def _names(families: Iterable[Family]) -> str:
    return ", ".join(family.name for family in families)
