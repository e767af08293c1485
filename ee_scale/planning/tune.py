"""Everything about a tune run that follows from config and model, decided once and before any process starts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ee_scale.backbone.exit_layers import resolve_exit_layers
from ee_scale.backbone.parallel import padded_vocab
from ee_scale.backbone.shard import tensor_plan
from ee_scale.backbone.stages import StagePlan, plan_stages
from ee_scale.config.checks import check_batch, check_tune
from ee_scale.config.tune import BackboneConfig, TuneConfig
from ee_scale.exits.joint import FROZEN, FULL, LOW_RANK, output_copies
from ee_scale.exits.placement import exit_cost, exit_spec, resolve_loss_weights
from ee_scale.families.family import Family
from ee_scale.families.registry import decoder_family
from ee_scale.families.sizes import ModelShape, shape_of
from ee_scale.grid import Layout
from ee_scale.modeling.heads import ExitSpec
from ee_scale.modeling.kinds import LAYER_BACKWARD, LAYER_FORWARD, Tap, attention_flops
from ee_scale.planning.estimates import (
    OVERHEAD,
    Parameters,
    Plan,
    RankMemory,
    StageTraffic,
    StageWork,
    check_lengths,
    logits_bytes,
    rank_traffic,
    ring,
    state_bytes,
)
from ee_scale.planning.passes import (
    Passes,
    add_pairs,
    count,
    final_norm,
    first_layer,
    layer_call,
    layer_passes,
    local_model,
    watch,
)

# Passes over a layer's matrices per token: forward; and gradient of the input; and gradient of the weights.
LAYER_PASSES = {FROZEN: 1.0, LOW_RANK: 2.0, FULL: 3.0}


@dataclass(frozen=True)
class TunePlan(Plan[TuneConfig]):
    """What runs where, and what it costs.

    Attributes:
        layout: the processes that are launched (stages after the deepest exit are not).
        loss_weights: final weight of each exit's loss.
        num_micro_batches: per optimizer step and rank.
    """

    config: TuneConfig
    model_dir: Path
    model_config: PreTrainedConfig
    shape: ModelShape
    spec: ExitSpec
    stages: StagePlan
    layout: Layout
    loss_weights: dict[int, float]
    num_micro_batches: int

    @property
    def backbone(self) -> BackboneConfig:
        """What trains beside the exits."""
        return self.config.backbone

    def with_config(self, config: TuneConfig) -> "TunePlan":
        return plan_tune(config, self.model_dir, self.model_config)

    @property
    def total_steps(self) -> int:
        return self.config.train.steps

    def exits(self, stage: int) -> tuple[int, ...]:
        return tuple(self.stages.exits(stage))

    def reliefs(self) -> Mapping[str, Any]:
        return {"backbone.activation_checkpointing": True} if self.backbone.trains else {}

    def bubble(self) -> tuple[float, str]:
        p, m = self.layout.pp, self.num_micro_batches
        if p == 1:
            return 0.0, "one stage"
        if self.backbone.trains:
            return (p - 1) / (m + p - 1), f"(p-1)/(m+p-1), p={p}, m={m} forward-backward pairs"
        if not self.teaches:
            return 0.0, "nothing flows backwards: stages run ahead into the next step"
        return (p - 1) / (m + p - 1), "(p-1)/(m+p-1): exits wait for the final layer"

    @property
    def teaches(self) -> bool:
        """Whether exits learn from the final layer."""
        return self.config.exits.kl_weight > 0

    @property
    def family(self) -> Family:
        return decoder_family(self.model_config)

    def work(self) -> list[StageWork]:
        shape, mode, seq_length = self.shape, self.backbone.mode, self.config.data.seq_length
        joint = self.backbone.trains
        per_exit = exit_flops(
            self.spec,
            shape,
            seq_length,
            through=joint,
            trains_matrix=mode == "full",
            teacher=self.teaches,
            confidence=self.config.exits.confidence_weighting,
            pre_norm=self.family.mlp_input_norm is not None,
        )
        layer, attention = 2 * shape.layer_parameters, attention_flops(shape, seq_length)
        adapters = 2 * self._adapter_parameters
        forward, backward = layer + attention + adapters, 0.0
        if joint:
            backward = layer * (2 if mode == "full" else 1) + 2 * attention + 2 * adapters
            backward += forward * self.backbone.activation_checkpointing
        vocabulary = 2 * shape.vocab_size * shape.hidden_size
        final = vocabulary * (3 if mode == "full" else 2) * joint
        last = self.stages.launched - 1
        return [
            StageWork(
                forward=forward * len(self.stages.layers(stage)),
                backward=backward * len(self.stages.layers(stage)),
                exits=per_exit * len(self.stages.exits(stage)) + final * (stage == last),
            )
            for stage in range(self.stages.launched)
        ]

    @property
    def _adapter_parameters(self) -> int:
        """Of the low-rank adapters of one layer."""
        if self.backbone.mode != "low_rank":
            return 0
        shape, backbone = self.shape, self.backbone
        width, q, kv = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        ends = {"attention": 2 * (width + q) + 2 * (width + kv), "mlp": 3 * (width + shape.intermediate_size)}
        return backbone.rank * sum(ends[target] for target in backbone.targets)

    def parameters(self, stage: int) -> Parameters:
        local = local_model(self.model_config, self.layout.tp, torch.float32)
        layer, norm, spec = first_layer(local), final_norm(local), self.spec
        mode, last = self.backbone.mode, stage == self.stages.launched - 1
        layers, exits = len(self.stages.layers(stage)), len(self.stages.exits(stage))
        width, rows = self.shape.hidden_size, padded_vocab(self.shape.vocab_size, self.layout.tp) // self.layout.tp
        vocabulary = rows * width
        needs_head = (exits and (spec.reads_lm_head or self.teaches)) or (mode != "frozen" and last)
        shares = self.shape.tied_embeddings and stage == 0  # one matrix for both ends
        backbone = layers * count(layer) + vocabulary * (stage == 0) + vocabulary * bool(needs_head and not shares)
        backbone += count(norm) * (last and (self.teaches or mode != "frozen"))
        body = spec.exit_kind.body_in(layer)
        own_norm = count(norm) * spec.exit_kind.normed
        head = [prod(shape) for shape in spec.head_shapes(width, rows).values()]
        trained, biggest = exits * (count(body) + own_norm + sum(head)), [0]
        if exits:
            biggest += [own_norm, *head]
            biggest += [p.numel() for p in body.parameters()] if body is not None else []
        if mode == "low_rank":
            prefixes = self.family.prefixes(self.backbone.targets)
            adapted = add_pairs(layer, self.backbone.rank, prefixes)
            trained += layers * count(adapted)
            biggest += [p.numel() for p in adapted.parameters()]
        if mode == "full":
            biggest += [p.numel() for p in layer.parameters()] + [vocabulary * bool(stage == 0 or needs_head)]
            return Parameters(0, backbone + trained, max(biggest))
        return Parameters(backbone, trained, max(biggest))

    def memory(self, *, bf16: bool, device: str = "cuda") -> list[RankMemory]:
        dtype = torch.bfloat16 if bf16 else torch.float32
        return [self._stage_memory(stage, dtype, device) for stage in range(self.stages.launched)]

    def _stage_memory(self, stage: int, dtype: torch.dtype, device: str) -> RankMemory:
        config, mode, size = self.config, self.backbone.mode, dtype.itemsize
        rows, length, exits = config.train.micro_batch_size, config.data.seq_length, len(self.stages.exits(stage))
        parameters = self.parameters(stage)
        weights, gradients, optimizer, moment = state_bytes(parameters, self.layout.dp, size)
        state = rows * length * self.shape.hidden_size * size  # one hidden state
        local = local_model(self.model_config, self.layout.tp, dtype, config.model.attn_implementation)
        teaches, last = self.teaches, stage == self.stages.launched - 1
        body = exit_passes(local, self.spec, rows, length, through=mode != "frozen")
        taps = self.spec.exit_kind.states_read * state
        if mode == "frozen":
            layers = layer_passes(local, rows, length, (), 0).forward
            held = self.num_micro_batches if teaches else 1
            kept = held * (exits * taps + state * (1 + teaches))
            activations = kept + max(layers, (body.kept + 2 * state + body.working) * bool(exits))
        else:
            prefixes = self.family.prefixes(self.backbone.targets) if mode == "low_rank" else None
            layer = layer_passes(local, rows, length, prefixes, self.backbone.rank)
            flying = min(self.stages.launched - stage, self.num_micro_batches)
            per_layer, once = layer.kept, layer.working
            if self.backbone.activation_checkpointing:
                per_layer, once = state, layer.kept + layer.working
            count_layers = len(self.stages.layers(stage))
            activations = flying * (count_layers * per_layer + exits * taps + state)
            activations += exits * (body.kept + 2 * state) + 2 * state * last + max(once, body.working)
        columns = padded_vocab(self.shape.vocab_size, self.layout.tp) // self.layout.tp
        logits = 0.0
        if exits or (last and mode != "frozen"):
            trains_matrix = self.spec.head == "full" or mode == "full"
            logits = logits_bytes(
                rows * length,
                config.exits.loss_chunk_tokens,
                columns,
                size,
                pair=self.spec.head == "low_rank" and bool(exits),
                teacher=teaches,
                largest=columns * (self.shape.hidden_size if trains_matrix else self.spec.rank),
            )
        crossing = (2 if mode == "frozen" else 4) * state * (self.stages.launched > 1)
        # Activations are gone when the step is taken.
        return RankMemory(
            weights, gradients, optimizer, activations, logits, crossing + max(0.0, moment - activations - logits),
            OVERHEAD[device],
        )  # fmt: skip

    def traffic(self, *, bf16: bool) -> list[StageTraffic]:
        return [self._stage_traffic(stage, 2 if bf16 else 4) for stage in range(self.stages.launched)]

    def _stage_traffic(self, stage: int, size: int) -> StageTraffic:
        config = self.config
        state = config.train.micro_batch_size * config.data.seq_length * self.shape.hidden_size * size
        joint, last = self.backbone.mode != "frozen", stage == self.stages.launched - 1
        layers, exits = len(self.stages.layers(stage)), len(self.stages.exits(stage))
        crossing = state * ((not last) + (joint and stage > 0))
        if self.teaches and self.stages.launched > 1:
            crossing += state * last  # the teacher's states, from the last stage to all
        per_exit = self.spec.exit_kind.all_reduces(joint)
        calls = layers * (LAYER_FORWARD + LAYER_BACKWARD * joint) + exits * (per_exit + 1) + (stage == 0) + joint * last
        trained = self.parameters(stage).trained
        traffic = rank_traffic(self, crossing, calls, state, trained, size)
        copies = output_copies(self.stages, self.spec, self.shape.tied_embeddings) if self.backbone.mode == FULL else ()
        if stage not in copies:
            return traffic
        rows = padded_vocab(self.shape.vocab_size, self.layout.tp) // self.layout.tp
        return replace(traffic, stages=traffic.stages + 2 * ring(4 * rows * self.shape.hidden_size, len(copies)))


def plan_tune(config: TuneConfig, model_dir: Path, model_config: PreTrainedConfig) -> TunePlan:
    """Check the config against the model and cut it into stages. Raises `UserError`."""
    check_tune(config)
    shape, parallel, exits = shape_of(model_config), config.parallel, config.exits
    check_lengths(config, shape.max_positions, shape.num_layers)
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
        config=config,
        model_dir=model_dir,
        model_config=model_config,
        shape=shape,
        spec=spec,
        stages=stages,
        layout=Layout(parallel.tp, stages.launched, parallel.dp),
        loss_weights=resolve_loss_weights(exits.loss_weights, layers),
        num_micro_batches=check_batch(config.train.global_batch_size, config.train.micro_batch_size, parallel.dp),
    )


def exit_flops(
    spec: ExitSpec,
    shape: ModelShape,
    seq_length: int = 0,
    *,
    through: bool = False,
    trains_matrix: bool = False,
    teacher: bool = False,
    confidence: bool = False,
    pre_norm: bool = True,
) -> float:
    """Training one exit on one token.

    through: its gradient goes on into the backbone; trains_matrix: the lm_head that a tied or low-rank head reads
    trains too; teacher: the final layer's logits are computed for a KL term; confidence: one more pass of the head,
    for the weights of the tokens; pre_norm: a layer reads a normed state.
    """
    width, vocabulary = shape.hidden_size, 2 * shape.vocab_size * shape.hidden_size
    kind = spec.exit_kind
    reaches = kind.trains or through  # a gradient is wanted in front of the head
    head = vocabulary * ((2 if spec.head == "full" or trains_matrix else 1) + reaches)
    once = vocabulary
    if spec.head == "low_rank":
        down, up = 2 * spec.rank * width, 2 * spec.rank * shape.vocab_size
        head += down * (2 + reaches) + 3 * up
        once += down + up
    body = kind.training_flops(shape, seq_length, through=through, pre_norm=pre_norm)
    return body + head + vocabulary * teacher + once * confidence


def exit_passes(local: PreTrainedModel, spec: ExitSpec, rows: int, length: int, *, through: bool) -> Passes:
    """The modules of one exit in front of its head."""
    layer, call = layer_call(local, rows, length)
    kind, norm = spec.exit_kind, final_norm(local)
    body = kind.body_in(layer)
    parts = nn.ModuleList(part for part in (body, norm if kind.normed else None) if part is not None)

    def run(x: torch.Tensor) -> torch.Tensor:
        x = kind.states(body, Tap(x, x), None, lambda _, hidden: call(hidden))
        return norm(x) if kind.normed else x

    x = torch.empty(rows, length, local.config.hidden_size, dtype=local.dtype, device="meta")
    return watch(run, parts, x, needs=through)
