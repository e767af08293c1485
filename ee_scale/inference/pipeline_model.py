"""This rank's part of a model with exits, for decoding: from an exported folder, a sidecar, or a plain model."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from transformers import PreTrainedConfig

from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.backbone.proof import check_tensor_proof
from ee_scale.backbone.shard import tensor_plan
from ee_scale.backbone.stages import StagePlan, plan_stages
from ee_scale.errors import UserError
from ee_scale.exits.placement import exit_parameters
from ee_scale.exits.stage import TuningStage, build_stage, load_trained_stage
from ee_scale.families.sizes import ModelShape, shape_of
from ee_scale.grid import Grid
from ee_scale.modeling.heads import ExitSpec


def plan_decoding(
    folder: ModelFolder,
    tp: int,
    pp: int,
    exit_layers: Sequence[int],
    stages: Sequence[int] | None = None,
    *,
    drafts: bool = False,
) -> StagePlan:
    """Cut the whole model into `pp` stages, balanced by the weights that a token reads. Raises `UserError`.

    drafts: lossless decoding over stages. The plan then has the one exit that drafts, as `drafting_exit` chooses it,
    and the final head reads every token. Raises `UserError` also where no exit stands before the last stage.
    """
    shape = shape_of(folder.config)
    tensor_plan(folder.decoder_config, tp)
    check_tensor_proof(folder.config, tp)
    costs = {
        "layer_cost": shape.layer_parameters,
        "exit_cost": _exit_cost(folder.exits, shape),
        "last_cost": _head_cost(shape) if drafts else 0,
    }
    if not drafts:
        return plan_stages(shape.num_layers, pp, exit_layers, given=stages, whole_model=True, **costs)
    plans = {k: plan_stages(shape.num_layers, pp, [k], given=stages, whole_model=True, **costs) for k in exit_layers}
    plan = plans[min(exit_layers, key=lambda k: (plans[k].stage_of(k), -k))]
    drafting_exit(plan, exit_layers)
    return plan


def stage_costs(config: PreTrainedConfig, spec: ExitSpec, plan: StagePlan, k: int) -> list[int]:
    """Weights that each stage reads for a token, where exit k drafts and the last stage verifies."""
    shape = shape_of(config)
    costs = [len(plan.layers(stage)) * shape.layer_parameters for stage in range(plan.launched)]
    costs[plan.stage_of(k)] += _exit_cost(spec, shape)
    costs[-1] += _head_cost(shape)
    return costs


def _head_cost(shape: ModelShape) -> int:
    return shape.vocab_size * shape.hidden_size


def _exit_cost(spec: ExitSpec | None, shape: ModelShape) -> int:
    head = 0 if spec and spec.shortlist else _head_cost(shape)
    return head + (exit_parameters(spec, shape) if spec else 0)


def drafting_exit(plan: StagePlan, exit_layers: Sequence[int]) -> int:
    """The deepest of these exits on the first stage that has one: no draft waits for fewer stages, and a stage runs all
    its layers anyway. Raises `UserError` if that is the last stage, behind which nobody verifies."""
    k = min((k for k in exit_layers if k in plan.exit_layers), key=lambda k: (plan.stage_of(k), -k))
    if plan.is_last(plan.stage_of(k)):
        cut = ", ".join(f"{start + 1}-{end}" for start, end in pairwise(plan.bounds))
        raise UserError(
            f"policy=lossless: no exit stands before the last of {plan.launched} stages (layers {cut}), only at "
            f"{', '.join(map(str, exit_layers))}; set parallel.stages, or use policy=threshold or one device"
        )
    return k


def load_decoding_stage(
    folder: ModelFolder, plan: StagePlan, grid: Grid, dtype: torch.dtype, attn_implementation: str | None = None
) -> TuningStage:
    """Build this rank's part and read its slices; of the exits, those of `plan`. Raises `UserError`."""
    spec = replace(folder.exits or ExitSpec(()), layers=plan.exit_layers)
    stage = build_stage(
        folder.config, plan, spec, grid, dtype, attn_implementation=attn_implementation, own_logits=True
    )
    stage.exit_heads.to(dtype)  # low-rank factors are built in fp32
    load_trained_stage(stage, *folder.tensors(), grid)
    return stage.eval().requires_grad_(False)
