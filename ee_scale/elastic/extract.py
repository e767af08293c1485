"""A subnet as a stock model: merged, cut, renumbered."""

import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

import torch

from ee_scale.backbone.loading import TensorFolder
from ee_scale.backbone.narrowing import narrowed
from ee_scale.elastic.architecture import ElasticMap, TensorAxes
from ee_scale.elastic.order import UnitOrder
from ee_scale.elastic.stage import before_training, read_tensor
from ee_scale.elastic.subnet import SubnetSpec
from ee_scale.errors import UserError
from ee_scale.families.sizes import with_layers

LM_HEAD, EMBEDDING = "lm_head", "model.embed_tokens"

Trained = Mapping[str, torch.Tensor]  # '<phase>.<module>.<leaf>' -> whole, sorted


def subnet_config(elastic_map: ElasticMap, spec: SubnetSpec, *, tied: bool) -> Any:
    """The stock transformers config of a subnet. Raises `UserError` where no config describes it."""
    config, shape = with_layers(elastic_map.config, spec.layers), elastic_map.shape
    if shape.first_layer_stays and 0 not in spec.layers:
        raise UserError(f"{spec.name}: without layer 0 no '{config.model_type}' computes what the subnet does")
    config.hidden_size, config.intermediate_size = spec.hidden, spec.ffn
    config.num_attention_heads = spec.groups * shape.queries_per_group
    if not shape.head_dim_is_derived:
        config.num_key_value_heads, config.head_dim = spec.groups, shape.head_dim
    if hasattr(config, "max_window_layers"):
        config.max_window_layers = sum(i < config.max_window_layers for i in spec.layers)
    if elastic_map.family.task == "causal_lm":
        config.tie_word_embeddings = tied
    return config


def is_tied(elastic_map: ElasticMap, trained: Trained) -> bool:
    """Whether a subnet's output matrix is its embedding: in the base model, and neither of the two was trained."""
    if elastic_map.family.task != "causal_lm" or not elastic_map.config.tie_word_embeddings:
        return False
    return not any(name.split(".", 1)[1].rsplit(".", 1)[0] in (LM_HEAD, EMBEDDING) for name in trained)


def subnet_tensors(
    elastic_map: ElasticMap, base: TensorFolder, order: UnitOrder, trained: Trained, spec: SubnetSpec
) -> Iterator[tuple[str, torch.Tensor]]:
    """(stock name, tensor) one at a time: base tensors with all updates added in fp32, cut, in the base's type."""
    without = f"{LM_HEAD}.weight" if is_tied(elastic_map, trained) else None
    updates = _by_tensor(trained)
    kept = [
        name
        for name, tensor in elastic_map.matrices.items()
        if name != without and (tensor.layer is None or tensor.layer in spec.layers)
    ]
    for whole, names in groupby(kept, elastic_map.family.whole_of):
        parts = [_subnet_tensor(elastic_map, base, order, updates.get(name, []), spec, name) for name in names]
        yield _renumbered(whole, spec), parts[0] if len(parts) == 1 else torch.cat(parts)


def _subnet_tensor(
    elastic_map: ElasticMap,
    base: TensorFolder,
    order: UnitOrder,
    updates: list[dict[str, torch.Tensor]],
    spec: SubnetSpec,
    name: str,
) -> torch.Tensor:
    tensor = elastic_map.matrices[name]
    whole = read_tensor(base, name, elastic_map.family)
    value = before_training(name, tensor.shape) if whole is None else whole.float()
    for dim, axis in enumerate(tensor.axes):
        rows = order.rows(axis, tensor.layer, elastic_map.shape)
        if rows is not None:
            value = value.index_select(dim, rows)
    value = _cut(value, tensor.axes, elastic_map, spec)
    for update in updates:
        value = value + _update(update, tensor, elastic_map, spec)
    dtype = elastic_map.config.dtype or torch.float32 if whole is None else whole.dtype
    return narrowed(value, dtype, name).contiguous()


def _by_tensor(trained: Trained) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Tensor name -> its updates, one dict of leaves for each phase, in order."""
    found: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name, tensor in trained.items():
        phase, rest = name.split(".", 1)
        module, leaf = rest.rsplit(".", 1)
        target = f"{module}.{'bias' if leaf == 'bias' else 'weight'}"
        found.setdefault(target, {}).setdefault(int(phase), {})[leaf] = tensor
    return {name: [phases[i] for i in sorted(phases)] for name, phases in found.items()}


def _update(
    leaves: dict[str, torch.Tensor], tensor: TensorAxes, elastic_map: ElasticMap, spec: SubnetSpec
) -> torch.Tensor:
    if "A" in leaves:
        up = _cut(leaves["A"].float(), (tensor.axes[0], "rank"), elastic_map, spec)
        return up @ _cut(leaves["B"].float(), ("rank", tensor.axes[1]), elastic_map, spec)
    (whole,) = leaves.values()
    return _cut(whole.float(), tensor.axes, elastic_map, spec)


def _cut(value: torch.Tensor, axes: tuple[str, ...], elastic_map: ElasticMap, spec: SubnetSpec) -> torch.Tensor:
    sizes = elastic_map.shape.sizes(spec)
    return value[tuple(slice(sizes.get(axis)) for axis in axes)]


def _renumbered(name: str, spec: SubnetSpec) -> str:
    return re.sub(r"\.(\d+)\.", lambda match: f".{spec.layers.index(int(match[1]))}.", name, count=1)
