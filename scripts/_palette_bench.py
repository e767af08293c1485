"""The ways to make a palette's sizes that `bench_palette.py` compares, run in one process."""

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from _palette_latency import measure_latency
from _palette_report import POLISHED, SEPARATE, SUPERNET, Report, Result, Way, summed_up
from rich.console import Console

from ee_scale.config.compose import compose_config
from ee_scale.elastic.factors import FactorPlan
from ee_scale.elastic.order import UnitOrder
from ee_scale.elastic.sampling import RANDOM, Draw
from ee_scale.elastic.subnet import SubnetSpec
from ee_scale.grid import Grid
from ee_scale.palettes.intervals import Scores
from ee_scale.palettes.judge import Judge
from ee_scale.palettes.make import held_out
from ee_scale.palettes.polish import POLISH, Polish
from ee_scale.planning.supernet import SupernetPlan
from ee_scale.training.loop import Loop
from ee_scale.training.schedules import LearningRate
from ee_scale.training.supernet import Supernet, SupernetRun, build_stage, open_phases, start_run, unit_order
from ee_scale.training.supernet_data import Data, prepare_data
from ee_scale.training.watchdog import Watchdog

HELD_OUT = "held out"
ABLATION = 2.5  # of a cheap run's time: full net, smallest and another one in every step
AXES = "[hidden,heads,ffn,depth]"
WIDTHS = "[hidden,heads,ffn]"


@dataclass
class Case:
    """A model, its data, and the sizes that are compared: (MLP units, layers), width and heads whole."""

    name: str
    settings: list[str]
    sizes: Sequence[tuple[int, int]]
    steps: tuple[int, int, int]  # of the teacher, the widths, widths and depths
    lr: float  # of the factors; whole matrices take a tenth of it
    samples: int  # held-out sequences; 0: all
    rank: int  # of the factors behind the teacher's
    ablations: bool
    kept: bool  # whether the teacher is kept: texts come again
    elsewhere: Path | None = None  # labelled texts of another domain, to judge on too


class NoWriter(nullcontext):
    """Checkpoints are not measured here."""

    def save(self, run: SupernetRun, facts: dict[str, Any]) -> None: ...

    def poll(self) -> None: ...

    def finish(self) -> None: ...


class Bench:
    """Everything that the ways share."""

    def __init__(self, case: Case, grid: Grid, out: Console):
        self.case, self.grid, self.out = case, grid, out
        self.folder = Path(tempfile.mkdtemp())
        plan = self.plan(self.recipe(case.rank))
        prepare_data(plan, progress=False)
        self.order: UnitOrder = unit_order(plan, build_stage(plan, grid), Data(plan, grid), self.folder / "order.st")
        space = plan.space(self.order)
        self.sizes = [space.member(space.hidden[0], next(iter(space.groups), None), *size) for size in case.sizes]
        self.params = [plan.map.parameters(spec) for spec in self.sizes]
        self.layer_params = [plan.map.parameters(spec, layers_only=True) for spec in self.sizes]
        self.full = plan.map.shape.full
        self.full_params = (plan.map.parameters(self.full), plan.map.parameters(self.full, layers_only=True))
        self.map, self.tokens = plan.map, plan.config.data.seq_length
        self.batches = {name: self._held_out(plan, path) for name, path in self._texts().items()}
        self.teacher: dict[str, torch.Tensor] = {}
        self.results: dict[str, Result] = {}
        self.teacher_seconds = 0.0

    def _texts(self) -> dict[str, str | None]:
        """Files to judge on; the first one decides. None: that of the run."""
        elsewhere = self.case.elsewhere
        return {HELD_OUT: None, **({elsewhere.stem: str(elsewhere)} if elsewhere else {})}

    def _held_out(self, plan: SupernetPlan, path: str | None) -> list[dict[str, torch.Tensor]]:
        judged = SimpleNamespace(data=path, samples=self.case.samples, seed=0, batch_size=32, cache_dir=None)
        return held_out(judged, plan)

    def recipe(self, rank: int, one_stage: bool = False, polish: int = 0) -> str:
        """The stages as a setting; `polish`: steps of one more, for a size alone."""
        teacher, width, depth = self.case.steps
        if one_stage:
            return self.stages(("all", AXES, teacher + width + depth, rank))
        first = [("teacher", "[]", teacher, 8)] if teacher else []
        last = [(POLISH, AXES, polish, rank)] if polish else []
        return self.stages(*first, ("width", WIDTHS, width, rank), ("width_depth", AXES, depth, rank), *last)

    def stages(self, *found: tuple[str, str, int, int]) -> str:
        """(name, axes, steps, rank) of each stage as a setting."""
        lines = [
            f"{{name: {name}, axes: {axes}, steps: {steps}, rank: {rank}, lr: {self.case.lr * (1 if rank else 0.1)}}}"
            for name, axes, steps, rank in found
        ]
        return f"stages=[{', '.join(lines)}]"

    def plan(self, *settings: str) -> SupernetPlan:
        """A run's plan."""
        return Supernet.of(compose_config("supernet", [*self.case.settings, *settings])).plan

    def begin(self, plan: SupernetPlan) -> SupernetRun:
        """A run that starts from the teacher."""
        run = start_run(plan, self.grid, build_stage(plan, self.grid), self.order)
        if self.teacher and plan.phases.of_teacher:
            open_phases(run, 0)
            with torch.no_grad():
                for name, parameter in run.factors[0].named.items():
                    parameter.copy_(self.teacher[name])
            run.step = plan.phases.ends[0]
        return run

    def judge(self, run: SupernetRun, spec: SubnetSpec, texts: str = HELD_OUT) -> Scores:
        """Accuracy, or loss, text by text."""
        return Judge(run.stage, self.batches[texts]).judge(spec).scores

    def judged(self, run: SupernetRun, spec: SubnetSpec) -> dict[str, Scores]:
        """The same on every file."""
        return {texts: self.judge(run, spec, texts) for texts in self.batches}

    def train_teacher(self) -> None:
        """The stage without axes, once for all ways."""
        if self.case.steps[0]:
            run = self.begin(self.plan(self.stages(("teacher", "[]", self.case.steps[0], 8))))
            self.teacher_seconds = timed(lambda: self._train(run))
            self.teacher = {name: p.detach().clone() for name, p in run.factors[0].named.items()}
        run = self.begin(self.plan(self.recipe(self.case.rank)))
        self.metric = Judge(run.stage, self.batches[HELD_OUT]).metric
        self.taught = self.judged(run, self.full)
        self.say(f"teacher: {self.teacher_seconds:.0f} s, quality {self.taught[HELD_OUT].mean:.4f}")
        self.add("sliced", 0, 0.0, [self.judged(run, spec) for spec in self.sizes])

    def supernet(self, name: str, *settings: str, whole: bool = False, one_stage: bool = False) -> None:
        """All sizes from one run."""
        rank = 0 if whole else self.case.rank
        run = self.begin(self.plan(self.recipe(rank, one_stage), *settings))
        seconds = timed(lambda: self._train(run))
        self._add_supernet(name, run, seconds, len(run.plan.phases), starts_at_teacher=not one_stage)

    def polished(self, steps: int, *settings: str) -> None:
        """All sizes from one run, and then some steps for each alone. What they were before is the way `supernet`."""
        run = self.begin(self.plan(self.recipe(self.case.rank, polish=steps), *self.cheap(), *settings))
        phases = len(run.plan.phases) - 1
        seconds = timed(lambda: self._train(run, run.plan.phases.ends[phases - 1]))
        trained = self._add_supernet(SUPERNET, run, seconds, phases)
        polish, scores = Polish(run), []
        for spec in self.sizes:
            polish.train(spec)
            scores.append(self.judged(run, spec))
        trained += sum(self._factors(run, phases).parameters(spec) for spec in self.sizes)
        self.add(f"{POLISHED}, {steps} steps", trained, seconds + polish.seconds, scores)

    def _add_supernet(
        self, name: str, run: SupernetRun, seconds: float, phases: int, *, starts_at_teacher: bool = True
    ) -> int:
        """Keep a supernet of so many phases; returns how many numbers they train."""
        trained = sum(self._factors(run, i).parameters(self.full) for i in range(phases))
        scores = [self.judged(run, spec) for spec in self.sizes]
        self.add(name, trained, seconds, scores, starts_at_teacher=starts_at_teacher)
        self.say(f"    full net after training: {self.judge(run, self.full).mean:.4f}")
        return trained

    def separate(self, *settings: str) -> None:
        """A run per size: the same losses, teacher and number of steps, on that size alone."""
        plan = self.plan(self.recipe(self.case.rank), *settings)
        index = plan.phases.of_teacher
        seconds, trained, scores = 0.0, 0, []
        for spec in self.sizes:
            run = self.begin(plan)
            open_phases(run, index)
            run.start_engine()
            seconds += timed(lambda run=run, spec=spec: self._train_one(run, spec))
            trained += self._factors(run, index).parameters(spec)
            scores.append(self.judged(run, spec))
        if index:
            trained += self._factors(run, 0).parameters(self.full)
        self.add(SEPARATE, trained, seconds, scores)

    def _train(self, run: SupernetRun, steps: int | None = None) -> None:
        run.data = Data(run.plan, self.grid)
        watchdog = Watchdog(self.grid, timeout_seconds=3600)
        loop = Loop(run, self.folder, run.metrics_stream(), lambda _: None, NoWriter(), watchdog)
        loop.train(steps or run.plan.total_steps)

    def _train_one(self, run: SupernetRun, spec: SubnetSpec) -> None:
        steps = sum(self.case.steps[1:])
        peak = run.plan.learning_rate(run.index)
        rate = LearningRate(replace(run.config.optim, lr=peak), steps)
        micro_batches = Data(run.plan, self.grid).micro_batches(run.consumed_samples)
        for step in range(steps):
            run.engine.set_lr(rate.at(step))
            run.engine.train_step(micro_batches, [Draw(0, RANDOM, spec, 1.0)])

    def _factors(self, run: SupernetRun, index: int) -> FactorPlan:
        return run.plan.factors(index, run.stage.new)

    def add(
        self,
        name: str,
        trained: int,
        seconds: float,
        scores: list[dict[str, Scores]],
        *,
        starts_at_teacher: bool = True,
    ) -> None:
        """Keep a run and tell. seconds: without the teacher's."""
        teacher = self.teacher_seconds if starts_at_teacher else 0.0
        result = self.results.setdefault(name, Result(name, trained, teacher))
        result.seconds.append(seconds)
        result.runs.append(scores)
        found = "  ".join(f"{own[HELD_OUT].mean:.4f}" for own in scores)
        self.say(f"{name}: {teacher + seconds:.0f} s, {trained:,} trained, {found}")

    def cheap(self) -> list[str]:
        """Settings of steps that cost little."""
        sizes = ", ".join(f"{{ffn: {ffn}, depth: {depth}}}" for ffn, depth in self.case.sizes)
        drawn = ["members=palette", "palette_share=1.0", "smallest=false", "full_every=4"]
        kept = f"distill.cache={self.case.kept}"
        return [f"space.palette=[{sizes}]", kept, *(f"sampling.{setting}" for setting in drawn)]

    def say(self, text: str) -> None:
        """A line as it comes."""
        self.out.print(text, highlight=False)

    def run(self, seeds: int, polish: int, *, ablations: bool = False, latency: bool = True) -> Report:
        """All ways."""
        began = time.perf_counter()
        found = measure_latency(self.map, self.sizes, self.tokens) if latency else None  # first: it may refuse
        self.train_teacher()
        before = time.perf_counter()
        for seed in range(seeds):
            if polish:
                self.polished(polish, f"train.seed={seed}")
            else:
                self.supernet(SUPERNET, *self.cheap(), f"train.seed={seed}")
            if not seed:
                self._foretell(began, before, seeds, ablations=ablations)
            self.separate(f"distill.cache={self.case.kept}", f"train.seed={seed}")
        if ablations:
            self.ablate()
        results = list(self.results.values())
        return Report(
            case=self.case.name,
            metric=self.metric,
            steps=self.case.steps,
            sizes=[spec.name for spec in self.sizes],
            params=self.params,
            layer_params=self.layer_params,
            full_params=self.full_params[0],
            full_layer_params=self.full_params[1],
            teacher_seconds=self.teacher_seconds,
            ways=[Way(r.name, r.teacher + r.apart, r.apart, r.trained) for r in results],
            judged=[summed_up(name, taught, results, self.metric) for name, taught in self.taught.items()],
            latency=found,
        )

    def ablate(self) -> None:
        """What the parts of the supernet are good for."""
        self.supernet("sandwich")
        self.supernet("whole weights", whole=True)
        if self.case.ablations:
            self.supernet("gamma 0", "sampling.gamma=0")
            self.supernet("gamma 1", "sampling.gamma=1")
            self.supernet("no distillation", "distill.kl_weight=0", "distill.feature_weight=0")
            self.supernet("live teacher", "distill.teacher=live")
            self.supernet("one stage", "distill.teacher=live", one_stage=True)  # nobody was frozen before it

    def _foretell(self, began: float, before: float, seeds: int, *, ablations: bool) -> None:
        """How long the case will take; a step of a separate run costs about what one of the supernet does."""
        now, one = time.perf_counter(), self.results[SUPERNET].apart
        more = (seeds - 1) * (now - before) + seeds * len(self.sizes) * one
        if ablations:
            more += ABLATION * one * (7 if self.case.ablations else 2)
        self.say(f"about {(now - began + more) / 60:.0f} minutes for this case, {more / 60:.0f} of them still to come")


def timed(call: Callable[[], Any]) -> float:
    """Seconds."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
