"""FLOPs of a run, stage by stage, as the run really computes them. Arithmetic only.

2 per multiply-add of a projection; attention is counted as the full square, 4 x S x width per token (PaLM's convention,
arXiv 2204.02311, appendix B); norms, activations and the optimizer are left out. Frozen matrices have no weight
gradient, and what nothing trained lies in front of has no input gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from random import Random

from ee_scale.backbone.families import ModelShape, family_of
from ee_scale.config.schema import TrainingConfig, TuneConfig
from ee_scale.elastic.architecture import HEADS
from ee_scale.elastic.distill import FROZEN
from ee_scale.elastic.factors import FactorPlan
from ee_scale.elastic.order import UnitOrder
from ee_scale.elastic.subnet import SearchSpace, SubnetSpec, drop_order
from ee_scale.exits.heads import ExitSpec
from ee_scale.training.plan import TunePlan
from ee_scale.training.supernet_plan import SupernetPlan

DRAWS = 256  # subnets that the mean cost of a random one is taken over


@dataclass(frozen=True)
class StageWork:
    """FLOPs per token of one stage of one replica, summed over its tensor ranks.

    Attributes:
        forward, backward: of the layers; of a supernet: of all draws together.
        exits: forward and backward of what has a loss: exits, and the model's own head where it learns.
        teacher: forward of a frozen teacher.
    """

    forward: float
    backward: float = 0.0
    exits: float = 0.0
    teacher: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.exits + self.teacher


def flops_per_token(
    plan: TunePlan | SupernetPlan, config: TrainingConfig | None = None, recipe_stage: int | None = None
) -> list[float]:
    """FLOPs per token, forward and backward, of each launched stage: one replica, summed over its tensor ranks.

    config: of a tune run, for its sequence length and its losses (None: without attention and teacher).
    recipe_stage: of a supernet; None: the mean over the recipe's steps.
    """
    return [work.total for work in stage_work(plan, config, recipe_stage)]


def stage_work(
    plan: TunePlan | SupernetPlan, config: TrainingConfig | None = None, recipe_stage: int | None = None
) -> list[StageWork]:
    """The same, by kind of work."""
    if isinstance(plan, TunePlan):
        return tune_work(plan, config)
    if recipe_stage is not None:
        return supernet_work(plan, recipe_stage)
    steps = [stage.steps / plan.recipe.total_steps for stage in plan.recipe.stages]
    rows = zip(*(supernet_work(plan, index) for index in range(len(steps))), strict=True)
    return [
        StageWork(*(sum(s * getattr(w, name) for s, w in zip(steps, row, strict=True)) for name in _FIELDS))
        for row in rows
    ]


_FIELDS = ("forward", "backward", "exits", "teacher")


# -- exits -------------------------------------------------------------------------------------------------------------


def attention_flops(shape: ModelShape, seq_length: int) -> float:
    """Scores and weighted values of one layer, forward, per token."""
    return 4 * seq_length * shape.num_heads * shape.head_dim


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
    body = 0.0
    if spec.kind == "mlp":
        matrix = 2 * width * shape.intermediate_size
        body = 2 * matrix * (2 + through) + 3 * matrix  # gate and up read what is frozen, down does not
    elif spec.kind == "layer":
        attention = 2 * width * shape.head_dim * (shape.num_heads + 2 * shape.num_kv_heads)  # q, k, v
        body = 3 * (2 * shape.layer_parameters + attention_flops(shape, seq_length))
        body -= attention * (not pre_norm and not through)
    reaches = spec.kind != "embedding" or through  # a gradient is wanted in front of the head
    head = vocabulary * ((2 if spec.head == "full" or trains_matrix else 1) + reaches)
    once = vocabulary
    if spec.head == "low_rank":
        down, up = 2 * spec.rank * width, 2 * spec.rank * shape.vocab_size
        head += down * (2 + reaches) + 3 * up
        once += down + up
    return body + head + vocabulary * teacher + once * confidence


def adapter_parameters(plan: TunePlan) -> int:
    """Parameters of the low-rank adapters of one layer."""
    if plan.backbone.mode != "low_rank":
        return 0
    shape, backbone = plan.shape, plan.backbone
    width, q, kv = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    ends = {"attention": 2 * (width + q) + 2 * (width + kv), "mlp": 3 * (width + shape.intermediate_size)}
    return backbone.rank * sum(ends[target] for target in backbone.targets)


def tune_work(plan: TunePlan, config: TuneConfig | None = None) -> list[StageWork]:
    """Of a run on exits, the backbone frozen or not."""
    shape, mode = plan.shape, plan.backbone.mode
    seq_length = 0 if config is None else config.data.seq_length
    joint = mode != "frozen"
    per_exit = exit_flops(
        plan.spec,
        shape,
        seq_length,
        through=joint,
        trains_matrix=mode == "full",
        teacher=config is not None and config.exits.kl_weight > 0,
        confidence=config is not None and config.exits.confidence_weighting,
        pre_norm=family_of(plan.model_config).mlp_input_norm is not None,
    )
    layer, attention = 2 * shape.layer_parameters, attention_flops(shape, seq_length)
    adapters = 2 * adapter_parameters(plan)
    forward, backward = layer + attention + adapters, 0.0
    if joint:
        backward = layer * (2 if mode == "full" else 1) + 2 * attention + 2 * adapters
        backward += forward * plan.backbone.activation_checkpointing
    vocabulary = 2 * shape.vocab_size * shape.hidden_size
    final = vocabulary * (3 if mode == "full" else 2) * joint
    last = plan.stages.launched - 1
    return [
        StageWork(
            forward=forward * len(plan.stages.layers(stage)),
            backward=backward * len(plan.stages.layers(stage)),
            exits=per_exit * len(plan.stages.exits(stage)) + final * (stage == last),
        )
        for stage in range(plan.stages.launched)
    ]


# -- supernets ---------------------------------------------------------------------------------------------------------


def drawn_specs(plan: SupernetPlan, index: int) -> list[tuple[SubnetSpec, float]]:
    """(subnet, times per micro-batch) of a recipe stage: the full net, the smallest, and random ones on average."""
    axes, sampling = plan.recipe.stages[index].axes, plan.config.sampling
    specs = [(plan.map.shape.full, 1.0)]
    if axes:
        space, random = _space(plan), Random(0)
        specs += [(space.smallest(axes), 1.0)] * sampling.smallest
        specs += [(space.draw(random, axes), sampling.randoms / DRAWS) for _ in range(DRAWS * (sampling.randoms > 0))]
    return specs


def draws_per_micro_batch(plan: SupernetPlan, index: int) -> int:
    """Forward and backward passes of one micro-batch in a recipe stage."""
    sampling = plan.config.sampling
    return 1 + (sampling.smallest + sampling.randoms if plan.recipe.stages[index].axes else 0)


def supernet_work(plan: SupernetPlan, index: int) -> list[StageWork]:
    """Of one recipe stage of a supernet run."""
    specs = drawn_specs(plan, index)
    teaches = bool(plan.recipe.stages[index].axes) and plan.config.distill.teacher == FROZEN
    counts = _FactorCounts(plan, index)
    return [
        _supernet_stage(plan, counts, specs, stage, teaches=teaches, index=index)
        for stage in range(plan.stages.launched)
    ]


class _FactorCounts:
    """Low-rank and whole updates of matrices that take part in a subnet: those that train, and those of earlier recipe
    stages that are not part of the teacher (which is merged)."""

    def __init__(self, plan: SupernetPlan, index: int):
        self.map = plan.map
        first = min(plan.recipe.teacher_stages, index)
        self.training = plan.factors(index)
        self.earlier = [plan.factors(i) for i in range(first, index)]

    def pair(self, factors: FactorPlan, spec: SubnetSpec, module: str) -> int:
        """Multiply-adds per token of a matrix's low-rank pair."""
        sizes = self.map.shape.sizes(spec)
        tensors = [factors.tensors[module, leaf] for leaf in "AB" if (module, leaf) in factors.tensors]
        return sum(prod(sizes.get(axis, n) for axis, n in zip(t.axes, t.shape, strict=True)) for t in tensors)

    def matrix(self, spec: SubnetSpec, module: str) -> tuple[float, float]:
        """(forward, backward) FLOPs per token of a projection with all of its updates."""
        out, inner = self.map.describe(f"{module}.weight", self.map.full_shape(f"{module}.weight")).axes
        sizes, shape = self.map.shape.sizes(spec), self.map.full_shape(f"{module}.weight")
        weight = 2 * sizes.get(out, shape[0]) * sizes.get(inner, shape[1])
        new = 2 * self.pair(self.training, spec, module)
        old = 2 * sum(self.pair(factors, spec, module) for factors in self.earlier)
        whole = (module, "weight") in self.training.tensors
        return weight + new + old, weight * (1 + whole) + 2 * new + old


def _supernet_stage(
    plan: SupernetPlan,
    counts: _FactorCounts,
    specs: Sequence[tuple[SubnetSpec, float]],
    stage: int,
    *,
    teaches: bool,
    index: int,
) -> StageWork:
    config, full = plan.config, plan.map.shape.full
    seq_length, distill = config.data.seq_length, plan.config.distill
    learns, last = bool(plan.recipe.stages[index].axes), stage == plan.stages.launched - 1
    features = min(distill.feature_dim, full.hidden) if learns and distill.feature_weight else 0
    forward = backward = head = 0.0
    for spec, times in specs:
        kept = [i for i in plan.stages.layers(stage) if i in spec.layers]
        ahead, behind = _layer_flops(plan, counts, spec, seq_length)
        project = 2 * features * spec.hidden if spec != full or teaches else 0
        forward += times * len(kept) * (ahead + project)
        backward += times * len(kept) * (behind + project)
        head += times * sum(sum(counts.matrix(spec, name)) / tokens for name, tokens in _heads(plan, seq_length))
    teacher = len(plan.stages.layers(stage)) * (_frozen_layer(plan, seq_length) + 2 * features * full.hidden)
    if learns and plan.map.architecture.task == "causal_lm":  # the teacher's logits are computed anew for every draw
        learners = sum(times for _, times in specs) - (not teaches)
        head += learners * 2 * config_vocab(plan) * full.hidden
    return StageWork(forward, backward, head * last, teacher * teaches)


def config_vocab(plan: SupernetPlan) -> int:
    """Size of the vocabulary."""
    return plan.map.config.vocab_size


def _layer_flops(plan: SupernetPlan, counts: _FactorCounts, spec: SubnetSpec, seq: int) -> tuple[float, float]:
    attention = 4 * seq * plan.map.shape.sizes(spec)[HEADS]
    pairs = [counts.matrix(spec, name) for name in _layer_matrices(plan)]
    return sum(f for f, _ in pairs) + attention, sum(b for _, b in pairs) + 2 * attention


def _frozen_layer(plan: SupernetPlan, seq: int) -> float:
    """One layer of the merged teacher."""
    shapes = [plan.map.full_shape(f"{name}.weight") for name in _layer_matrices(plan)]
    return 2 * sum(map(prod, shapes)) + 4 * seq * plan.map.shape.sizes(plan.map.shape.full)[HEADS]


def _layer_matrices(plan: SupernetPlan) -> list[str]:
    """Projections of the first layer, which stands for all."""
    axes = plan.map.architecture.axes
    return [name.replace("*", "0") for name, (_, *rest) in axes.items() if rest and ".*." in name]


def _heads(plan: SupernetPlan, seq_length: int) -> list[tuple[str, int]]:
    """(matrix behind the last layer, tokens that share one use of it)."""
    if plan.map.architecture.task == "causal_lm":
        return [("lm_head", 1)]
    return [("bert.pooler.dense", seq_length), ("classifier", seq_length)]


def _space(plan: SupernetPlan) -> SearchSpace:
    """The space as it is before the importance of layers is measured: same sizes, other layers."""
    space, shape = plan.space(UnitOrder.identity(plan.map.shape)), plan.map.shape
    drops = drop_order([0.0] * shape.num_layers, plan.parts)
    return replace(space, kept={n: tuple(sorted(drops[shape.num_layers - n :])) for n in space.depth})
