"""Everything about a supernet run that follows from config, model and data, decided before any process starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from ee_scale.backbone.stages import plan_stages
from ee_scale.config.checks import check_batch, check_supernet
from ee_scale.config.supernet import SupernetConfig
from ee_scale.elastic.architecture import ElasticMap
from ee_scale.elastic.order import DIVERGENCE, INFLUENCE, UnitOrder
from ee_scale.elastic.sampling import shipped_members
from ee_scale.elastic.subnet import AXES, SearchSpace
from ee_scale.errors import UserError
from ee_scale.families.registry import elastic_family
from ee_scale.grid import Layout
from ee_scale.planning.estimates import (
    BF16,
    FP32,
    Parameters,
    RankMemory,
    StageTraffic,
    StageWork,
    check_lengths,
    filled_pipe,
    mean_work,
)
from ee_scale.planning.fits import is_bf16
from ee_scale.planning.loss import check_loss_kernel
from ee_scale.planning.phase_costs import (
    draws_per_micro_batch,
    kept_teacher,
    phase_memory,
    phase_parameters,
    phase_traffic,
    phase_work,
)
from ee_scale.planning.phases import Phases, SupernetSetup


@dataclass(frozen=True)
class SupernetPlan(SupernetSetup):
    """What runs where, and what it costs."""

    def with_config(self, config: SupernetConfig) -> "SupernetPlan":
        return plan_supernet(config, self.model_dir, self.model_config, self.labels)

    @property
    def total_steps(self) -> int:
        return self.phases.total_steps

    def work(self) -> list[StageWork]:
        shares = [phase.steps / self.total_steps for phase in self.phases]
        rows = zip(*(phase_work(self, index) for index in range(len(self.phases))), strict=True)
        return [mean_work(shares, row) for row in rows]

    def phase_flops(self, index: int) -> float:
        """FLOPs per token of a whole replica in one phase."""
        return sum(work.total for work in phase_work(self, index))

    def parameters(self, stage: int) -> Parameters:
        return phase_parameters(self, len(self.phases) - 1, stage)

    def memory(self, *, bf16: bool, device: str = "cuda") -> list[RankMemory]:
        dtype, phases = torch.bfloat16 if bf16 else torch.float32, range(len(self.phases))
        return [
            max((phase_memory(self, index, stage, dtype, device) for index in phases), key=lambda memory: memory.total)
            for stage in range(self.stages.launched)
        ]

    def traffic(self, *, bf16: bool) -> list[StageTraffic]:
        return [phase_traffic(self, stage, BF16 if bf16 else FP32) for stage in range(self.stages.launched)]

    def notes(self) -> Mapping[str, str]:
        if not self.keeps_teacher:
            return {}
        return {"teacher": f"kept: {kept_teacher(self, BF16 if is_bf16(self.config) else FP32).words}"}

    def bubble(self) -> tuple[float, str]:
        p, m = self.layout.pp, self.num_micro_batches * draws_per_micro_batch(self, len(self.phases) - 1)
        if p == 1:
            return 0.0, "one stage"
        return filled_pipe(p, m)


def task_of(config: SupernetConfig, model_config: PreTrainedConfig) -> str:
    """The task of a run: as given, or by architecture. Raises `UserError`, also for an architecture of another task."""
    return elastic_family(model_config, config.task).task


def plan_supernet(
    config: SupernetConfig, model_dir: Path, model_config: PreTrainedConfig, labels: Sequence[str] = ()
) -> SupernetPlan:
    """Check the config against model and data. Raises `UserError`."""
    check_supernet(config)
    check_loss_kernel(config)
    task, parallel = task_of(config, model_config), config.parallel
    if labels:
        model_config.num_labels = len(labels)
        model_config.id2label = dict(enumerate(labels))
        model_config.label2id = {label: i for i, label in enumerate(labels)}
        model_config.problem_type = "single_label_classification"
    elastic_map = ElasticMap(model_config, task)
    shape = elastic_map.shape
    check_lengths(config, model_config)
    heads = "num_key_value_heads" if hasattr(model_config, "num_key_value_heads") else "num_attention_heads"
    for name, size in ((heads, shape.groups), ("intermediate_size", shape.ffn)):
        if size % parallel.tp:
            raise UserError(f"parallel.tp={parallel.tp} does not divide {name}={size} of the model")
    parts = parallel.pp if config.space.depth_parts is None else config.space.depth_parts
    if not 1 <= parts <= shape.num_layers:
        raise UserError(f"space.depth_parts={parts}: give 1 to {shape.num_layers}, the model's layers")
    plan = SupernetPlan(
        config=config,
        model_dir=model_dir,
        map=elastic_map,
        labels=tuple(labels),
        phases=Phases(config.stages),
        stages=plan_stages(shape.num_layers, parallel.pp, [shape.num_layers], given=parallel.stages, whole_model=True),
        layout=Layout(parallel.tp, parallel.pp, parallel.dp),
        parts=parts,
        num_micro_batches=check_batch(config.train.global_batch_size, config.train.micro_batch_size, parallel.dp),
    )
    space = plan.space(UnitOrder.identity(shape))
    _check_axes(plan, space)
    if plan.layers_by == DIVERGENCE and task == "classify":
        raise UserError(
            f"importance.layers={DIVERGENCE} with task=classify: a new head has no distribution to diverge from; "
            f"importance.layers={INFLUENCE}"
        )
    _check_cache(plan)
    return plan


def _check_axes(plan: SupernetPlan, space: SearchSpace) -> None:
    for phase in plan.phases:
        if unknown := [axis for axis in phase.axes if axis not in AXES]:
            raise UserError(f"stages: '{phase.name}' has axes={unknown}; known: {', '.join(AXES)}")
        if phase.axes and all(spec == plan.map.shape.full for spec in islice(space.members(phase.axes), 2)):
            raise UserError(
                f"stages: nothing can shrink in '{phase.name}': space.* has the full size alone for {phase.axes}"
            )
        drawn = plan.config.sampling.palette_share if space.palette else 0.0
        if phase.axes and drawn and not shipped_members(space, phase.axes):
            raise UserError(
                f"stages: nothing of space.palette can shrink in '{phase.name}' (axes={phase.axes}); leave the stage "
                "out, or sampling.palette_share=0"
            )


def _check_cache(plan: SupernetPlan) -> None:
    """A cache is for texts that come again."""
    reads, sequences = plan.total_steps * plan.config.train.global_batch_size, plan.config.data.sequences
    if plan.config.distill.cache and plan.task == "causal_lm" and (sequences or reads) >= reads:
        raise UserError(
            f"distill.cache=true with data.sequences={'null' if sequences is None else sequences}: none of the "
            f"{reads:,} sequences that the run reads would come again; give fewer data.sequences"
        )


def phase_rows(plan: SupernetPlan) -> list[tuple[str, ...]]:
    """The table of the phases: name, what may shrink, steps, rank, trained parameters of full and smallest net."""
    space, full = plan.space(UnitOrder.identity(plan.map.shape)), plan.map.shape.full
    rows: list[tuple[str, ...]] = []
    for index, phase in enumerate(plan.phases):
        factors = plan.factors(index)
        smallest = space.smallest(phase.axes)
        rows.append(
            (
                phase.name,
                ", ".join(phase.axes) or "nothing",
                str(phase.steps),
                str(phase.rank) if phase.rank else "whole",
                f"{factors.parameters(full):,}",
                f"{plan.map.parameters(smallest):,} of {plan.map.parameters(full):,}",
            )
        )
    return rows
