"""The recipe `tune`: exits on a backbone that is frozen, adapted, or trained with them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.backbone.shard import model_tensors
from ee_scale.config.tune import TuneConfig
from ee_scale.data.builtin import training_model
from ee_scale.data.epochs import Epochs
from ee_scale.data.frequent import FrequentTokens, frequent_tokens
from ee_scale.data.inputs import check_run_text, run_dataset
from ee_scale.data.loader import batches
from ee_scale.engine.clipping import ALL, TOGETHER
from ee_scale.engine.frozen import FrozenPipelineEngine
from ee_scale.engine.joint import FINAL, JointPipelineEngine
from ee_scale.exits.joint import FULL, JointStage, output_copies
from ee_scale.exits.stage import TuningStage, build_stage, gather_whole, load_stage, local_slice
from ee_scale.exits.taps import TapCache, TapStep
from ee_scale.grid import Grid
from ee_scale.log import log
from ee_scale.planning.estimates import uses_bf16
from ee_scale.planning.tune import TunePlan, plan_tune
from ee_scale.training.held_out import HeldOut, held_out_prefixes, open_held_out
from ee_scale.training.metrics import MetricsStream
from ee_scale.training.own_text import prepare_own_text
from ee_scale.training.recipe import Recipe, Run, SavedPart, Step, Words, check_frozen
from ee_scale.training.schedules import LearningRate, loss_weights_at
from ee_scale.training.taps import open_taps, prepare_taps


class Tune(Recipe[TuneConfig, TunePlan]):
    """Train exits."""

    verb, next_verb, keyed_by = "tune", "export", "exit"
    identity = ("exits", "backbone", "data", "optim", "train.global_batch_size", "train.seed")
    # Known where the run was prepared: the folder of its taps, the prefix of the text that the model has written.
    taps_folder: Path | None = None
    own_text: str | None = None
    frequent: FrequentTokens | None = None  # on the rank that prepares, where heads have a shortlist

    @classmethod
    def of(cls, config: TuneConfig) -> Self:
        folder = training_model(config.model.path)
        plan = plan_tune(config, folder, ModelFolder(folder).decoder_config)
        model_tensors(folder, plan.model_config)  # weights that do not fit are said now, not by a rank
        return cls(plan)

    def prepare(self, *, progress: bool) -> dict[str, Any]:
        data, model_dir, words = self.config.data, self.plan.model_dir, self.plan.shape.vocab_size
        found = check_run_text(data, model_dir, words, progress=progress)
        if self.config.train.held_out:
            held_out_prefixes(self.plan, progress=progress)
        if size := self.plan.spec.shortlist:
            self.frequent = frequent_tokens(data, model_dir, words, size)
            self.plan = replace(self.plan, spec=replace(self.plan.spec, shortlist_ids=self.frequent.ids))
        if data.own_text:
            self.own_text, digest = prepare_own_text(self.plan, found, progress=progress)
            found["own_text"] = digest
        if (kept := self.plan.kept_taps) is not None:
            self.taps_folder = prepare_taps(self.plan, kept, found)
        return found

    def facts(self) -> dict[str, Any]:
        return {"early_exit": self.plan.spec.to_dict()}

    def build(self, grid: Grid, out: Path, scratch: Path | None = None) -> "TuneRun":
        plan, words = self.plan, self.plan.shape.vocab_size
        if plan.spec.shortlist:
            plan = replace(plan, spec=grid.from_rank_0(plan.spec))  # which has counted
            if self.frequent is not None:
                log.info("%s", self.frequent.words(words))
        samples = plan.total_steps * self.config.train.global_batch_size
        own_text = grid.from_rank_0(self.own_text)
        run = start_run(plan, grid, run_dataset(self.config.data, plan.model_dir, words, samples, own_text))
        if (kept := plan.kept_taps) is not None:
            run.taps = open_taps(kept, self.taps_folder, grid)
        if self.config.train.held_out:
            run.held_out = open_held_out(plan, held_out_prefixes(plan, progress=False), run.stage, grid)
        return run

    def words(self) -> Words:
        plan, rows = self.plan, []
        for stage in range(len(plan.stages.bounds) - 1):
            if stage >= plan.stages.launched:
                first, last = plan.stages.bounds[stage] + 1, plan.stages.bounds[stage + 1]
                rows.append((str(stage), f"{first}-{last}", "", "not launched"))
                continue
            layers, exits = plan.stages.layers(stage), ", ".join(map(str, plan.stages.exits(stage)))
            trained = plan.parameters(stage).trained
            rows.append((str(stage), f"{layers.start + 1}-{layers.stop}", exits, f"{trained:,}"))
        title = f"{plan.model_config.model_type}, {plan.shape.num_layers} layers"
        return Words(title, ("stage", "layers", "exits after layer", "trained by a rank"), rows)


@dataclass
class TuneRun(Run[TuneConfig, TunePlan]):
    """One rank's live run; without a dataset its engine can be stepped by hand.

    frozen: digest of what must not change, from before the first step; empty where that is not looked at.
    taps: what exits read, kept on disk, if that is wanted; reads_taps: whether the last step took all of it from there.
    held_out: loss on text that is not trained on, if there is such text.
    """

    plan: TunePlan
    grid: Grid
    stage: TuningStage
    engine: FrozenPipelineEngine | JointPipelineEngine
    dataset: Epochs | None = None
    step: int = 0
    frozen: str = ""
    taps: TapCache | None = None
    reads_taps: bool = False
    held_out: HeldOut | None = None

    @property
    def flops_per_token(self) -> float:
        return sum(work.exits if self.reads_taps else work.total for work in self.plan.work())

    @cached_property
    def _rate(self) -> LearningRate:
        return LearningRate(self.config.optim, self.config.train.steps)

    @cached_property
    def _micro_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """This replica's, from where the run stands."""
        assert self.dataset is not None  # stepped by hand without one
        return batches(
            self.dataset,
            micro_batch_size=self.config.train.micro_batch_size,
            num_micro_batches=self.plan.num_micro_batches,
            dp_rank=self.grid.dp_rank,
            dp_size=self.grid.layout.dp,
            consumed_samples=self.consumed_samples,
            num_workers=self.config.data.num_workers,
        )

    def ready(self) -> FrozenPipelineEngine | JointPipelineEngine:
        if self.config.train.verify_frozen and self.plan.backbone.mode != FULL and not self.frozen:
            self.frozen = self.stage.frozen_digest()
        return self.engine

    def train_step(self) -> Step:
        learning_rate = self._rate.at(self.step)
        self.engine.set_lr(learning_rate)
        self.engine.loss_weights = loss_weights_at(self.step, self.plan.loss_weights, self.config.exits)
        engine = self.engine
        losses: Mapping[Any, torch.Tensor] = (
            engine.train_step(self._micro_batches, self._kept_taps())
            if isinstance(engine, FrozenPipelineEngine)
            else engine.train_step(self._micro_batches)
        )
        last = self.step + 1 == self.config.train.steps
        if last:
            self._check_frozen()
        return Step(learning_rate, losses, last)

    def _check_frozen(self) -> None:
        if self.frozen:
            digest = check_frozen(self.frozen, self.stage.frozen_digest(), self.grid.stage)
            log.info("backbone unchanged (digest %s)", digest)

    @property
    def ended(self) -> bool:
        return self.held_out is not None and self.held_out.ended

    def measure(self) -> None:
        if self.held_out is not None:
            self.held_out.at(self.step)
            if self.ended and self.step < self.config.train.steps:
                self._check_frozen()

    def _kept_taps(self) -> TapStep | None:
        """The taps of the next step's sequences. The same ones are read on all ranks, or none."""
        if self.taps is None:
            return None
        assert self.dataset is not None
        samples = range(self.consumed_samples, self.consumed_samples + self.config.train.global_batch_size)
        sequences = self.dataset.sequences(samples)
        replicas = sequences.view(self.grid.layout.dp, self.plan.num_micro_batches, -1)
        step = self.taps.step(sequences, replicas[self.grid.dp_rank])
        if step.reads and not self.reads_taps:
            log.info("step %d: taps are read, the backbone rests", self.step + 1)
        self.reads_taps = step.reads
        return step

    def metrics_stream(self) -> MetricsStream:
        """Losses by exit, and of the model itself if it trains."""
        layers, together = list(self.plan.spec.layers), self.plan.backbone.trains
        return self._stream(
            [*layers, FINAL] if together else layers,
            ("loss", "kl") if self.config.exits.kl_weight > 0 else ("loss",),
            norm_keys=[TOGETHER] if together else layers,
            width=self.plan.shape.hidden_size,
            dtype=next(self.stage.backbone.parameters()).dtype,
        )

    def facts(self) -> dict[str, Any]:
        backbone = self.plan.backbone.mode
        held_out = {} if self.held_out is None else self.held_out.facts()
        return {
            "steps": self.config.train.steps,
            "early_exit": self.plan.spec.to_dict(),
            "backbone": backbone,
            **held_out,
        }

    def reopen(self, state: Mapping[str, Any]) -> None:
        if (steps := state["steps"]) != self.config.train.steps and self.grid.rank == 0:
            log.warning("train.steps was %d: learning rate and order of the data now follow the new value", steps)
        if self.held_out is not None:
            self.held_out.recall(state)

    def saved_parts(self) -> list[SavedPart]:
        """A pair of files per exit, and one for what trains of the stage's backbone."""
        parts, together = [], self.plan.backbone.trains
        for k in self.stage.exit_layers:
            named = self.stage.exit_heads[str(k)].named_parameters()
            training = [(f"exit_heads.{k}.{name}", parameter) for name, parameter in named]
            parts.append(SavedPart(exits_name(k), optimizer_name(k), training, group=ALL if together else k))
        if isinstance(self.stage, JointStage):
            trained, copied = self.stage.trained, self.stage.copied
            copies = {} if copied is None or self.stage.is_original else {copied: trained[copied]}
            own = [(name, parameter) for name, parameter in trained.items() if name not in copies]
            file, moments = f"backbone_{self.grid.stage:03d}.safetensors", f"backbone_moments_{self.grid.stage:03d}"
            parts.append(SavedPart(file, f"{moments}.safetensors", own, copies=list(copies.items()), group=ALL))
        return parts

    def gather(self, name: str, parameter: nn.Parameter, part: torch.Tensor) -> torch.Tensor:
        words, of_exit = self.plan.shape.vocab_size, name.startswith("exit_heads.")
        return gather_whole(name, parameter, part, self.plan.spec.scored(words) if of_exit else words, self.grid)

    def local(self, name: str, parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
        return local_slice(whole, parameter, self.grid.tp_rank)


def exits_name(k: int) -> str:
    """File with the parameters of the exit at layer k."""
    return f"exits_{k:03d}.safetensors"


def optimizer_name(k: int) -> str:
    """File with the AdamW moments of the exit at layer k."""
    return f"optimizer_{k:03d}.safetensors"


def start_run(
    plan: TunePlan, grid: Grid, dataset: Epochs | None = None, joint: type[JointStage] = JointStage
) -> TuneRun:
    """Build and load this rank's stage and wrap it in the engine; all ranks call it. `joint`: where it trains."""
    config = plan.config
    bf16 = uses_bf16(config.train.precision, grid.device)
    stage = build_stage(
        plan.model_config,
        plan.stages,
        plan.spec,
        grid,
        torch.bfloat16 if bf16 else torch.float32,
        attn_implementation=config.model.attn_implementation,
        teacher=config.exits.kl_weight > 0,
        own_logits=plan.backbone.trains,
        cls=joint if plan.backbone.trains else TuningStage,
    )
    tensors = model_tensors(plan.model_dir, plan.model_config)
    load_stage(stage, tensors, grid, init=config.exits.init, seed=config.train.seed)
    if not isinstance(stage, JointStage):
        return TuneRun(plan, grid, stage, FrozenPipelineEngine.build(stage, grid, config), dataset)
    copies = output_copies(plan.stages, plan.spec, plan.shape.tied_embeddings)
    stage.train_backbone(plan.backbone, copies, grid, config.train.seed)
    return TuneRun(plan, grid, stage, JointPipelineEngine.build(stage, grid, config), dataset)
