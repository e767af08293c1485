"""Everything about a tune run that follows from config and model, decided once and before any process starts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ee_scale.backbone.exit_layers import resolve_exit_layers
from ee_scale.backbone.parallel import padded_vocab
from ee_scale.backbone.proof import check_tensor_proof
from ee_scale.backbone.shard import tensor_plan
from ee_scale.backbone.stages import StagePlan, plan_stages
from ee_scale.config.checks import check_batch, check_tune
from ee_scale.config.tune import BackboneConfig, TuneConfig
from ee_scale.errors import UserError
from ee_scale.exits.joint import FROZEN, FULL, LOW_RANK, output_copies
from ee_scale.exits.losses import LEAST_CHUNK, chunk_tokens
from ee_scale.exits.placement import check_experts, exit_cost, exit_spec, resolve_loss_weights
from ee_scale.families.family import Family
from ee_scale.families.registry import decoder_family
from ee_scale.families.sizes import ModelShape, shape_of
from ee_scale.grid import Layout
from ee_scale.modeling.heads import ExitSpec
from ee_scale.modeling.kinds import LAYER_FORWARD, attention_flops
from ee_scale.planning.cuts import input_gradients, joined
from ee_scale.planning.estimates import (
    BF16,
    EMBEDDING_CALL,
    FP32,
    HEAD_CALL,
    Parameters,
    Plan,
    RankMemory,
    StageTraffic,
    StageWork,
    all_reduce,
    check_lengths,
    filled_pipe,
    logits_bytes,
    rank_memory,
    rank_traffic,
)
from ee_scale.planning.exit_costs import exit_flops, exit_passes
from ee_scale.planning.loss import check_loss_kernel
from ee_scale.planning.passes import add_pairs, count, layer_passes, local_layers, local_model
from ee_scale.planning.taps import KeptTaps

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
        smaller = {} if self.config.exits.loss_chunk_tokens else {"exits.loss_chunk_tokens": LEAST_CHUNK}
        return smaller | ({"backbone.activation_checkpointing": True} if self.backbone.trains else {})

    def bubble(self) -> tuple[float, str]:
        p, m = self.layout.pp, self.num_micro_batches
        if p == 1:
            return 0.0, "one stage"
        if self.backbone.trains:
            return filled_pipe(p, m)
        if not self.teaches:
            return 0.0, "nothing flows backwards: stages run ahead into the next step"
        return (p - 1) / (m + p - 1), "(p-1)/(m+p-1): exits wait for the final layer"

    @property
    def kept_taps(self) -> KeptTaps | None:
        """What is kept on disk of what exits read, if that is wanted."""
        return KeptTaps.of(self.config, self.spec, self.shape.hidden_size) if self.config.data.cache_taps else None

    @property
    def own_text_tokens(self) -> int:
        """What the model writes before the run; 0: nothing."""
        data = self.config.data
        samples = self.config.train.steps * self.config.train.global_batch_size
        read = ceil(data.own_text * min(data.sequences or samples, samples) * data.seq_length)
        return (data.own_text_tokens or read) if data.own_text else 0

    def notes(self) -> Mapping[str, str]:
        told = {}
        if self.own_text_tokens:
            told["own text"] = f"{self.own_text_tokens:,} tokens, written first by the whole model on one device"
        if self.kept_taps is not None:
            told["taps"] = self.kept_taps.words(self.config.data.cache_dir)
        return told

    @property
    def teaches(self) -> bool:
        """Whether exits learn from the final layer."""
        return self.config.exits.kl_weight > 0

    @property
    def family(self) -> Family:
        return decoder_family(self.model_config)

    def work(self) -> list[StageWork]:
        shape, seq_length, stages = self.shape, self.config.data.seq_length, self.stages
        joint, full = self.backbone.trains, self.backbone.mode == FULL
        per_exit = exit_flops(
            self.spec,
            shape,
            seq_length,
            through=joint,
            trains_matrix=full,
            teacher=self.teaches,
            confidence=self.config.exits.confidence_weighting,
            pre_norm=self.family.mlp_input_norm is not None,
        )
        attention, adapters = attention_flops(shape, seq_length), 2 * self._adapter_parameters
        vocabulary = 2 * shape.vocab_size * shape.hidden_size
        forward = [2 * shape.active(layer) + attention + adapters for layer in range(shape.num_layers)]
        backward, own_loss = 0.0, 0
        if joint:
            gradients = 2 if full else 1  # of a matrix's input; and of the matrix
            backward = gradients * 2 * shape.layer_parameters + 2 * attention + 2 * adapters
            own_loss = (1 + gradients) * vocabulary
            if self.backbone.activation_checkpointing:
                backward += forward[0]  # no experts here: all layers are alike
        return [
            StageWork(
                forward=sum(forward[layer] for layer in stages.layers(stage)),
                backward=backward * len(stages.layers(stage)),
                exits=per_exit * len(stages.exits(stage)) + (own_loss if stages.is_last(stage) else 0),
            )
            for stage in range(stages.launched)
        ]

    @property
    def _adapter_parameters(self) -> int:
        """Of the low-rank adapters of one layer."""
        if self.backbone.mode != LOW_RANK:
            return 0
        shape, backbone = self.shape, self.backbone
        width, q, kv = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        ends = {"attention": 2 * (width + q) + 2 * (width + kv), "mlp": 3 * (width + shape.intermediate_size)}
        return backbone.rank * sum(ends[target] for target in backbone.targets)

    @property
    def _vocabulary_rows(self) -> int:
        """Of one tensor rank, padding included."""
        return padded_vocab(self.shape.vocab_size, self.layout.tp) // self.layout.tp

    @property
    def _scored_rows(self) -> int:
        """The same for the tokens that an exit scores."""
        return padded_vocab(self.spec.scored(self.shape.vocab_size), self.layout.tp) // self.layout.tp

    def parameters(self, stage: int) -> Parameters:
        modules, norm = local_layers(self.model_config, self.layout.tp, self.shape)
        mine, kind, spec = self.stages.layers(stage), self.spec.exit_kind, self.spec
        mode, last = self.backbone.mode, self.stages.is_last(stage)
        layers, exits = len(mine), len(self.stages.exits(stage))
        width, rows = self.shape.hidden_size, self._vocabulary_rows
        vocabulary = rows * width
        own_loss = last and self.backbone.trains
        few = bool(spec.shortlist) and not own_loss  # a teacher of shortlist heads has the rows of their tokens only
        reads_head = own_loss or (exits > 0 and (spec.reads_lm_head or self.teaches))
        backbone = sum(count(modules[layer]) for layer in mine)
        if stage == 0:
            backbone += vocabulary
        if reads_head and few:
            backbone += self._scored_rows * width
        elif reads_head and not (stage == 0 and self.shape.tied_embeddings):  # where one matrix serves both ends
            backbone += vocabulary
        if own_loss or (last and self.teaches):
            backbone += count(norm)
        bodies = [kind.body_source(modules, k) for k in self.stages.exits(stage)]
        own_norm = count(norm) if kind.normed else 0
        head = [prod(shape) for shape in spec.head_shapes(width, self._scored_rows).values()]
        trained, biggest = sum(map(count, bodies)) + exits * (own_norm + sum(head)), [0]
        if exits:
            biggest += [own_norm, *head]
            biggest += [p.numel() for body in bodies if body is not None for p in body.parameters()]
        if mode == LOW_RANK:
            prefixes = self.family.prefixes(self.backbone.targets)
            adapted = add_pairs(modules[0], self.backbone.rank, prefixes)
            trained += layers * count(adapted)
            biggest += [p.numel() for p in adapted.parameters()]
        if mode == FULL:
            biggest += [p.numel() for p in modules[0].parameters()]
            if stage == 0 or reads_head:
                biggest.append(vocabulary)
            return Parameters(0, backbone + trained, max(biggest))
        idle = sum(map(self.shape.idle, mine)) // self.layout.tp
        return Parameters(backbone, trained, max(biggest), idle)

    def memory(self, *, bf16: bool, device: str = "cuda") -> list[RankMemory]:
        dtype = torch.bfloat16 if bf16 else torch.float32
        return [self._stage_memory(stage, dtype, device) for stage in range(self.stages.launched)]

    def _stage_memory(self, stage: int, dtype: torch.dtype, device: str) -> RankMemory:
        size, crossing = dtype.itemsize, 0
        if self.stages.launched > 1:  # hidden states, and gradients where they cross, received and sent
            crossing = (4 if self.backbone.trains else 2) * self._state_bytes(size)
        activations, logits = self._activations(stage, dtype), self._logits(stage, size, device)
        held = (self.parameters(stage), self.layout.dp, size, device)
        return rank_memory(*held, activations=activations, logits=logits, crossing=crossing)

    def _state_bytes(self, size: int) -> int:
        """Of the hidden states of one micro-batch."""
        return self.config.train.micro_batch_size * self.config.data.seq_length * self.shape.hidden_size * size

    def _activations(self, stage: int, dtype: torch.dtype) -> int:
        config, backbone = self.config, self.backbone
        rows, length = config.train.micro_batch_size, config.data.seq_length
        layers, exits = len(self.stages.layers(stage)), len(self.stages.exits(stage))
        local = local_model(self.model_config, self.layout.tp, dtype, config.model.attn_implementation)
        state = self._state_bytes(dtype.itemsize)
        body = exit_passes(local, self.spec, rows, length, through=backbone.trains)
        exit_kept = body.kept + 2 * state  # the hidden states that its head reads, and their gradients
        taps = exits * self.spec.exit_kind.states_read * state
        if not backbone.trains:
            running = layer_passes(local, rows, length, (), 0).forward
            # Exits that wait for the final layer wait for all of the step's micro-batches.
            held = self.num_micro_batches * (taps + 2 * state) if self.teaches else taps + state
            return held + max(running, exit_kept + body.working if exits else 0)
        prefixes = self.family.prefixes(backbone.targets) if backbone.mode == LOW_RANK else None
        layer = layer_passes(local, rows, length, prefixes, backbone.rank)
        per_layer, once = layer.kept, layer.working
        if backbone.activation_checkpointing:
            per_layer, once = state, layer.kept + layer.working
        flying = min(self.stages.launched - stage, self.num_micro_batches)
        kept = flying * (layers * per_layer + taps + state) + exits * exit_kept
        if self.stages.is_last(stage):
            kept += 2 * state
        return kept + max(once, body.working)

    def _logits(self, stage: int, size: int, device: str) -> float:
        config, exits = self.config, len(self.stages.exits(stage))
        own_loss = self.backbone.trains and self.stages.is_last(stage)
        if not exits and not own_loss:
            return 0.0
        rows = self._vocabulary_rows if own_loss else self._scored_rows
        trains_matrix = self.spec.owns_matrix or self.backbone.mode == FULL
        return logits_bytes(
            config.train.micro_batch_size * config.data.seq_length,
            chunk_tokens(config.exits.loss_chunk_tokens, rows, device),
            rows,
            size,
            pair=self.spec.head == "low_rank" and exits > 0,
            teacher=self.teaches,
            largest=rows * (self.shape.hidden_size if trains_matrix else self.spec.rank),
        )

    def traffic(self, *, bf16: bool) -> list[StageTraffic]:
        return [self._stage_traffic(stage, BF16 if bf16 else FP32) for stage in range(self.stages.launched)]

    def _stage_traffic(self, stage: int, size: int) -> StageTraffic:
        state, joint = self._state_bytes(size), self.backbone.trains
        first, last = stage == 0, self.stages.is_last(stage)
        sent = (not last) + (joint and not first)  # hidden states, on; their gradients, back
        sent += last and self.teaches and self.stages.launched > 1  # the teacher's states, from the last stage to all
        # Beside its experts a layer sums what its shared one gives.
        shared = self.shape.experts is not None and self.shape.experts.shared > 0
        modules, _ = local_layers(self.model_config, self.layout.tp, self.shape)
        back = input_gradients(modules[0], tensor_plan(self.model_config, self.layout.tp))
        per_layer = LAYER_FORWARD + shared + (back if joint else 0)
        per_exit = self.spec.exit_kind.all_reduces(joint) + HEAD_CALL
        calls = len(self.stages.layers(stage)) * per_layer + len(self.stages.exits(stage)) * per_exit
        if first:
            calls += EMBEDDING_CALL
        if last and joint:
            calls += HEAD_CALL
        layers = [(modules[layer], joint) for layer in self.stages.layers(stage)]
        exits = [(self.spec.exit_kind.body_source(modules, k), True) for k in self.stages.exits(stage)]
        gathers, width = joined([*layers, *exits])
        trained, tokens = self.parameters(stage).trained, state // self.shape.hidden_size  # of a number each, bytes
        traffic = rank_traffic(self, sent * state, calls, state, trained, size, (gathers, width * tokens))
        copies = output_copies(self.stages, self.spec, self.shape.tied_embeddings) if self.backbone.mode == FULL else ()
        if stage not in copies:
            return traffic
        gradient = FP32 * self._vocabulary_rows * self.shape.hidden_size
        return replace(traffic, stages=traffic.stages + all_reduce(gradient, len(copies)))


def plan_tune(config: TuneConfig, model_dir: Path, model_config: PreTrainedConfig) -> TunePlan:
    """Check the config against the model and cut it into stages. Raises `UserError`."""
    check_tune(config)
    check_loss_kernel(config)
    shape, parallel, exits, backbone = shape_of(model_config), config.parallel, config.exits, config.backbone
    check_lengths(config, model_config)
    tensor_plan(model_config, parallel.tp)
    check_tensor_proof(model_config, parallel.tp)
    layers = resolve_exit_layers(exits.layers, shape.num_layers, parallel.pp, parallel.stages)
    check_experts(model_config, exits.kind, backbone.mode)
    spec = exit_spec(model_config, layers, exits.kind, exits.head, exits.rank, exits.shortlist)
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
    if config.train.held_out and stages.launched > 1:
        raise UserError(f"train.held_out: parallel.pp={parallel.pp} launches {stages.launched} stages, it needs one")
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
