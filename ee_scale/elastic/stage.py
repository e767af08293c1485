"""One pipeline stage of the supernet: the transformers model's own forward over elastic layers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

from ee_scale.backbone.digest import bit_digest
from ee_scale.backbone.loading import TensorFolder
from ee_scale.backbone.masks import HandedMasks
from ee_scale.backbone.model_tensors import ModelTensors
from ee_scale.backbone.narrowing import fill
from ee_scale.backbone.parallel import padded_vocab
from ee_scale.backbone.stages import StagePlan
from ee_scale.elastic.architecture import ElasticMap, TensorAxes, local_length
from ee_scale.elastic.modules import Active, ElasticEmbedding, ElasticLinear, ElasticModule, ElasticNorm, FusedLinear
from ee_scale.elastic.order import UnitOrder, deal
from ee_scale.elastic.subnet import SubnetSpec
from ee_scale.families.build import meta_model
from ee_scale.families.family import SHARDED, VOCAB, Family
from ee_scale.families.sizes import layer_settings
from ee_scale.grid import Grid


class Given(nn.Module):
    """Stands for the embeddings on later stages, where the hidden state comes from the stage before."""

    def forward(self, inputs_embeds: torch.Tensor, **_: object) -> torch.Tensor:
        """[B, S, D'] as it came."""
        return inputs_embeds


class _Read(nn.Module):
    """Stands for a base model that has read texts of one token, whose states are given."""

    def forward(self, *_: object, inputs_embeds: torch.Tensor, **__: object) -> BaseModelOutputWithPooling:
        """[B, D']."""
        return BaseModelOutputWithPooling(last_hidden_state=inputs_embeds[:, None], pooler_output=inputs_embeds)


class TextHead(nn.Module):
    """What a classifier's vector of each text [B, D'] says, in the model's own code: logits [B, C]."""

    def __init__(self, model: PreTrainedModel):
        """`model` is used up."""
        super().__init__()
        setattr(model, model.base_model_prefix, _Read())
        self.model = model

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.model(inputs_embeds=pooled).logits


class ElasticStage(nn.Module):
    """The layers of one pipeline stage, sorted by importance, cut over the tensor group, sized by `select`.

    Attributes:
        elastic: elastic modules by full name in the transformers model ('model.layers.3.mlp.up_proj').
        head: last stage: what gives the logits of its output.
        new: names of modules that the base folder does not have (a classifier).
    """

    def __init__(
        self,
        elastic_map: ElasticMap,
        plan: StagePlan,
        grid: Grid,
        dtype: torch.dtype,
        attn_implementation: str | None = None,
    ):
        super().__init__()
        self.map, self.grid, self.dtype = elastic_map, grid, dtype
        self.is_first, self.is_last = grid.stage == 0, plan.is_last(grid.stage)
        self.layer_indices = plan.layers(grid.stage)
        self.active = Active(elastic_map.shape, grid.layout.tp)
        model = meta_model(elastic_map.config, dtype, attn_implementation, task=elastic_map.family.task)
        self.elastic: dict[str, ElasticModule] = {}
        self.new: set[str] = set()
        family = elastic_map.family
        for name, module in list(model.named_modules()):
            parts = family.parts_of(name)
            axes = [axes for part in parts if (axes := family.axes_of(part)) is not None]
            if axes and self._is_mine(name) and not isinstance(module, nn.Identity):
                made = [self._make(module, part, len(parts)) for part in axes]
                self.elastic |= zip(parts, made, strict=True)
                model.set_submodule(name, made[0] if len(made) == 1 else FusedLinear(made))
        self._cut(model)
        self.select(elastic_map.shape.full)

    def _is_mine(self, name: str) -> bool:
        parts = name.split(".")
        numbers = [int(part) for part in parts if part.isdigit()]
        if numbers:
            return numbers[0] in self.layer_indices
        return self.is_first if "embed" in name else self.is_last

    def _make(self, module: nn.Module, axes: tuple[str, ...], parts: int) -> ElasticModule:
        """The elastic module, of one of so many parts of a module, with empty tensors of this rank's sizes."""

        def empty(parameter: torch.Tensor | None, leaf_axes: tuple[str, ...]) -> torch.Tensor | None:
            if parameter is None:
                return None
            tp, sizes = self.grid.layout.tp, parameter.chunk(parts)[0].shape
            shape = [local_length(axis, size, tp) for axis, size in zip(leaf_axes, sizes, strict=True)]
            return torch.empty(shape, dtype=self.dtype, device=self.grid.device)

        tensors = (empty(module.weight, axes), empty(getattr(module, "bias", None), axes[:1]))
        common = (*tensors, axes, self.active, self.grid.tp_group)
        if isinstance(module, nn.Linear):
            return ElasticLinear(*common)
        return ElasticEmbedding(*common) if isinstance(module, nn.Embedding) else ElasticNorm(module, *common)

    def _cut(self, model: PreTrainedModel) -> None:
        """Keep this stage's part of the model, which is used up."""
        family, config = self.map.family, self.map.config
        self.base = base = model.base_model
        self._layers_of, _, self._layers_name = family.layers.rpartition(".")
        container = base.get_submodule(family.layers)
        self.layers = {i: container[i] for i in self.layer_indices}
        classifies = family.task == "classify"
        self.head = self.elastic.get(family.heads[-1])
        if classifies and self.is_last:
            self.head = TextHead(model)
        with torch.device(self.grid.device):
            if hasattr(base, "rotary_emb"):
                base.rotary_emb = type(base.rotary_emb)(config=config)
            if classifies and self.is_first and hasattr(base.embeddings, "position_ids"):
                positions = torch.arange(config.max_position_embeddings).expand((1, -1))
                base.embeddings.position_ids = positions
                base.embeddings.token_type_ids = torch.zeros_like(positions)
        if classifies and not self.is_first:
            base.embeddings = Given()
        elif not self.is_first:
            base.embed_tokens = None
        if classifies and not self.is_last:
            base.pooler = None
        if family.final_norm and not self.is_last:
            setattr(base, family.final_norm, nn.Identity())
        self._masks = HandedMasks(self.layers.values() if family.task == "causal_lm" else ())  # texts have padding
        self._outputs: dict[int, torch.Tensor] | None = None
        for i, layer in self.layers.items():
            layer.register_forward_hook(partial(self._keep, i))

    def _keep(self, i: int, _: nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if self._outputs is not None:
            self._outputs[i] = output

    def select(self, spec: SubnetSpec) -> None:
        """Make a subnet the active one, for the next forward and its backward."""
        self.spec = spec
        self.active.select(spec)
        kept = [i for i in spec.layers if i in self.layers]
        owner = self.base.get_submodule(self._layers_of) if self._layers_of else self.base
        setattr(owner, self._layers_name, nn.ModuleList(self.layers[i] for i in kept))
        self.base.config.update(layer_settings(self.map.config, kept))

    def forward(
        self, x: torch.Tensor, batch: dict[str, torch.Tensor], *, features: bool = False
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Ids [B, S] on the first stage, [B, S, D'] on the others -> (output, hidden states by layer).

        The output is [B, S, D'], on an encoder's last stage the pooled [B, D'] that the classifier reads. With
        `features` the hidden state [B, S, D'] after every kept layer of the stage.
        """
        inputs: dict[str, Any] = {"inputs_embeds": x} if x.is_floating_point() else {"input_ids": x}
        if self.map.family.task == "classify":
            types = ["token_type_ids"] if hasattr(self.map.config, "type_vocab_size") else []
            inputs |= {name: batch.get(name) for name in ("attention_mask", *types)}
        else:
            inputs["use_cache"] = False
        self._outputs = {} if features else None
        with self._masks.handed([self.layers[i] for i in self.spec.layers if i in self.layers], x) as masks:
            output = self.base(**inputs, **masks)
        states, self._outputs = self._outputs or {}, None
        pools = self.map.family.task == "classify" and self.is_last
        return (self._pooled(output, batch) if pools else output.last_hidden_state), states

    def _pooled(self, output: ModelOutput, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What a classifier's heads read of each text: [B, D']."""
        if (pooled := getattr(output, "pooler_output", None)) is not None:
            return pooled
        states = output.last_hidden_state
        if getattr(self.map.config, "classifier_pooling", "cls") == "cls":
            return states[:, 0]
        mask = batch.get("attention_mask", states.new_ones(states.shape[:2]))
        return (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)

    @contextmanager
    def teaching(self, phases: int) -> Iterator[None]:
        """The full net with the first `phases` phases of the recipe; then the subnet that was active before."""
        spec, before = self.spec, self.active.phases
        self.select(self.map.shape.full)
        self.active.phases = phases
        try:
            yield
        finally:
            self.select(spec)
            self.active.phases = before

    def load(self, tensors: TensorFolder, order: UnitOrder) -> None:
        """Read this rank's slices, sorted. Raises `UserError` for missing tensors and wrong shapes."""
        for name, module in self.elastic.items():
            for leaf in ("weight", "bias"):
                target = getattr(module, leaf)
                if target is None:
                    continue
                whole = read_tensor(tensors, f"{name}.{leaf}", self.map.family)
                if whole is None:
                    self.new.add(name)
                    target.data.copy_(before_training(f"{name}.{leaf}", target.shape))
                else:
                    fill(target, self.local(whole, self.describe(name, leaf, whole), order), f"{name}.{leaf}")

    def describe(self, name: str, leaf: str, whole: torch.Tensor) -> TensorAxes:
        """Axes of a whole tensor of an elastic module."""
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        return TensorAxes(self.elastic[name].leaf_axes(leaf), tuple(whole.shape), layer)

    def local(self, whole: torch.Tensor, tensor: TensorAxes, order: UnitOrder | None) -> torch.Tensor:
        """This rank's part of a whole tensor; `order` sorts one that lies in the base model's order."""
        tp, rank = self.grid.layout.tp, self.grid.tp_rank
        for dim, axis in enumerate(tensor.axes):
            rows = None if order is None else order.rows(axis, tensor.layer, self.map.shape)
            if rows is not None:
                whole = whole.index_select(dim, rows)
            if axis in SHARDED:
                whole = deal(whole, dim, self.map.shape.block(axis), rank, tp)
            elif axis == VOCAB and tp > 1:
                step = padded_vocab(whole.shape[dim], tp) // tp
                part = whole.narrow(
                    dim, start := min(rank * step, whole.shape[dim]), min(step, whole.shape[dim] - start)
                )
                whole = torch.cat([part, part.new_zeros(step - part.shape[dim], *part.shape[1:])])
        return whole

    def frozen_digest(self) -> str:
        """Changes if any bit of a frozen tensor of this rank flips: the backbone and earlier phases."""
        frozen = []
        for name, module in self.elastic.items():
            frozen += [(f"{name}.{leaf}", parameter) for leaf, parameter in module.named_parameters()]
            for phase, leaves in module.trained.items():
                frozen += [(f"{phase}.{name}.{leaf}", p) for leaf, p in leaves.items() if not p.requires_grad]
        return bit_digest(frozen)


def base_tensors(folder: Path, elastic_map: ElasticMap) -> ModelTensors:
    """The weights of the base model. Raises `UserError` unless they fit its config; a new head may be missing."""
    model = meta_model(elastic_map.config, torch.float32, task=elastic_map.family.task)
    return ModelTensors(folder, model, may_lack=elastic_map.family.text_heads)


def read_tensor(tensors: TensorFolder, name: str, family: Family) -> torch.Tensor | None:
    """A whole tensor of the base folder by its name in `ElasticMap`; None for a new head's. Raises `UserError`."""
    module, stored = name.rpartition(".")[0], family.whole_of(name)
    if name not in tensors and module in family.text_heads:
        return None
    if stored == name:
        return tensors.read(name)
    parts = family.parts_of(stored.rpartition(".")[0])
    rows, place = tensors.shape(stored)[0] // len(parts), parts.index(module)
    return tensors.read(stored, 0, place * rows, (place + 1) * rows)


def before_training(name: str, shape: Sequence[int]) -> torch.Tensor:
    """A new head's frozen tensor, which its factors are added to: a norm that does nothing, zero otherwise."""
    return torch.full(shape, float(len(shape) == 1 and name.endswith(".weight")))
