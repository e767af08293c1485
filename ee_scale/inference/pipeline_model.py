"""This rank's part of a model with exits, for decoding: from an exported folder, a sidecar, or a plain model."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.backbone.shard import tensor_plan
from ee_scale.backbone.stages import StagePlan, plan_stages
from ee_scale.exits.placement import exit_parameters
from ee_scale.exits.stage import TuningStage, build_stage, load_trained_stage
from ee_scale.families.sizes import shape_of
from ee_scale.grid import Grid
from ee_scale.modeling.heads import ExitSpec


def plan_decoding(
    folder: ModelFolder, tp: int, pp: int, exit_layers: Sequence[int], stages: Sequence[int] | None = None
) -> StagePlan:
    """Cut the whole model into `pp` stages, balanced by the weights that a token reads. Raises `UserError`."""
    shape = shape_of(folder.config)
    tensor_plan(folder.config, tp)
    head = 0 if folder.exits and folder.exits.shortlist else shape.vocab_size * shape.hidden_size
    cost = head + (exit_parameters(folder.exits, shape) if folder.exits else 0)
    return plan_stages(
        shape.num_layers,
        pp,
        exit_layers,
        given=stages,
        layer_cost=shape.layer_parameters,
        exit_cost=cost,
        whole_model=True,
    )


def load_decoding_stage(
    folder: ModelFolder, plan: StagePlan, grid: Grid, dtype: torch.dtype, attn_implementation: str | None = None
) -> TuningStage:
    """Build this rank's part and read its slices; of the exits, those of `plan`. Raises `UserError`."""
    spec = replace(folder.exits or ExitSpec(()), layers=plan.exit_layers)
    stage = build_stage(
        folder.config, plan, spec, grid, dtype, attn_implementation=attn_implementation, own_logits=True
    )
    load_trained_stage(stage, *folder.tensors(), grid)
    return stage.eval().requires_grad_(False)
