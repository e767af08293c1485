"""The ways to make a palette's sizes that `bench_palette.py` compares, run in one process."""

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from math import sqrt
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
ABLATIONS = 12  # all of them, in supernet runs: the paper's steps cost most
AXES = "[hidden,heads,ffn,depth]"
WIDTHS = "[hidden,heads,ffn]"


@dataclass(frozen=True)
class Steps:
    """Of the teacher (0: the model as it is), of the supernet, of each separate run."""

    teacher: int
    supernet: int
    separate: int


@dataclass
class Case:
    """A model, its data, and the sizes that are compared: (MLP units, layers), width and heads whole."""

    name: str
    settings: list[str]
    sizes: Sequence[tuple[int, int]]
    steps: Steps
    lr: float  # of pairs of rank 8
    samples: int  # held-out sequences; 0: all
    rank: int  # of the factors behind the teacher's
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
        plan = self.plan(*self.recipe(case.rank))
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

    def recipe(self, rank: int, polish: int = 0) -> list[str]:
        """`recipe=mlfs` with this case's steps and sizes; `polish`: steps of one more stage, for a size alone."""
        last = [(POLISH, AXES, polish, rank)] if polish else []
        sizes = ", ".join(f"{{ffn: {ffn}, depth: {depth}}}" for ffn, depth in self.case.sizes)
        cheap = [f"space.palette=[{sizes}]", "sampling.palette_share=1", f"distill.cache={self.case.kept}"]
        return [self.stages(*self.of_teacher(), ("sizes", AXES, self.case.steps.supernet, rank), *last), *cheap]

    def paper(self) -> list[str]:
        """`recipe=paper` with as many steps as a separate run."""
        whole = self.case.steps.separate
        width = whole // 6
        stages = self.stages(*self.of_teacher(), ("width", WIDTHS, width, 8), ("width_depth", AXES, whole - width, 8))
        return ["recipe=paper", stages, "distill.cache=false"]

    def of_teacher(self) -> list[tuple[str, str, int, int]]:
        """Its stage, where one is trained."""
        return [("teacher", "[]", self.case.steps.teacher, 8)] if self.case.steps.teacher else []

    def stages(self, *found: tuple[str, str, int, int]) -> str:
        """(name, axes, steps, rank) of each stage as a setting.

        The step of a pair's product grows with its rank, by its square root as rsLoRA has it (arXiv 2312.03732); whole
        matrices take a tenth.
        """
        rates = [self.case.lr * (sqrt(8 / rank) if rank else 0.1) for *_, rank in found]
        lines = [
            f"{{name: {name}, axes: {axes}, steps: {steps}, rank: {rank}, lr: {rate}}}"
            for (name, axes, steps, rank), rate in zip(found, rates, strict=True)
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
        if self.case.steps.teacher:
            run = self.begin(self.plan(self.stages(*self.of_teacher())))
            self.teacher_seconds = timed(lambda: self._train(run))
            self.teacher = {name: p.detach().clone() for name, p in run.factors[0].named.items()}
        run = self.begin(self.plan(*self.recipe(self.case.rank)))
        self.metric = Judge(run.stage, self.batches[HELD_OUT]).metric
        self.taught = self.judged(run, self.full)
        self.say(f"teacher: {self.teacher_seconds:.0f} s, quality {self.taught[HELD_OUT].mean:.4f}")
        self.add("sliced", 0, 0.0, [self.judged(run, spec) for spec in self.sizes])

    def supernet(self, name: str, *settings: str) -> None:
        """All sizes from one run; `settings`: recipe and all."""
        run = self.begin(self.plan(*settings))
        seconds = timed(lambda: self._train(run))
        self._add_supernet(name, run, seconds, len(run.plan.phases))

    def polished(self, steps: int, *settings: str) -> None:
        """All sizes from one run, and then some steps for each alone. What they were before is the way `supernet`."""
        run = self.begin(self.plan(*self.recipe(self.case.rank, polish=steps), *settings))
        phases = len(run.plan.phases) - 1
        seconds = timed(lambda: self._train(run, run.plan.phases.ends[phases - 1]))
        trained = self._add_supernet(SUPERNET, run, seconds, phases)
        polish, scores = Polish(run), []
        more = 0.0
        for spec in self.sizes:
            more += timed(lambda spec=spec: polish.train(spec))
            scores.append(self.judged(run, spec))
        trained += sum(self._factors(run, phases).parameters(spec) for spec in self.sizes)
        self.add(f"{POLISHED}, {steps} steps", trained, seconds + more, scores)

    def _add_supernet(self, name: str, run: SupernetRun, seconds: float, phases: int) -> int:
        """Keep a supernet of so many phases; returns how many numbers they train."""
        trained = sum(self._factors(run, i).parameters(self.full) for i in range(phases))
        scores = [self.judged(run, spec) for spec in self.sizes]
        self.add(name, trained, seconds, scores)
        return trained

    def separate(self, *settings: str) -> None:
        """A run per size: the same losses, teacher and number of steps, on that size alone."""
        plan = self.plan(*self.recipe(self.case.rank), *settings)
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
        steps = self.case.steps.separate
        peak = run.plan.learning_rate(run.index)
        rate = LearningRate(replace(run.config.optim, lr=peak), steps)
        micro_batches = Data(run.plan, self.grid).micro_batches(run.consumed_samples)
        for step in range(steps):
            run.engine.set_lr(rate.at(step))
            run.engine.train_step(micro_batches, [Draw(0, RANDOM, spec, 1.0)])

    def _factors(self, run: SupernetRun, index: int) -> FactorPlan:
        return run.plan.factors(index, run.stage.new)

    def add(self, name: str, trained: int, seconds: float, scores: list[dict[str, Scores]]) -> None:
        """Keep a run and tell. seconds: without the teacher's."""
        teacher = self.teacher_seconds
        result = self.results.setdefault(name, Result(name, trained, teacher))
        result.seconds.append(seconds)
        result.runs.append(scores)
        found = "  ".join(f"{own[HELD_OUT].mean:.4f}" for own in scores)
        self.say(f"{name}: {teacher + seconds:.0f} s, {trained:,} trained, {found}")

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
                self.supernet(SUPERNET, *self.recipe(self.case.rank), f"train.seed={seed}")
            if not seed:
                self._foretell(began, before, seeds, ablations=ablations)
            self.separate(f"train.seed={seed}")
        if ablations:
            self.ablate()
        results = list(self.results.values())
        return Report(
            case=self.case.name,
            metric=self.metric,
            steps=asdict(self.case.steps),
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
        usual = self.recipe(self.case.rank)
        self.supernet("paper", *self.paper())
        self.supernet("whole weights", *self.recipe(0))
        self.supernet("rank 8", *self.recipe(8))
        self.supernet("any size", *usual, "sampling.palette_share=0")
        self.supernet("full net in every 4th step", *usual, "sampling.full_every=4")
        self.supernet("gamma 0", *usual, "sampling.gamma=0")
        self.supernet("gamma 1", *usual, "sampling.gamma=1")
        self.supernet("no distillation", *usual, "distill.kl_weight=0", "distill.feature_weight=0")

    def _foretell(self, began: float, before: float, seeds: int, *, ablations: bool) -> None:
        """How long the case will take; a step of a separate run costs about what one of the supernet does."""
        now, one = time.perf_counter(), self.results[SUPERNET].apart / torch.get_num_threads()
        more = (seeds - 1) * (now - before) + seeds * len(self.sizes) * one
        if ablations:
            more += ABLATIONS * one
        self.say(f"about {(now - began + more) / 60:.0f} minutes for this case, {more / 60:.0f} of them still to come")


def timed(call: Callable[[], Any]) -> float:
    """CPU seconds of all threads: what else the machine does hardly counts."""
    started = time.process_time()
    call()
    return time.process_time() - started
