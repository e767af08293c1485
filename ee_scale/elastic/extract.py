"""A subnet as a stock model: merged, cut, renumbered."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ee_scale.backbone.loading import TensorFolder
from ee_scale.backbone.narrowing import narrowed
from ee_scale.elastic.architecture import ElasticMap, TensorAxes
from ee_scale.elastic.order import UnitOrder
from ee_scale.elastic.stage import read_tensor
from ee_scale.elastic.subnet import SubnetSpec
from ee_scale.families.sizes import with_layers

LM_HEAD, EMBEDDING = "lm_head", "model.embed_tokens"

Trained = Mapping[str, torch.Tensor]  # '<phase>.<module>.<leaf>' -> whole, sorted


def subnet_config(elastic_map: ElasticMap, spec: SubnetSpec, *, tied: bool) -> Any:
    """The stock transformers config of a subnet."""
    config, shape = with_layers(elastic_map.config, spec.layers), elastic_map.shape
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
    described = dict(elastic_map.matrices)
    if is_tied(elastic_map, trained):
        del described[f"{LM_HEAD}.weight"]
    updates = _by_tensor(trained)
    for name, tensor in described.items():
        if tensor.layer is not None and tensor.layer not in spec.layers:
            continue
        whole = read_tensor(base, name, elastic_map.family)
        value = torch.zeros(tensor.shape) if whole is None else whole.float()
        for dim, axis in enumerate(tensor.axes):
            rows = order.rows(axis, tensor.layer, elastic_map.shape)
            if rows is not None:
                value = value.index_select(dim, rows)
        value = _cut(value, tensor.axes, elastic_map, spec)
        for update in updates.get(name, []):
            value = value + _update(update, tensor, elastic_map, spec)
        dtype = elastic_map.config.dtype or torch.float32 if whole is None else whole.dtype
        yield _renumbered(name, tensor, spec), narrowed(value, dtype, name).contiguous()


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


def _renumbered(name: str, tensor: TensorAxes, spec: SubnetSpec) -> str:
    if tensor.layer is None:
        return name
    return name.replace(f".{tensor.layer}.", f".{spec.layers.index(tensor.layer)}.", 1)
