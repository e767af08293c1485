"""The weights of a model with exits, checked by their headers before anything is built."""

import copy
from pathlib import Path
from typing import Any

import torch

from ee_scale.artifact.sidecar import SIDECAR_WEIGHTS
from ee_scale.backbone.loading import TensorFolder
from ee_scale.backbone.model_tensors import ModelTensors
from ee_scale.backbone.shard import model_tensors
from ee_scale.errors import UserError
from ee_scale.modeling.heads import ExitSpec
from ee_scale.modeling.modeling_early_exit import PREFIX, check_exit_keys, early_exit_class


def tensors_with_exits(
    base: Path, config: Any, spec: ExitSpec | None, sidecar: Path | None = None
) -> tuple[ModelTensors, TensorFolder]:
    """(tensors of the backbone, of its exits, 'exit_heads.*'); `sidecar`: where the exits lie if not beside it.

    `config`: the base's `load_config`. Raises `UserError` unless all that the config asks for is there, and fits.
    """
    if spec is None:
        tensors = model_tensors(base, config)
        return tensors, tensors
    config = copy.deepcopy(config)
    config.early_exit = spec.to_dict()
    with torch.device("meta"):
        model = early_exit_class(config)(config)
    exits = TensorFolder(base) if sidecar is None else TensorFolder(sidecar, [sidecar / SIDECAR_WEIGHTS])
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items() if name.startswith(PREFIX)}
    stored, wanted = {name for name in exits.files if name.startswith(PREFIX)}, shapes.keys()
    try:
        check_exit_keys(exits.folder, {"missing_keys": wanted - stored, "unexpected_keys": stored - wanted})
    except ValueError as error:
        raise UserError(str(error)) from error
    if sidecar is None:
        tensors = ModelTensors(base, model)
        return tensors, tensors
    for name, shape in shapes.items():
        if list(exits.shape(name)) != shape:
            raise UserError(f"{sidecar}: '{name}' has shape {list(exits.shape(name))}, but the config asks for {shape}")
    return model_tensors(base, config), exits
