"""One pipeline stage of exit tuning: the frozen backbone part and the exits that train on it."""

import re
from collections.abc import Callable
from functools import partial
from math import sqrt
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from transformers import Cache, PreTrainedConfig

from ee_scale.backbone.digest import bit_digest, named_generator
from ee_scale.backbone.loading import LoadTask, TensorFolder, load_tensors
from ee_scale.backbone.masks import HandedMasks
from ee_scale.backbone.narrowing import fill
from ee_scale.backbone.parallel import (
    ROW,
    SPLIT,
    column_linear,
    cut_dim,
    layer_plan,
    materialise,
    padded_vocab,
    sum_partial_gradients,
    swap_projections,
)
from ee_scale.backbone.shard import BackboneStage, is_vocabulary, load_task, output_matrix_name, tensor_plan
from ee_scale.backbone.stages import StagePlan
from ee_scale.families.build import meta_model
from ee_scale.families.registry import decoder_family
from ee_scale.grid import Grid
from ee_scale.modeling.heads import ExitHead, ExitSpec, ExitTaps, build_exit_heads, run_single_layer
from ee_scale.modeling.kinds import ExitKind, Tap
from ee_scale.modeling.versions import CACHE

StageType = TypeVar("StageType", bound="TuningStage")


class TuningStage(nn.Module):
    """Registers the exits alone: what DeepSpeed sees is what trains. The backbone is reached by `backbone`.

    Parameter names are those of the exported files, `exit_heads.<layer>.<module>`.
    """

    def __init__(self, backbone: BackboneStage | None, exit_heads: nn.ModuleDict, spec: ExitSpec):
        super().__init__()
        self.spec = spec
        self.exit_heads = exit_heads
        # In a list, because a registered backbone would be broadcast, cast and counted by the engine.
        self._backbone = [backbone]
        first = backbone.layer_indices.start
        layers = {int(k): backbone.base.layers[int(k) - 1 - first] for k in exit_heads}
        self._layers = [layers]
        self._taps = [ExitTaps(spec, layers)]
        self._masks = [HandedMasks(head.body for head in exit_heads.values() if spec.exit_kind.attends)]

    @property
    def backbone(self) -> BackboneStage:
        return self._backbone[0]

    @property
    def exit_layers(self) -> list[int]:
        return [int(k) for k in self.exit_heads]

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[int, Tap]]:
        """Ids [B, S] or hidden states [B, S, D] -> (hidden states for the next stage, what each exit reads)."""
        hidden = self.backbone(x)
        return hidden, self._taps[0].pop()

    def on_exit(self, call: Callable[[int, Tap], None]) -> None:
        """Call `call(k, tap)` as soon as layer k has run, while later layers of the stage still wait."""

        def tapped(k: int, *_: object) -> None:
            call(k, self._taps[0].taps.pop(k))

        for k, layer in self._layers[0].items():
            layer.register_forward_hook(partial(tapped, k))

    @torch.no_grad()
    def tap(self, k: int, residual: torch.Tensor) -> Tap:
        """What exit k reads, from its residual [B, S, D] alone."""
        return self.spec.exit_kind.tap(self._layers[0][k], self.spec.mlp_input_norm, residual)

    def exit_hidden(self, k: int, tap: Tap, cache: Cache | None = None) -> torch.Tensor:
        """[B, S, D], ready for the head of exit k, with the graph of its modules.

        `cache`: keys and values of an exit that attends, which the tap continues.
        """
        output_norm = self.spec.output_norm(self._layers[0][k])

        def run_layer(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
            if cache is not None:
                return run_single_layer(self.backbone.base, layer, hidden, **{CACHE: cache})
            with self._masks[0].handed([layer], hidden) as masks:
                return run_single_layer(self.backbone.base, layer, hidden, **masks)

        return self.exit_heads[str(k)].hidden(tap, output_norm, run_layer)

    def exit_logits(self, k: int, tap: Tap) -> torch.Tensor:
        """Logits of exit k, [B, S, V/tp], of a shortlist [B, S, N/tp] (padding included)."""
        return self.exit_heads[str(k)].scored_logits(self.exit_hidden(k, tap), self.backbone.lm_head)

    def frozen_digest(self) -> str:
        """Changes if any bit of a frozen tensor of this rank flips."""
        return bit_digest(self.backbone.named_parameters())


def build_stage(
    config: PreTrainedConfig,
    plan: StagePlan,
    spec: ExitSpec,
    grid: Grid,
    dtype: torch.dtype,
    *,
    attn_implementation: str | None = None,
    teacher: bool = False,
    own_logits: bool = False,
    cls: type[StageType] = TuningStage,
) -> StageType:
    """Meta model -> exits copied -> stage cut -> tensor axis swapped. Weights are still empty: see `load_stage`.

    `teacher` keeps the final norm on the last stage and the lm_head on every stage with exits (KL term);
    `own_logits` keeps both on the last stage, for the model's own logits; `cls`: the class of the stage. Where nothing
    but a teacher of shortlist heads reads the lm_head, it has the rows of their tokens only.
    """
    assert len(spec.shortlist_ids) == spec.shortlist  # the training data was counted (`Tune.prepare`)
    model = meta_model(config, dtype, attn_implementation)
    mine = plan.exits(grid.stage)
    heads = build_exit_heads(spec, model.base_model.layers, model.base_model.norm, config.vocab_size)
    heads = nn.ModuleDict({str(k): heads[str(k)] for k in mine})
    is_last = plan.is_last(grid.stage)
    needs_lm_head = (bool(mine) and (spec.reads_lm_head or teacher)) or (own_logits and is_last)
    backbone = BackboneStage(
        model,
        plan,
        grid,
        dtype,
        final_norm=teacher or own_logits,
        lm_head=needs_lm_head,
        lm_head_tokens=() if own_logits else spec.shortlist_ids,
    )
    tensor_axis = tensor_plan(config, grid.layout.tp)
    for head in heads.values():
        _shard_exit(head, tensor_axis, config, grid, dtype)
    return cls(backbone, heads, spec)


def _shard_exit(head: ExitHead, plan: dict[str, str], config: PreTrainedConfig, grid: Grid, dtype: torch.dtype) -> None:
    rows = padded_vocab(head.spec.scored(config.vocab_size), grid.layout.tp)
    kind, body = head.spec.exit_kind, head.body
    with torch.device(grid.device):
        if body is not None:
            swap_projections(body, plan, kind.body.prefix, grid.tp_group, dtype)
        if head.spec.owns_matrix:
            head.head = column_linear(config.hidden_size, rows, False, grid.tp_group, dtype)
        elif head.spec.head == "low_rank":
            head.head.up = column_linear(head.spec.rank, rows, False, grid.tp_group, dtype)
    materialise(head, grid.device)
    if kind.attends:
        body.self_attn.layer_idx = 0  # the one layer of its own cache
    head.requires_grad_(True)
    if body is not None:
        sum_partial_gradients(body, plan, kind.body.prefix, grid.tp_group)


def load_stage(stage: TuningStage, tensors: TensorFolder, grid: Grid, *, init: str, seed: int) -> None:
    """Read the backbone's slices and initialise the exits (`copy` from the backbone, or `random`)."""
    stage.backbone.load(tensors, grid)
    config, tp, tokens = stage.backbone.model_config, grid.layout.tp, stage.spec.shortlist_ids
    tasks: list[LoadTask] = []
    for name, parameter in stage.exit_heads.named_parameters():
        source = copy_source(stage.spec.exit_kind, name, config.num_hidden_layers, tensors)
        if source is None:
            _fill(name, parameter, whole_low_rank(name, parameter, config.vocab_size, seed), grid)
        elif init == "copy":
            tasks.append(load_task(parameter, source, config.vocab_size, tp, tokens if is_vocabulary(name) else ()))
        else:
            rows = stage.spec.shortlist if is_vocabulary(name) else 0
            _fill(name, parameter, whole_random(name, source, tensors, config, seed, rows), grid)
    load_tensors(tasks, tensors, grid.tp_rank, tp)


def load_trained_stage(stage: TuningStage, tensors: TensorFolder, exits: TensorFolder, grid: Grid) -> None:
    """Read the backbone's slices and those of trained exits (`exit_heads.*`). Raises `UserError`."""
    stage.backbone.load(tensors, grid)
    rows = stage.spec.scored(stage.backbone.model_config.vocab_size)
    tasks = [
        load_task(parameter, f"exit_heads.{name}", rows, grid.layout.tp)
        for name, parameter in stage.exit_heads.named_parameters()
    ]
    load_tensors(tasks, exits, grid.tp_rank, grid.layout.tp)


def copy_source(kind: ExitKind, name: str, num_layers: int, tensors: TensorFolder) -> str | None:
    """Backbone tensor that an exit parameter ('3.mlp.up_proj.weight') starts from; None for low-rank factors.

    head <- lm_head, the rest as the kind says.
    """
    k, inner = name.split(".", 1)
    if inner == "head.weight":
        return output_matrix_name(tensors)
    return kind.source(inner, int(k), num_layers)


def whole_low_rank(name: str, parameter: torch.Tensor, vocab_size: int, seed: int) -> torch.Tensor:
    """Whole factor of a low-rank head: down is uniform in +-1/sqrt(D) (as `nn.Linear`), up is zero."""
    if ".up." in name:
        return torch.zeros(vocab_size, parameter.shape[1])
    bound = 1 / sqrt(parameter.shape[1])
    return torch.empty(parameter.shape).uniform_(-bound, bound, generator=named_generator(name, seed))


def whole_random(
    name: str, source: str, tensors: TensorFolder, config: PreTrainedConfig, seed: int, rows: int = 0
) -> torch.Tensor:
    """Whole tensor of a randomly initialised exit (EE-LLM's rules), with so many rows (0: those of its source).

    Matrices N(0, std); output projections N(0, std / sqrt(2 k)) for an exit at layer k; biases zero; norms neutral.
    """
    shape = tensors.shape(source)
    shape = (rows or shape[0], *shape[1:])
    if len(shape) == 1:
        return torch.full(shape, 0.0 if source.endswith(".bias") else decoder_family(config).neutral_norm)
    std = config.initializer_range
    place = re.sub(r"^model\.layers\.\d+", "layers.*", source).rsplit(".", 1)[0]
    if layer_plan(config.base_model_tp_plan).get(place) in (ROW, SPLIT):
        std /= sqrt(2 * int(name.split(".", 1)[0]))
    return torch.empty(shape).normal_(0.0, std, generator=named_generator(name, seed))


def _fill(name: str, parameter: nn.Parameter, whole: torch.Tensor, grid: Grid) -> None:
    fill(parameter, local_slice(whole, parameter, grid.tp_rank), name)


def local_slice(whole: torch.Tensor, parameter: torch.Tensor, tp_rank: int) -> torch.Tensor:
    """This rank's part of a whole tensor; missing vocabulary rows are zero."""
    dim = cut_dim(parameter)
    if dim is None:
        return whole
    step = parameter.shape[dim]
    part = whole.narrow(
        dim, min(tp_rank * step, whole.shape[dim]), max(0, min(step, whole.shape[dim] - tp_rank * step))
    )
    if part.shape[dim] == step:
        return part
    padding = list(part.shape)
    padding[dim] = step - part.shape[dim]
    return torch.cat([part, part.new_zeros(padding)], dim=dim)


def gather_whole(name: str, parameter: torch.Tensor, part: torch.Tensor, vocab_size: int, grid: Grid) -> torch.Tensor:
    """The whole tensor from this rank's part (or a tensor of its shape). A collective over the tensor group."""
    dim = cut_dim(parameter)
    if dim is None:
        return part
    parts = [torch.empty_like(part) for _ in range(grid.layout.tp)]
    dist.all_gather(parts, part.contiguous(), group=grid.tp_group)
    whole = torch.cat(parts, dim=dim)
    return whole.narrow(0, 0, vocab_size) if is_vocabulary(name) else whole
