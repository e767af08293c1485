"""This rank's frozen part of a Hugging Face model: build on the meta device, cut, swap, load slices."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from ee_scale.backbone.loading import LoadTask, TensorFolder, load_tensors
from ee_scale.backbone.masks import HandedMasks
from ee_scale.backbone.model_tensors import ModelTensors
from ee_scale.backbone.parallel import (
    check_tensor_parallel,
    column_linear,
    cut_dim,
    cut_packs,
    layer_plan,
    materialise,
    padded_vocab,
    swap_projections,
    unknown_style,
    vocab_embedding,
)
from ee_scale.backbone.stages import StagePlan
from ee_scale.families.build import meta_model
from ee_scale.families.family import Family
from ee_scale.families.registry import decoder_family
from ee_scale.families.sizes import shape_of, with_layers
from ee_scale.grid import Grid
from ee_scale.modeling.heads import take_as_it_is


def tensor_plan(config: PreTrainedConfig, tp: int) -> dict[str, str]:
    """The tensor-parallel plan inside a decoder layer, checked against the sizes. Raises `UserError`."""
    plan = layer_plan(config.base_model_tp_plan)
    check_tensor_parallel(tp, shape_of(config), plan, config.model_type)
    return {name.removeprefix("layers.*."): style for name, style in plan.items()}


def takes_tensor_parallel(family: Family) -> bool:
    """Whether exits of a family train on more than one tensor rank: transformers' plan for it has known styles only."""
    plan = layer_plan(CONFIG_MAPPING[family.name].base_model_tp_plan)
    return family.is_decoder and bool(plan) and unknown_style(plan) is None


def model_tensors(folder: Path, config: PreTrainedConfig) -> ModelTensors:
    """The weights of a causal language model; `config`: its own. Raises `UserError` unless they fit it."""
    return ModelTensors(folder, meta_model(config, torch.float32))


def layers_of(base: nn.Module) -> nn.ModuleList:
    """The decoder layers of a base model."""
    layers = base.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    return layers


def cut_base(model: PreTrainedModel, layers: Sequence[int], *, final_norm: bool) -> nn.Module:
    """The base of a model that is used up, with these layers (from 0) alone. It embeds only if it has the first one."""
    base = model.base_model
    base.config = with_layers(base.config, layers)
    kept = nn.ModuleList(layers_of(base)[i] for i in layers)
    for place, layer in enumerate(kept):
        layer.get_submodule("self_attn").layer_idx = place  # its place in this stage's cache
    base.layers = kept
    if not final_norm:
        base.norm = nn.Identity()
    if layers[0] > 0:
        take_as_it_is(base)
    return base


def renew_rotary(base: nn.Module, config: PreTrainedConfig) -> None:
    """Tables of a base that was built without memory, for the whole model's config, on the current default device."""
    base.rotary_emb = type(base.rotary_emb)(config=config)


def run_base(base: nn.Module, masks: HandedMasks, x: torch.Tensor, **options: object) -> torch.Tensor:
    """The base of a stage on ids [B, S] or hidden states [B, S, D] -> [B, S, D]; `masks`: those of its layers."""
    inputs = {"inputs_embeds": x} if x.is_floating_point() else {"input_ids": x}
    if options:
        return base(**inputs, **{"use_cache": False, **options}).last_hidden_state
    with masks.handed(layers_of(base), x) as kept:
        return base(**inputs, **kept, use_cache=False).last_hidden_state


class BackboneStage(nn.Module):
    """The layers of one pipeline stage, frozen, cut over the tensor group.

    [B, S] ids on the first stage, [B, S, D] hidden states on the others -> [B, S, D]; with `final_norm` the last
    stage's output is the normed state that the lm_head reads.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: StagePlan,
        grid: Grid,
        dtype: torch.dtype,
        *,
        final_norm: bool = False,
        lm_head: bool = False,
        lm_head_tokens: Sequence[int] = (),
    ):
        """`model` comes from `meta_model` and is used up.

        lm_head: keep a frozen output matrix on this stage; lm_head_tokens: only its rows of these tokens (empty: all).
        """
        super().__init__()
        self.model_config = model.config
        self.family = decoder_family(model.config)
        self.layer_indices = plan.layers(grid.stage)
        self.base = cut_base(model, self.layer_indices, final_norm=final_norm and plan.is_last(grid.stage))
        self.lm_head_tokens = tuple(lm_head_tokens)
        self._swap(grid, dtype, with_lm_head=lm_head)
        self.requires_grad_(False)
        self._masks = HandedMasks(self.base.layers)

    def _swap(self, grid: Grid, dtype: torch.dtype, with_lm_head: bool) -> None:
        config, group = self.model_config, grid.tp_group
        plan = tensor_plan(config, group.size())
        embedding = self.base.embed_tokens
        scale = self.family.scale_of(embedding)
        with torch.device(grid.device):
            for layer in self.base.layers:
                swap_projections(layer, plan, "", group, dtype)
            renew_rotary(self.base, config)
            self.base.embed_tokens = None
            if grid.stage == 0:
                self.base.embed_tokens = vocab_embedding(embedding, scale, group, dtype)
            self.lm_head = None
            if with_lm_head:
                rows = padded_vocab(len(self.lm_head_tokens) or config.vocab_size, group.size())
                self.lm_head = column_linear(config.hidden_size, rows, False, group, dtype)
                whole = not self.lm_head_tokens
                if whole and config.tie_word_embeddings and self.base.embed_tokens is not None:
                    self.lm_head.weight = self.base.embed_tokens.weight
        materialise(self.base, grid.device)

    def load(self, tensors: TensorFolder, grid: Grid) -> None:
        """Read this rank's slices. Raises `UserError` for missing tensors and wrong shapes."""
        tokens = {"lm_head.weight": self.lm_head_tokens}
        tasks = [
            load_task(
                parameter,
                self.source_name(name, tensors),
                self.model_config.vocab_size,
                grid.layout.tp,
                tokens.get(name, ()),
            )
            for name, parameter in self.named_parameters()
        ]
        load_tensors(tasks, tensors, grid.tp_rank, grid.layout.tp)

    def source_name(self, name: str, tensors: TensorFolder) -> str:
        """Hugging Face name of a parameter of this module ('base.layers.0.x' on stage 1 -> 'model.layers.6.x')."""
        return output_matrix_name(tensors) if name == "lm_head.weight" else self.full_name(name)

    def full_name(self, name: str) -> str:
        """The same for everything but the lm_head, whose place depends on the folder."""
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(self.layer_indices[int(parts[2])])
        return ".".join(["model", *parts[1:]])

    def forward(self, x: torch.Tensor, **options: object) -> torch.Tensor:
        """options: those of transformers' base model. A `Cache` for this stage's layers is extended; x continues it."""
        return run_base(self.base, self._masks, x, **options)


def output_matrix_name(tensors: TensorFolder) -> str:
    """Where the output matrix lies: its own tensor, or the embedding of a model that ties them."""
    return "lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"


def load_task(parameter: nn.Parameter, source: str, vocab_size: int, tp: int, tokens: Sequence[int] = ()) -> LoadTask:
    """The task that fills a parameter; vocabulary matrices are as long as the vocabulary, whatever their padding.

    tokens: those whose rows a vocabulary matrix gets, in this order; empty: all.
    """
    dim = cut_dim(parameter)
    if dim is None:
        return LoadTask(parameter, source)
    rows = torch.tensor(tokens) if tokens else None
    size = vocab_size if is_vocabulary(source) else parameter.shape[dim] * tp
    return LoadTask(parameter, source, dim, size, cut_packs(parameter), rows)


def is_vocabulary(name: str) -> bool:
    """Whether a cut parameter is as long as the vocabulary (and so may be padded), by its name."""
    return name.endswith(("embed_tokens.weight", "head.weight", "head.up.weight"))
