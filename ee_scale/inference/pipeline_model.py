"""This rank's part of a model with exits, for decoding: from an exported folder, a sidecar, or a plain model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from ee_scale.artifact.calibration import read_calibration
from ee_scale.artifact.sidecar import SIDECAR_CONFIG, base_folder, read_sidecar
from ee_scale.backbone.fingerprint import is_model
from ee_scale.backbone.loading import TensorFolder, load_config
from ee_scale.backbone.model_tensors import ModelTensors
from ee_scale.backbone.shard import tensor_plan
from ee_scale.backbone.small_files import GENERATION_CONFIG
from ee_scale.backbone.stages import StagePlan, plan_stages
from ee_scale.errors import UserError, one_line
from ee_scale.exits.placement import exit_parameters, exits_of, read_spec
from ee_scale.exits.stage import TuningStage, build_stage, load_trained_stage
from ee_scale.families.sizes import shape_of
from ee_scale.grid import Grid
from ee_scale.inference.weights import tensors_with_exits
from ee_scale.modeling.heads import ExitSpec


@dataclass(frozen=True)
class ModelParts:
    """Where a model lies on disk.

    Attributes:
        folder: what was asked for; a calibration lies here.
        base: config, generation config, tokenizer and weights of the backbone.
        spec: its exits; None for a plain model.
        sidecar: where the exits lie; None: beside the weights of `base`.
    """

    folder: Path
    base: Path
    config: Any
    spec: ExitSpec | None
    sidecar: Path | None = None

    def generation_config(self) -> GenerationConfig:
        """That of the base model; a sidecar's own file holds a calibration alone. Raises `UserError`."""
        if (self.base / GENERATION_CONFIG).is_file():
            try:
                return GenerationConfig.from_pretrained(self.base)
            except Exception as error:  # whatever transformers makes of a file that says odd things
                raise UserError(f"{self.base / GENERATION_CONFIG}: {one_line(error)}") from error
        return GenerationConfig.from_model_config(self.config)

    def tensors(self) -> tuple[ModelTensors, TensorFolder]:
        """Of the backbone, and of its exits. Raises `UserError` unless they fit the config."""
        return tensors_with_exits(self.base, self.config, self.spec, self.sidecar)

    def calibration(self) -> dict[str, Any] | None:
        """Limits that `ee-scale calibrate` stored beside the exits."""
        return read_calibration(self.folder)


def find_parts(folder: Path) -> ModelParts:
    """The parts of a model folder. Raises `UserError`, also for weights that are not what its config says."""
    parts = _find_parts(folder)
    parts.tensors()
    return parts


def _find_parts(folder: Path) -> ModelParts:
    if (folder / SIDECAR_CONFIG).is_file():
        facts = read_sidecar(folder)
        base = base_folder(folder, facts)
        if not base.is_dir():
            raise UserError(f"{folder}: its base model {base} is not there")
        if not is_model(base, facts["base_fingerprint"]):
            raise UserError(f"{folder}: {base} is not the base model that these exits were trained on")
        config = load_config(base)
        spec = read_spec(facts["early_exit"], folder, config.num_hidden_layers)
        return ModelParts(folder, base, config, spec, folder)
    config = load_config(folder)
    return ModelParts(folder, folder, config, exits_of(folder, config))


def plan_decoding(
    parts: ModelParts, tp: int, pp: int, exit_layers: Sequence[int], stages: Sequence[int] | None = None
) -> StagePlan:
    """Cut the whole model into `pp` stages, balanced by the weights that a token reads. Raises `UserError`."""
    shape = shape_of(parts.config)
    tensor_plan(parts.config, tp)
    head = shape.vocab_size * shape.hidden_size
    cost = head + (exit_parameters(parts.spec, shape) if parts.spec else 0)
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
    parts: ModelParts, plan: StagePlan, grid: Grid, dtype: torch.dtype, attn_implementation: str | None = None
) -> TuningStage:
    """Build this rank's part and read its slices; of the exits, those of `plan`. Raises `UserError`."""
    spec = replace(parts.spec or ExitSpec(()), layers=plan.exit_layers)
    stage = build_stage(parts.config, plan, spec, grid, dtype, attn_implementation=attn_implementation, decoding=True)
    load_trained_stage(stage, *parts.tensors(), grid)
    return stage.eval().requires_grad_(False)
