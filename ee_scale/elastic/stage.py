"""One pipeline stage of the supernet: the transformers model's own forward over elastic layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ee_scale.backbone.digest import bit_digest
from ee_scale.backbone.loading import TensorFolder
from ee_scale.backbone.masks import HandedMasks
from ee_scale.backbone.model_tensors import ModelTensors
from ee_scale.backbone.narrowing import fill
from ee_scale.backbone.parallel import padded_vocab
from ee_scale.backbone.stages import StagePlan
from ee_scale.elastic.architecture import ElasticMap, TensorAxes, local_length
from ee_scale.elastic.modules import Active, ElasticEmbedding, ElasticLinear, ElasticModule, ElasticNorm
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


class ElasticStage(nn.Module):
    """The layers of one pipeline stage, sorted by importance, cut over the tensor group, sized by `select`.

    Attributes:
        elastic: elastic modules by full name in the transformers model ('model.layers.3.mlp.up_proj').
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
        for name, module in list(model.named_modules()):
            axes = elastic_map.family.axes_of(name)
            if axes is not None and self._is_mine(name):
                self.elastic[name] = self._make(name, module, axes)
                model.set_submodule(name, self.elastic[name])
        self._cut(model)
        self.select(elastic_map.shape.full)

    def _is_mine(self, name: str) -> bool:
        parts = name.split(".")
        numbers = [int(part) for part in parts if part.isdigit()]
        if numbers:
            return numbers[0] in self.layer_indices
        return self.is_first if "embed" in name else self.is_last

    def _make(self, name: str, module: nn.Module, axes: tuple[str, ...]) -> ElasticModule:
        """The elastic module with empty tensors of this rank's sizes."""

        def empty(parameter: torch.Tensor | None, leaf_axes: tuple[str, ...]) -> torch.Tensor | None:
            if parameter is None:
                return None
            tp = self.grid.layout.tp
            shape = [local_length(axis, size, tp) for axis, size in zip(leaf_axes, parameter.shape, strict=True)]
            return torch.empty(shape, dtype=self.dtype, device=self.grid.device)

        tensors = (empty(module.weight, axes), empty(getattr(module, "bias", None), axes[:1]))
        common = (*tensors, axes, self.active, self.grid.tp_group)
        if isinstance(module, nn.Linear):
            return ElasticLinear(*common)
        return ElasticEmbedding(*common) if isinstance(module, nn.Embedding) else ElasticNorm(module, *common)

    def _cut(self, model: nn.Module) -> None:
        """Keep this stage's part of the model."""
        family, config = self.map.family, self.map.config
        self.base = base = model.base_model
        self._layers_of, _, self._layers_name = family.layers.rpartition(".")
        container = base.get_submodule(family.layers)
        self.layers = {i: container[i] for i in self.layer_indices}
        self.head = self.elastic.get(family.heads[-1])
        with torch.device(self.grid.device):
            if hasattr(base, "rotary_emb"):
                base.rotary_emb = type(base.rotary_emb)(config=config)
            if family.task == "classify" and self.is_first:
                positions = torch.arange(config.max_position_embeddings).expand((1, -1))
                base.embeddings.position_ids = positions
                base.embeddings.token_type_ids = torch.zeros_like(positions)
        if family.task == "classify":
            if not self.is_first:
                base.embeddings = Given()
            if not self.is_last:
                base.pooler = None
        else:
            if not self.is_first:
                base.embed_tokens = None
            if not self.is_last:
                base.norm = nn.Identity()
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
            inputs |= {name: batch.get(name) for name in ("attention_mask", "token_type_ids")}
        else:
            inputs["use_cache"] = False
        self._outputs = {} if features else None
        with self._masks.handed([self.layers[i] for i in self.spec.layers if i in self.layers], x) as masks:
            output = self.base(**inputs, **masks)
        states, self._outputs = self._outputs or {}, None
        pooled = self.map.family.task == "classify" and self.is_last
        return (output.pooler_output if pooled else output.last_hidden_state), states

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
                    target.data.zero_()
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
    """A whole tensor of the base folder by its transformers name; None for a new head's. Raises `UserError`."""
    if name not in tensors and name.rpartition(".")[0] in family.text_heads:
        return None
    return tensors.read(name)
