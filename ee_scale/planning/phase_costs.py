"""What a phase of a supernet run costs: FLOPs, parameters, memory, traffic."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from random import Random

import torch

from ee_scale.backbone.parallel import padded_vocab
from ee_scale.elastic.architecture import TensorAxes, local_length
from ee_scale.elastic.distill import FROZEN
from ee_scale.elastic.factors import FactorPlan
from ee_scale.elastic.order import UnitOrder
from ee_scale.elastic.sampling import random_member, smallest_member
from ee_scale.elastic.subnet import SearchSpace, SubnetSpec, drop_order
from ee_scale.exits.losses import chunk_tokens
from ee_scale.families.family import HEADS
from ee_scale.modeling.kinds import LAYER_BACKWARD, LAYER_FORWARD
from ee_scale.planning.estimates import (
    EMBEDDING_CALL,
    FP32,
    HEAD_CALL,
    Parameters,
    RankMemory,
    StageTraffic,
    StageWork,
    logits_bytes,
    rank_memory,
    rank_traffic,
)
from ee_scale.planning.fits import bytes_text
from ee_scale.planning.passes import layer_passes, local_model
from ee_scale.planning.phases import SupernetSetup

FEATURE_COPIES = 3  # of a layer's features in fp32, for their loss
DRAWS = 256  # subnets that the mean cost of a random one is taken over


def drawn_specs(plan: SupernetSetup, index: int) -> list[tuple[SubnetSpec, float]]:
    """(subnet, times per micro-batch) of a phase, over its steps: the full net, the smallest, and random ones."""
    axes, sampling = plan.phases[index].axes, plan.config.sampling
    every = sampling.full_every if axes else 1
    specs = [(plan.map.shape.full, 1.0 / every)] if every else []
    if axes:
        space, random = _space(plan), Random(0)
        if sampling.smallest:
            specs.append((smallest_member(space, axes, sampling), 1.0))
        if sampling.randoms:
            drawn = [random_member(space, axes, sampling, random, 0, turn) for turn in range(DRAWS)]
            specs += [(spec, sampling.randoms / DRAWS) for spec in drawn]
    return specs


def draws_per_micro_batch(plan: SupernetSetup, index: int) -> int:
    """Forward and backward passes of one micro-batch in a step of a phase, at most."""
    sampling = plan.config.sampling
    if not plan.phases[index].axes:
        return 1
    return bool(sampling.full_every) + sampling.smallest + sampling.randoms


def phase_work(plan: SupernetSetup, index: int) -> list[StageWork]:
    """Of one phase of a supernet run."""
    specs = drawn_specs(plan, index)
    teaches = bool(plan.phases[index].axes) and plan.config.distill.teacher == FROZEN
    counts = _FactorCounts(plan, index)
    return [
        _stage_work(plan, counts, specs, stage, teaches=teaches, index=index) for stage in range(plan.stages.launched)
    ]


class _FactorCounts:
    """Low-rank and whole updates of matrices that take part in a subnet: those that train, and those of earlier
    phases that are not part of the teacher (which is merged)."""

    def __init__(self, plan: SupernetSetup, index: int):
        self.map = plan.map
        first = min(plan.phases.of_teacher, index)
        self.training = plan.factors(index)
        self.earlier = [plan.factors(i) for i in range(first, index)]

    def pair(self, factors: FactorPlan, spec: SubnetSpec, module: str) -> int:
        """Multiply-adds per token of a matrix's low-rank pair."""
        sizes = self.map.shape.sizes(spec)
        tensors = [factors.tensors[module, leaf] for leaf in "AB" if (module, leaf) in factors.tensors]
        return sum(prod(tensor.cut(sizes)) for tensor in tensors)

    def matrix(self, spec: SubnetSpec, module: str) -> tuple[float, float]:
        """(forward, backward) FLOPs per token of a projection with all of its updates."""
        weight = 2 * prod(self.map.projections[module].cut(self.map.shape.sizes(spec)))
        new = 2 * self.pair(self.training, spec, module)
        old = 2 * sum(self.pair(factors, spec, module) for factors in self.earlier)
        gradients = weight  # of the input; and of the matrix, where that trains
        if (module, "weight") in self.training.tensors:
            gradients += weight
        return weight + new + old, gradients + 2 * new + old


def _stage_work(
    plan: SupernetSetup,
    counts: _FactorCounts,
    specs: Sequence[tuple[SubnetSpec, float]],
    stage: int,
    *,
    teaches: bool,
    index: int,
) -> StageWork:
    config, full = plan.config, plan.map.shape.full
    seq_length, distill = config.data.seq_length, plan.config.distill
    learns = bool(plan.phases[index].axes)
    features = min(distill.feature_dim, full.hidden) if learns and distill.feature_weight else 0
    forward = backward = head = 0.0
    for spec, times in specs:
        kept = [i for i in plan.stages.layers(stage) if i in spec.layers]
        ahead, behind = _layer_flops(plan, counts, spec, seq_length)
        project = 2 * features * spec.hidden if spec != full or teaches else 0
        forward += times * len(kept) * (ahead + project)
        backward += times * len(kept) * (behind + project)
        head += times * sum(sum(counts.matrix(spec, name)) / tokens for name, tokens in _heads(plan, seq_length))
    teacher = plan.map.layer_flops(full, seq_length) + 2 * features * full.hidden
    looked = len(plan.stages.layers(stage)) * teacher * _looks(plan) if teaches else 0.0
    # A teacher that is not kept computes its logits for every draw.
    if learns and plan.task == "causal_lm" and not plan.keeps_teacher:
        learners = sum(times for _, times in specs)
        if not teaches:
            learners -= 1  # the full net, which is the teacher
        head += learners * 2 * plan.map.config.vocab_size * full.hidden
    return StageWork(forward, backward, head if plan.stages.is_last(stage) else 0.0, looked)


def _looks(plan: SupernetSetup) -> float:
    """Share of the micro-batches that the frozen teacher looks at; labelled texts are few, and come again and again."""
    if not plan.keeps_teacher:
        return 1.0
    reads = plan.phases.total_steps * plan.config.train.global_batch_size
    return min(1.0, (plan.config.data.sequences or 0) / reads) if plan.task == "causal_lm" else 0.0


@dataclass(frozen=True)
class KeptTeacher:
    """What a rank keeps of the teacher: `token_bytes` at most for each token, of `most_tokens`."""

    token_bytes: int
    most_tokens: int
    words: str


def kept_teacher(plan: SupernetSetup, size: int) -> KeptTeacher:
    """Of the stage that keeps most, so that all keep the same texts; `size`: bytes of a number."""
    distill, data = plan.config.distill, plan.config.data
    layers = max(len(plan.stages.layers(stage)) for stage in range(plan.stages.launched))
    token_bytes = layers * min(distill.feature_dim, plan.map.shape.hidden) * size if distill.feature_weight else 0
    if plan.task == "causal_lm":
        token_bytes += (distill.cache_samples + 1) * FP32 if distill.kl_weight else 0
    else:
        token_bytes += len(plan.labels) * size  # of the whole text, which has a token at least
    most = int(distill.cache_gb * 1e9) // max(1, token_bytes)
    words = f"{bytes_text(token_bytes)} a token, {most:,} tokens at most (distill.cache_gb={distill.cache_gb:g})"
    if plan.task == "causal_lm" and data.sequences:
        words += f", of {data.sequences * data.seq_length:,}"
    return KeptTeacher(token_bytes, most, f"{words}, in the memory of each rank")


def _layer_flops(plan: SupernetSetup, counts: _FactorCounts, spec: SubnetSpec, seq: int) -> tuple[float, float]:
    attention = 4 * seq * plan.map.shape.sizes(spec)[HEADS]
    layer = [name for name, tensor in plan.map.projections.items() if tensor.layer is not None]
    pairs = [counts.matrix(spec, name) for name in layer]
    return sum(f for f, _ in pairs) + attention, sum(b for _, b in pairs) + 2 * attention


def _heads(plan: SupernetSetup, seq_length: int) -> list[tuple[str, int]]:
    """(matrix behind the last layer, tokens that share one use of it)."""
    family = plan.map.family
    return [(name, seq_length if name in family.text_heads else 1) for name in family.heads]


def _space(plan: SupernetSetup) -> SearchSpace:
    """The space as it is before the importance of layers is measured: same sizes, other layers."""
    space, shape = plan.space(UnitOrder.identity(plan.map.shape)), plan.map.shape
    drops = drop_order([0.0] * shape.num_layers, plan.parts, first_stays=shape.first_layer_stays)
    return replace(space, kept={n: tuple(sorted(drops[shape.num_layers - n :])) for n in space.depth})


def phase_parameters(plan: SupernetSetup, index: int, stage: int) -> Parameters:
    """What one rank of a stage holds and trains in phase `index`, the finished phases' factors included."""

    def mine(named: Iterable[tuple[str, TensorAxes]]) -> list[int]:
        return [_local_size(plan, tensor) for name, tensor in named if stage in _stages_of(plan, name, tensor.layer)]

    frozen = sum(mine(plan.map.matrices.items()))
    for earlier in range(index):
        tensors = plan.factors(earlier).tensors
        frozen += sum(mine((module, tensor) for (module, _), tensor in tensors.items()))
    tensors = plan.factors(index).tensors
    trained = mine((module, tensor) for (module, _), tensor in tensors.items())
    return Parameters(frozen, sum(trained), max(trained, default=0))


def _stages_of(plan: SupernetSetup, name: str, layer: int | None) -> Sequence[int]:
    if layer is not None:
        return [s for s in range(plan.stages.launched) if layer in plan.stages.layers(s)]
    return [0 if "embed" in name else plan.stages.launched - 1]


def _local_size(plan: SupernetSetup, tensor: TensorAxes) -> int:
    return prod(local_length(axis, n, plan.layout.tp) for axis, n in zip(tensor.axes, tensor.shape, strict=True))


def phase_memory(plan: SupernetSetup, index: int, stage: int, dtype: torch.dtype, device: str) -> RankMemory:
    """Of one rank of a stage in phase `index`."""
    config, size = plan.config, dtype.itemsize
    rows, length = config.train.micro_batch_size, config.data.seq_length
    tokens, hidden = rows * length, plan.map.shape.hidden
    state = tokens * hidden * size
    rank, last = plan.phases[index].rank, plan.stages.is_last(stage)
    factors = config.factors
    local = local_model(plan.map.config, plan.layout.tp, dtype, config.model.attn_implementation)
    layer = layer_passes(local, rows, length, plan.map.family.prefixes(factors.targets), rank, vectors=factors.vectors)
    layers, learns = len(plan.stages.layers(stage)), bool(plan.phases[index].axes)
    features = min(plan.config.distill.feature_dim, hidden) if learns and plan.config.distill.feature_weight else 0
    pairs = draws_per_micro_batch(plan, index) * plan.num_micro_batches
    flying = min(plan.stages.launched - stage, pairs)
    taught = 0  # features and the last hidden states of the teacher, kept for the other draws
    if learns:
        taught = plan.num_micro_batches * (layers * tokens * features * size + (state if last else 0))
    compared = FEATURE_COPIES * tokens * features * FP32
    ends = 2 * state  # what came into the stage and what goes on
    activations = flying * (layers * (layer.kept + compared) + ends) + layer.working + taught
    logits = 0.0
    if last and plan.task == "causal_lm":
        columns = padded_vocab(plan.map.config.vocab_size, plan.layout.tp) // plan.layout.tp
        chunk, trained = chunk_tokens(config.distill.loss_chunk_tokens, columns, device), columns * (rank or hidden)
        logits = logits_bytes(tokens, chunk, columns, size, pair=bool(rank), teacher=learns, largest=trained)
    crossing = 4 * state if plan.stages.launched > 1 else 0  # hidden states and gradients, received and sent
    held = (phase_parameters(plan, index, stage), plan.layout.dp, size, device)
    return rank_memory(*held, activations=activations, logits=logits, crossing=crossing)


def phase_traffic(plan: SupernetSetup, stage: int, size: int) -> StageTraffic:
    """In the last phase; `size`: bytes of a number."""
    config, index = plan.config, len(plan.phases) - 1
    last, draws = plan.stages.is_last(stage), draws_per_micro_batch(plan, index)
    specs = drawn_specs(plan, index)
    width = sum(spec.hidden * times for spec, times in specs) / sum(times for _, times in specs)
    state = config.train.micro_batch_size * config.data.seq_length * width * size
    sent = draws if stage > 0 else 0  # gradients, back
    if not last:
        sent += draws  # hidden states, on
        if draws > 1:
            sent += 1  # the teacher's, on
    layers = len(plan.stages.layers(stage))
    calls = layers * (LAYER_FORWARD + LAYER_BACKWARD)
    if stage == 0:
        calls += EMBEDDING_CALL
    if last:
        calls += HEAD_CALL
    calls = draws * calls + layers * LAYER_FORWARD  # and the teacher's
    trained = phase_parameters(plan, index, stage).trained
    return rank_traffic(plan, sent * state, calls, state, trained, size)
