"""Make a palette: search, cut out, measure, recommend."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from ee_scale.artifact.run_folder import CONFIG
from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.config.compose import stored_config
from ee_scale.config.groups import ParallelConfig
from ee_scale.config.supernet import PaletteConfig, SupernetConfig
from ee_scale.elastic.distill import LIVE
from ee_scale.elastic.extract import is_tied
from ee_scale.elastic.order import UnitOrder
from ee_scale.elastic.stage import base_tensors
from ee_scale.elastic.subnet import SearchSpace, SubnetSpec
from ee_scale.errors import UserError
from ee_scale.families.sizes import max_length, max_length_text
from ee_scale.files import new_folder, remove_folder
from ee_scale.grid import Layout, join_grid, pick_device
from ee_scale.palettes.audit import Audit
from ee_scale.palettes.cut_out import TrainedSupernet, read_supernet, subnet_model, write_subnet
from ee_scale.palettes.draft_report import add_to_cards
from ee_scale.palettes.draft_trials import DraftTrials
from ee_scale.palettes.drafts import VERIFIED, Drafts
from ee_scale.palettes.edge import EdgeMeasure, measure_edge
from ee_scale.palettes.held_out import held_out
from ee_scale.palettes.intervals import interval, wilson
from ee_scale.palettes.judge import Judge, Judged, PartTimes
from ee_scale.palettes.manifest import Device, Manifest, Member, Polished, Tried, write_manifest
from ee_scale.palettes.overlap import Overlap
from ee_scale.palettes.polish import Polish, polish_stage
from ee_scale.palettes.recommend import write_palette_report
from ee_scale.palettes.search import Candidate, pareto, search, verified
from ee_scale.planning.estimates import BF16, FP32, uses_bf16
from ee_scale.planning.out_of_memory import model_advice, told_when_full
from ee_scale.planning.supernet import SupernetPlan, plan_supernet
from ee_scale.progress import shares
from ee_scale.training.supernet import ORDER, build_stage, open_phases, start_run

LIMITS = ("params", "flops", "latency_ms", "memory_mb")
MEGABYTE = 1e6


def make_palette(config: PaletteConfig) -> Manifest:
    """Write the folder `out`: a stock model per size, manifest.json, report.md and palette.png. Raises `UserError`."""
    if config.samples < 0 or config.seconds <= 0:
        raise UserError(f"samples={config.samples}, seconds={config.seconds}: must be at least 0 and above 0")
    src, out = Path(config.src).expanduser(), Path(config.out).expanduser()
    if config.onnx:
        import ee_scale.artifact.onnx  # noqa: F401  (says now that packages are missing)
    supernet = read_supernet(src, config.step)
    plan = stored_plan(src, supernet, config)
    for name in ("audit", "drafts"):
        if getattr(config, name) and plan.task != "causal_lm":
            raise UserError(f"{name}=true: a classifier writes no text")
    check_length(config, plan)
    batches = held_out(config, plan)
    with new_folder(out) as folder, told_when_full(lambda: _advice(config, plan)):
        manifest = Palette(config, src, supernet, plan, batches, folder).make()
        write_manifest(folder, manifest)
        write_palette_report(folder, manifest)
        add_to_cards(folder, manifest)
    return manifest


def _advice(config: PaletteConfig, plan: SupernetPlan) -> str:
    """Where memory runs out: what was foretold, and what needs less."""
    size = BF16 if uses_bf16("auto", pick_device(config.device)) else FP32
    change = f"batch_size={config.batch_size // 2}" if config.batch_size > 1 else "device=cpu"
    return model_advice(size * plan.map.parameters(plan.map.shape.full), change)


def check_length(config: PaletteConfig, plan: SupernetPlan) -> None:
    """Refuse to measure texts that the model cannot read. Raises `UserError`."""
    model_config, decoded = plan.map.config, config.new_tokens if plan.task == "causal_lm" else 0
    most, said = max_length(model_config), max_length_text(model_config)
    if config.tokens + decoded > most:
        texts = f"tokens={config.tokens}" + (f" and new_tokens={decoded}" if decoded else "")
        raise UserError(f"{texts}: the model reads at most {said} tokens")
    if config.drafts and config.tokens + sum(VERIFIED) > most:
        texts = f"tokens={config.tokens} and {sum(VERIFIED)} that are verified behind them (drafts=true)"
        raise UserError(f"{texts}: the model reads at most {said} tokens")


def limits_of(config: PaletteConfig) -> dict[str, float]:
    """The limits that were given, by cost."""
    given = {name: getattr(config, f"max_{name}") for name in LIMITS}
    return {name: value for name, value in given.items() if value is not None}


def stored_plan(src: Path, supernet: TrainedSupernet, config: PaletteConfig) -> SupernetPlan:
    """The run's own plan, in one process on this device."""
    stored = stored_config(SupernetConfig, src / CONFIG, f"{src / CONFIG}: not the config of a supernet run")
    stored = replace(
        stored,
        space=replace(stored.space, depth_parts=supernet.identity["parts"]),
        # Sizes were checked against the grid that trained; one process has none.
        parallel=ParallelConfig(),
        distill=replace(stored.distill, cache=False),
        train=replace(stored.train, precision="auto"),
    )
    if config.polish:
        stored.stages.append(polish_stage(stored, supernet.phases, config.polish))
    plan = plan_supernet(stored, supernet.base, ModelFolder(supernet.base).config, supernet.identity["labels"])
    base_tensors(supernet.base, plan.map)  # said before anything is judged
    return plan


class Palette:
    """One search from the trained supernet to the manifest."""

    def __init__(
        self,
        config: PaletteConfig,
        src: Path,
        supernet: TrainedSupernet,
        plan: SupernetPlan,
        batches: list[dict[str, torch.Tensor]],
        folder: Path,
    ):
        self.config, self.src, self.supernet, self.plan, self.folder = config, src, supernet, plan, folder
        self.device = pick_device(config.device)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.order = UnitOrder.load(src / ORDER, plan.map.shape)
        self.base = base_tensors(supernet.base, plan.map)
        grid = join_grid(Layout(), self.device)
        run = start_run(plan, grid, build_stage(plan, grid), self.order)
        open_phases(run, supernet.phases - 1)
        with torch.no_grad():
            for factors in run.factors:
                for name, parameter in factors.named.items():
                    parameter.copy_(supernet.trained[name])
        self.polish = Polish(run) if config.polish else None
        self.space: SearchSpace = run.space
        self.batches, self.judge = batches, Judge(run.stage, batches)
        self.audit = None
        if config.audit:
            digests = supernet.identity.get("data", {}).get("tokens", [])
            self.audit = Audit(plan, digests, config.audit_samples, config.seed, self.device)
        live = plan.config.distill.teacher == LIVE
        self.teacher = supernet.teacher(supernet.phases if live else plan.phases.of_teacher)
        self.texts = sum(len(batch["labels"]) for batch in batches)
        self.limits = limits_of(config)
        self.times = PartTimes(plan.map, config.tokens, 0.1, self.device, run.stage.dtype)
        self.judged: dict[SubnetSpec, Judged] = {}
        self.measures: dict[SubnetSpec, EdgeMeasure] = {}
        self.own: dict[SubnetSpec, TrainedSupernet] = {}  # of sizes that have other weights than the supernet
        if not plan.config.sampling.full_every:
            self.own[plan.map.shape.full] = self.teacher

    def make(self) -> Manifest:
        """Search, cut out and measure. Raises `UserError` where nothing keeps the limits."""
        config, full = self.config, self.plan.map.shape.full
        with shares("judging subnets") as progress:
            found = search(
                self.space,
                self._quality,
                self._estimate,
                self.limits,
                method=config.method,
                trials=config.trials,
                objective=config.objective,
                seed=config.seed,
                progress=progress,
            )
        front = pareto(found, config.objective)
        with shares("cutting out and measuring") as progress:
            chosen = verified(front, config.count, self._measure, self.limits, config.objective, progress)
            self._measure_spec(full)
        before = {} if self.polish is None else self._polished(self.polish, [candidate.spec for candidate in chosen])
        manifest = Manifest(
            base_model=str(self.supernet.base),
            base_fingerprint=self.supernet.identity["base_fingerprint"],
            run=str(self.src.resolve()),
            task=self.plan.task,
            device=Device.here(config.threads),
            limits=self.limits,
            objective=config.objective,
            latency="prefill_ms",
            metric=self.judge.metric,
            texts=self.texts,
            sources=self.supernet.sources,
            teacher=self.teacher.fingerprint,
            audit={} if self.audit is None else self._found_by(self.audit, [candidate.spec for candidate in chosen]),
            full=self._member(full, "full"),
            members=[
                replace(self._member(candidate.spec, self._name(candidate.spec)), before=before.get(candidate.spec, {}))
                for candidate in chosen
            ],
            polish=None if self.polish is None else Polished(config.polish, self.polish.seconds),
            tried=[Tried(c.spec, before.get(c.spec, self.judged[c.spec].figures), dict(c.estimates)) for c in found],
        )
        if config.drafts:
            manifest = replace(manifest, drafts=self._drafts(manifest))
        kept = [] if manifest.drafts is None else [manifest.drafts.full]
        self._keep_only({*kept, *(member.folder for member in manifest.members)})
        return manifest

    def _quality(self, spec: SubnetSpec) -> float:
        if spec not in self.judged:
            as_teacher = self.judge.stage.teaching(self.teacher.phases) if spec in self.own else nullcontext()
            with as_teacher:
                self.judged[spec] = self.judge.judge(spec)
        return self.judge.lower_is_better(self.judged[spec].figures)

    def _estimate(self, spec: SubnetSpec) -> dict[str, float]:
        """Exact parameters and FLOPs; latency by look-up and memory by weights, where they are asked for."""
        params = self.plan.map.parameters(spec) + self._untied(spec) * spec.hidden
        costs = {"params": params, "flops": self.plan.map.flops(spec, self.config.tokens)}
        wanted = {*self.limits, self.config.objective}
        if "latency_ms" in wanted:
            costs["latency_ms"] = self.times.milliseconds(spec)
        if "memory_mb" in wanted:
            costs["memory_mb"] = params * self.judge.stage.dtype.itemsize / MEGABYTE
        return costs

    def _untied(self, spec: SubnetSpec) -> int:
        """Numbers per unit of width that a tied model has not: training gave the output matrix values of its own."""
        config = self.plan.map.config
        tied = config.tie_word_embeddings and self.plan.task == "causal_lm"
        return config.vocab_size * (tied and not is_tied(self.plan.map, self._state(spec).trained))

    def _state(self, spec: SubnetSpec) -> TrainedSupernet:
        """Where a size's weights come from."""
        return self.own.get(spec, self.supernet)

    def _measure(self, candidate: Candidate) -> Mapping[str, float]:
        measure = self._measure_spec(candidate.spec)
        return {
            "params": measure.parameters,
            "flops": self.plan.map.flops(candidate.spec, measure.tokens),
            "latency_ms": measure.prefill_ms,
            "memory_mb": measure.memory_mb,
        }

    def _measure_spec(self, spec: SubnetSpec) -> EdgeMeasure:
        """Cut a subnet out into its folder and measure that folder."""
        if spec not in self.measures:
            self._quality(spec)
            folder = self._write(spec)
            self.measures[spec] = measure_edge(
                folder,
                self.plan.task,
                tokens=self.config.tokens,
                new_tokens=self.config.new_tokens,
                seconds=self.config.seconds,
                device=self.device.type,
                threads=self.config.threads,
                verify=VERIFIED if self.config.drafts else (),
            )
        return self.measures[spec]

    def _member(self, spec: SubnetSpec, folder: str) -> Member:
        measure, judged, whole = self.measures[spec], self.judged[spec], self.plan.map.shape.full
        accuracy = self.judge.metric == "accuracy"
        joules = measure.joules_per_token if measure.joules_per_token is not None else measure.energy
        return Member(
            folder=folder,
            spec=spec,
            params=measure.parameters,
            layer_params=self.plan.map.parameters(spec, layers_only=True),
            flops=self.plan.map.flops(spec, measure.tokens),
            prefill_ms=measure.prefill_ms,
            token_ms=measure.token_ms,
            memory_mb=measure.memory_mb,
            file_mb=measure.weights_mb,
            joules_per_token=joules,
            quality=judged.figures,
            interval=wilson(judged.scores.mean, self.texts) if accuracy else interval(judged.scores),
            difference=None if spec == whole else interval(judged.scores.minus(self.judged[whole].scores)),
            estimated_ms=self.times.milliseconds(spec),
            onnx=self._onnx(folder) if self.config.onnx and folder != "full" else {},
            verify_ms=measure.verify_ms,
        )

    def _polished(self, polish: Polish, specs: list[SubnetSpec]) -> dict[SubnetSpec, dict[str, float]]:
        """Train each size by itself and write it anew. Returns what the sizes were before."""
        before, specs = {}, [spec for spec in specs if spec not in self.own]
        with shares("polishing") as progress:
            for done, spec in enumerate(specs):
                trained = {**self.supernet.trained, **polish.train(spec)}
                self.own[spec] = replace(self.supernet, trained=trained)
                before[spec], self.judged[spec] = self.judged[spec].figures, self.judge.judge(spec)
                self._write(spec, f"{self.config.polish} more steps trained this size alone.")
                progress((done + 1) / len(specs))
        polish.restore()
        return before

    def _write(self, spec: SubnetSpec, more: str = "") -> Path:
        """Cut a subnet out into its folder, or anew."""
        folder = self.folder / self._name(spec)
        if folder.exists():
            remove_folder(folder)
        facts = ", ".join(f"{name} {value:.4g}" for name, value in self.judged[spec].figures.items())
        model = subnet_model(self.plan.map, self.base, self.order, self._state(spec), spec)
        said = f"On held-out data: {facts}. {more}".strip()
        write_subnet(folder, model, self.supernet, spec, said, self.teacher.fingerprint)
        return folder

    def _drafts(self, manifest: Manifest) -> Drafts:
        """Small sizes as drafters of larger ones; the full model is one of those, whether it is a member or not."""
        config, longest, full = self.config, self.plan.map.config.max_position_embeddings, manifest.full
        trials = DraftTrials(self.batches, config.drafts_samples, longest, config.seed, self.device)
        others = [member for member in manifest.members if member.spec != full.spec]
        whole = replace(full, folder=self._name(full.spec))
        return trials.drafts(self.folder, [whole, *others], whole.folder)

    def _found_by(self, audit: Audit, specs: list[SubnetSpec]) -> dict[str, Overlap]:
        """What the sizes and the teacher give back of the training text."""
        writers = [("teacher", self.teacher, self.plan.map.shape.full)]
        writers += [(self._name(spec), self._state(spec), spec) for spec in specs]
        with shares("looking for training text") as progress:
            for done, (name, supernet, spec) in enumerate(writers):
                audit.write(name, subnet_model(self.plan.map, self.base, self.order, supernet, spec))
                progress((done + 1) / (len(writers) + 1))
            return audit.found()

    def _onnx(self, name: str) -> dict[str, dict[str, float]]:
        from ee_scale.artifact.onnx import export_onnx

        found = {}
        for variant, int8 in (("fp32", False), ("int8", True)):
            report = export_onnx(self.folder / name, self.folder / name / f"onnx-{variant}", self.plan.task, int8=int8)
            found[variant] = {
                "file_mb": sum(report.files.values()) / MEGABYTE,
                "latency_ms": report.onnx_ms,
                "agreement": report.agreement,
            }
        return found

    def _name(self, spec: SubnetSpec) -> str:
        """Folder of a subnet; an early exit may have the sizes of a member that keeps other layers."""
        return f"{spec.name}-exit" if spec in self.space.exit_members() else spec.name

    def _keep_only(self, names: set[str]) -> None:
        for path in list(self.folder.iterdir()):
            if path.is_dir() and path.name not in names:
                remove_folder(path)
