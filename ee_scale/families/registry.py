"""All families, and who has what. A model is asked for its family here."""

from collections.abc import Iterable

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ee_scale.errors import UserError
from ee_scale.families.decoders import DECODERS
from ee_scale.families.encoders import ENCODERS
from ee_scale.families.experts import ExpertNames
from ee_scale.families.family import Family
from ee_scale.modeling.wrapped import language_config

STAGES = ("embed_tokens", "layers", "norm")
# Models that read images too whose language model alone, on text, computes what they do.
WRAPPERS = ("aya_vision", "gemma3", "internvl", "llava", "mistral3")
FAMILIES = {family.name: family for family in (*DECODERS, *ENCODERS)}


def find_family(config: PreTrainedConfig) -> Family | None:
    """The family of a transformers config: as it is described here, or else one like Llama where transformers says how
    its decoder is cut. Whether that is true of it, `ee_scale.backbone.proof` finds out. None: no family.
    """
    family = FAMILIES.get(config.model_type)
    if family is None and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        stages = config.base_model_pp_plan or {}
        return Family(config.model_type) if stages.keys() >= {*STAGES} and config.base_model_tp_plan else None
    return family


def without_wrapper(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the language model in a wrapper that is known here; any other config is returned as it is."""
    return language_config(config) if config.model_type in WRAPPERS else config


def decoder_family(config: PreTrainedConfig) -> Family:
    """One that may take exits. Raises `UserError`."""
    family, latent = find_family(config), getattr(config, "kv_lora_rank", None)
    if family is None or not family.is_decoder or latent:
        reason = "transformers has no plan that cuts it into embedding, decoder layers and norm"
        stages = config.base_model_pp_plan or {}
        if stages and not stages.keys() >= {*STAGES}:
            reason = f"transformers' plan cuts it into {', '.join(stages)}, not into {', '.join(STAGES)}"
        if latent:
            reason = f"its attention keeps keys and values in one latent vector (kv_lora_rank={latent})"
        raise UserError(f"model.path: architecture '{config.model_type}' is not supported: {reason}")
    return family


def known_family(config: PreTrainedConfig) -> Family:
    """One that is not asked for here for the first time."""
    family = find_family(config)
    assert family is not None
    return family


def experts_of(config: PreTrainedConfig) -> ExpertNames | None:
    """Of a model by its config; None: it has none, or they are not described here."""
    family = find_family(config)
    return family.megatron.experts if family and family.megatron else None


def gguf_family(name: str) -> Family:
    """One whose GGUF files are read, by the name that they have for it. Raises `UserError` with the names of those."""
    if name not in FAMILIES or not FAMILIES[name].gguf:
        names = _names(family for family in DECODERS if family.gguf)  # other than those of folders
        raise UserError(f"model.path: architecture '{name}' is not supported; supported: {names}")
    return FAMILIES[name]


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
        lacking = family.beyond_megatron if family else ""
        reason = f"Megatron-Core's GPT model lacks {lacking}" if lacking else "no map to Megatron"
        names = _names(family for family in DECODERS if family.megatron)
        raise UserError(f"config.model_type={config.model_type}: {reason}; known: {names}")
    return family


def _names(families: Iterable[Family]) -> str:
    return ", ".join(family.name for family in families)
