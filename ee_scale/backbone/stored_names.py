"""What transformers calls the tensors of a folder: its own renaming, applied to names without reading a weight."""

import re
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ee_scale.errors import UserError
from ee_scale.modeling.wrapped import language_name

# What converters do that make one parameter of the matrices of all experts: [E, P x out, in].
STACKED = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])


class ExpertPart(NamedTuple):
    """A stored tensor that is a part of one of the model's.

    expert: whose; place: which of the matrices that lie side by side in the parameter; patterns: names of all of those.
    """

    parameter: str
    expert: int
    place: int
    patterns: tuple[str, ...]


def parameter_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Stored name -> name of the parameter that transformers fills with it; a name that no parameter has, otherwise.

    Prefixes of base models come and go and old spellings become new ones as in `from_pretrained`. `model` may be on
    the meta device. Raises `UserError` where transformers would do more than rename, or has two tensors for one name.
    """
    found, parts = find_parameters(model, stored)
    for name, part in parts.items():
        raise UserError(f"'{name}': transformers computes '{part.parameter}' from it and others; only names may differ")
    return found


def find_parameters(model: PreTrainedModel, stored: Iterable[str]) -> tuple[dict[str, str], dict[str, ExpertPart]]:
    """The same, and by stored name those of single experts, which transformers stacks. Raises `UserError` for anything
    else that it computes."""
    transforms, known = get_model_conversion_mapping(model), model.state_dict()
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    found: dict[str, str] = {}
    parts: dict[str, ExpertPart] = {}
    for stored_name in stored:
        name = language_name(model.config, stored_name)
        renamed, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if renamed not in known and name in known:  # as `from_pretrained` has it
            renamed, converted = rename_source_key(name, [], [], model.base_model_prefix, known)
        if converted is None or renamed not in known:
            found[stored_name] = renamed
            continue
        converter = next(each for each in converters if converted in each.source_patterns)
        number = re.search(re.escape(converted).replace(r"\*", r"(\d+)"), rename_source_key(name, renamings, [])[0])
        if [type(operation).__name__ for operation in converter.operations] not in STACKED or number is None:
            raise UserError(f"'{name}': transformers computes '{renamed}' from it and others; only names may differ")
        patterns = tuple(converter.source_patterns)
        parts[stored_name] = ExpertPart(renamed, int(number[1]), patterns.index(converted), patterns)
    owners: dict[str, str] = {part.parameter: name for name, part in parts.items()}
    for name, renamed in found.items():
        if renamed in known and owners.setdefault(renamed, name) != name:
            raise UserError(f"'{owners[renamed]}' and '{name}' are both '{renamed}' of {type(model).__name__}")
    return found, parts


def stored_pair(model_class: type[PreTrainedModel], stored: Iterable[str]) -> tuple[str, str] | None:
    """Stored names of (output matrix, embedding) of a causal language model, if both are there."""
    ((head, embedding),) = model_class._tied_weights_keys.items()
    wanted = {head: True, embedding: True}  # rename_source_key asks this for what the model has
    found: dict[str, str] = {}
    for name in stored:
        found.setdefault(rename_source_key(name, [], [], model_class.base_model_prefix, wanted)[0], name)
    return (found[head], found[embedding]) if head in found and embedding in found else None


def left_out(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Of names that no parameter has, those that transformers would tell of: not buffers of older versions."""
    info = SimpleNamespace(missing_keys=set(), unexpected_keys=set(names))
    model._adjust_missing_and_unexpected_keys(info)
    return info.unexpected_keys


def owner_of(model: PreTrainedModel, name: str) -> str | None:
    """The module or parameter that a tensor without a parameter of its own lies in; None beside the model's parts.

    'model.layers.0.self_attn.q_proj.weight_scale' lies in 'model.layers.0.self_attn.q_proj', 'score.weight' in none.
    """
    parts: Mapping[str, Any] = dict(model.named_modules()) | dict(model.named_parameters())
    for candidate in (name, f"{model.base_model_prefix}.{name}"):
        while "." in candidate:
            candidate = candidate.rpartition(".")[0]
            if candidate in parts:
                loose = isinstance(parts[candidate], nn.ModuleList | nn.ModuleDict)
                if candidate != model.base_model_prefix and not loose:
                    return candidate
                break
    return None
