"""Everything about a tune run that follows from config and model, decided once and before any process starts."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from ee_scale.backbone.families import ModelShape, shape_of
from ee_scale.backbone.shard import tensor_plan
from ee_scale.backbone.stages import StagePlan, plan_stages
from ee_scale.config.checks import check_batch, check_tune
from ee_scale.config.schema import TrainingConfig, TuneConfig
from ee_scale.config.tune import BackboneConfig
from ee_scale.errors import UserError
from ee_scale.exits.heads import ExitSpec
from ee_scale.exits.joint import FROZEN, FULL, LOW_RANK
from ee_scale.exits.placement import (
    exit_cost,
    exit_spec,
    resolve_exit_layers,
    resolve_loss_weights,
)
from ee_scale.grid import Layout

# Passes over a layer's matrices per token: forward; and gradient of the input; and gradient of the weights.
LAYER_PASSES = {FROZEN: 1.0, LOW_RANK: 2.0, FULL: 3.0}


@dataclass(frozen=True)
class TunePlan:
    """What runs where.

    Attributes:
        layout: the processes that are launched (stages after the deepest exit are not).
        loss_weights: final weight of each exit's loss.
        num_micro_batches: per optimizer step and rank.
        backbone: what trains beside the exits.
    """

    model_dir: Path
    model_config: PreTrainedConfig
    shape: ModelShape
    spec: ExitSpec
    stages: StagePlan
    layout: Layout
    loss_weights: dict[int, float]
    num_micro_batches: int
    backbone: BackboneConfig


def plan_tune(config: TuneConfig, model_dir: Path, model_config: PreTrainedConfig) -> TunePlan:
    """Check the config against the model and cut it into stages. Raises `UserError`."""
    check_tune(config)
    shape, parallel, exits = shape_of(model_config), config.parallel, config.exits
    check_fits(config, shape.max_positions, shape.num_layers)
    tensor_plan(model_config, parallel.tp)
    layers = resolve_exit_layers(exits.layers, shape.num_layers, parallel.pp, parallel.stages)
    spec = exit_spec(model_config, layers, exits.kind, exits.head, exits.rank)
    backbone = config.backbone
    stages = plan_stages(
        shape.num_layers,
        parallel.pp,
        layers,
        given=parallel.stages,
        layer_cost=LAYER_PASSES[backbone.mode] * shape.layer_parameters,
        exit_cost=exit_cost(spec, shape),
        last_cost=3.0 * shape.vocab_size * shape.hidden_size if backbone.trains else 0.0,
        whole_model=exits.kl_weight > 0 or backbone.trains,
    )
    return TunePlan(
        model_dir=model_dir,
        model_config=model_config,
        shape=shape,
        spec=spec,
        stages=stages,
        layout=Layout(parallel.tp, stages.launched, parallel.dp),
        loss_weights=resolve_loss_weights(exits.loss_weights, layers),
        num_micro_batches=check_batch(config.train.global_batch_size, config.train.micro_batch_size, parallel.dp),
        backbone=backbone,
    )


def check_fits(config: TrainingConfig, max_positions: int, num_layers: int) -> None:
    """Refuse sequences and grids that are too long for the model. Raises `UserError`."""
    if config.data.seq_length > max_positions:
        raise UserError(
            f"data.seq_length={config.data.seq_length} is above the model's max_position_embeddings={max_positions}"
        )
    if config.parallel.pp > num_layers:
        raise UserError(f"parallel.pp={config.parallel.pp}: more stages than the model's {num_layers} layers")


def uses_bf16(precision: str, device: torch.device) -> bool:
    """'auto' means bf16 on a GPU and fp32 on a CPU."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")
