"""What a phase of a supernet run costs: FLOPs, parameters, memory, traffic."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod
from random import Random

import torch

from ee_scale.backbone.parallel import padded_vocab
from ee_scale.elastic.architecture import TensorAxes, local_length
from ee_scale.elastic.distill import FROZEN
from ee_scale.elastic.factors import FactorPlan
from ee_scale.elastic.order import UnitOrder
from ee_scale.elastic.subnet import SearchSpace, SubnetSpec, drop_order
from ee_scale.families.family import HEADS
from ee_scale.modeling.kinds import LAYER_BACKWARD, LAYER_FORWARD
from ee_scale.planning.estimates import (
    OVERHEAD,
    Parameters,
    RankMemory,
    StageTraffic,
    StageWork,
    logits_bytes,
    rank_traffic,
    state_bytes,
)
from ee_scale.planning.passes import layer_passes, local_model
from ee_scale.planning.phases import SupernetSetup

DRAWS = 256  # subnets that the mean cost of a random one is taken over


def drawn_specs(plan: SupernetSetup, index: int) -> list[tuple[SubnetSpec, float]]:
    """(subnet, times per micro-batch) of a phase: the full net, the smallest, and random ones on average."""
    axes, sampling = plan.phases[index].axes, plan.config.sampling
    specs = [(plan.map.shape.full, 1.0)]
    if axes:
        space, random = _space(plan), Random(0)
        specs += [(space.smallest(axes), 1.0)] * sampling.smallest
        specs += [(space.draw(random, axes), sampling.randoms / DRAWS) for _ in range(DRAWS * (sampling.randoms > 0))]
    return specs


def draws_per_micro_batch(plan: SupernetSetup, index: int) -> int:
    """Forward and backward passes of one micro-batch in a phase."""
    sampling = plan.config.sampling
    return 1 + (sampling.smallest + sampling.randoms if plan.phases[index].axes else 0)


def phase_work(plan: SupernetSetup, index: int) -> list[StageWork]:
    """Of one phase of a supernet run."""
    specs = drawn_specs(plan, index)
    teaches = bool(plan.phases[index].axes) and plan.config.distill.teacher == FROZEN
    counts = _FactorCounts(plan, index)
    return [
        _stage_work(plan, counts, specs, stage, teaches=teaches, index=index) for stage in range(plan.stages.launched)
    ]


class _FactorCounts:
    """Low-rank and whole updates of matrices that take part in a subnet: those that train, and those of earlier recipe
    stages that are not part of the teacher (which is merged)."""

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
        whole = (module, "weight") in self.training.tensors
        return weight + new + old, weight * (1 + whole) + 2 * new + old


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
    learns, last = bool(plan.phases[index].axes), stage == plan.stages.launched - 1
    features = min(distill.feature_dim, full.hidden) if learns and distill.feature_weight else 0
    forward = backward = head = 0.0
    for spec, times in specs:
        kept = [i for i in plan.stages.layers(stage) if i in spec.layers]
        ahead, behind = _layer_flops(plan, counts, spec, seq_length)
        project = 2 * features * spec.hidden if spec != full or teaches else 0
        forward += times * len(kept) * (ahead + project)
        backward += times * len(kept) * (behind + project)
        head += times * sum(sum(counts.matrix(spec, name)) / tokens for name, tokens in _heads(plan, seq_length))
    teacher = len(plan.stages.layers(stage)) * (plan.map.layer_flops(full, seq_length) + 2 * features * full.hidden)
    if learns and plan.map.family.task == "causal_lm":  # the teacher's logits are computed anew for every draw
        learners = sum(times for _, times in specs) - (not teaches)
        head += learners * 2 * plan.map.config.vocab_size * full.hidden
    return StageWork(forward, backward, head * last, teacher * teaches)


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
    drops = drop_order([0.0] * shape.num_layers, plan.parts)
    return replace(space, kept={n: tuple(sorted(drops[shape.num_layers - n :])) for n in space.depth})


def phase_parameters(plan: SupernetSetup, index: int, stage: int) -> Parameters:
    """What one rank of a stage holds and trains in phase `index`, the finished stages' factors included."""

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
    return [0] if "embed" in name else [plan.stages.launched - 1]


def _local_size(plan: SupernetSetup, tensor: TensorAxes) -> int:
    return prod(local_length(axis, n, plan.layout.tp) for axis, n in zip(tensor.axes, tensor.shape, strict=True))


def phase_memory(plan: SupernetSetup, index: int, stage: int, dtype: torch.dtype, device: str) -> RankMemory:
    """Of one rank of a stage in phase `index`."""
    config, size = plan.config, dtype.itemsize
    rows, length = config.train.micro_batch_size, config.data.seq_length
    parameters = phase_parameters(plan, index, stage)
    weights, gradients, optimizer, moment = state_bytes(parameters, plan.layout.dp, size)
    tokens, hidden = rows * length, plan.map.shape.hidden
    state = tokens * hidden * size
    rank, last = plan.phases[index].rank, stage == plan.stages.launched - 1
    factors = config.factors
    local = local_model(plan.map.config, plan.layout.tp, dtype, config.model.attn_implementation)
    layer = layer_passes(local, rows, length, plan.map.family.prefixes(factors.targets), rank, vectors=factors.vectors)
    layers, learns = len(plan.stages.layers(stage)), bool(plan.phases[index].axes)
    features = min(plan.config.distill.feature_dim, hidden) if learns and plan.config.distill.feature_weight else 0
    pairs = draws_per_micro_batch(plan, index) * plan.num_micro_batches
    flying = min(plan.stages.launched - stage, pairs)
    taught = plan.num_micro_batches * learns * (tokens * size * features * layers + state * last)
    activations = flying * (layers * (layer.kept + 3 * tokens * features * 4) + 2 * state) + layer.working + taught
    logits = 0.0
    if last and plan.task == "causal_lm":
        columns = padded_vocab(plan.map.config.vocab_size, plan.layout.tp) // plan.layout.tp
        trains = rank or hidden
        logits = logits_bytes(
            tokens, plan.config.distill.loss_chunk_tokens, columns, size, pair=bool(rank), teacher=learns,
            largest=columns * trains,
        )  # fmt: skip
    crossing = 4 * state * (plan.stages.launched > 1)
    return RankMemory(
        weights, gradients, optimizer, activations, logits, crossing + max(0.0, moment - activations - logits),
        OVERHEAD[device],
    )  # fmt: skip


def phase_traffic(plan: SupernetSetup, stage: int, size: int) -> StageTraffic:
    """In the last phase; `size`: bytes of a number."""
    config, index = plan.config, len(plan.phases) - 1
    last, draws = stage == plan.stages.launched - 1, draws_per_micro_batch(plan, index)
    width = sum(spec.hidden * times for spec, times in drawn_specs(plan, index)) / draws
    state = config.train.micro_batch_size * config.data.seq_length * width * size
    crossing = state * (draws * ((not last) + (stage > 0)) + (draws > 1) * (not last))
    layers = len(plan.stages.layers(stage))
    calls = draws * (layers * (LAYER_FORWARD + LAYER_BACKWARD) + (stage == 0) + last) + layers * LAYER_FORWARD
    trained = phase_parameters(plan, index, stage).trained
    return rank_traffic(plan, crossing, calls, state, trained, size)
