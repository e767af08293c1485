"""Steps whose taps are read give the losses and parameters of steps that compute them, on every grid."""

from pathlib import Path

import pytest
import torch
from helpers.models import write_model
from helpers.reference import BATCH, SEQUENCE, Job, micro_batches
from helpers.spawn import spawn
from helpers.tuning import build_engine

from ee_scale.exits.taps import FINAL, TapCache, TapShape, kept_sequences, tap_name
from ee_scale.grid import Grid, Layout, join_grid, leave_grid
from ee_scale.modeling.heads import ExitSpec

LAYOUTS = [Layout(2, 2, 1), Layout(1, 2, 2), Layout(2, 1, 2)]
JOBS = [
    Job("mistral", "layer", "low_rank", micro_batches=4),  # a sliding window: the exit's own attention has a mask
    Job("gemma2", "mlp", "low_rank", tied=True, kl_weight=0.7, confidence=True, micro_batches=4),
    Job("qwen3", "norm", "full", exit_layers=(1, 2, 3), kl_weight=0.5, micro_batches=4),
]
# Every job where stages and tensors are cut; each grid with replicas reads what that one has kept.
CASES = [*((LAYOUTS[0], job.name) for job in JOBS), (LAYOUTS[1], JOBS[0].name), (LAYOUTS[2], JOBS[1].name)]
STEPS = (0, 1, 0, 1)  # what each step trains on; of a new cache the third one is compared and the fourth is read
SEQUENCES = BATCH * JOBS[0].micro_batches


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("taps")
    for job in JOBS:
        write_model(folder / job.family, job.family, tie_word_embeddings=job.tied)
    return spawn(run_cases, 4, folder)


def run_cases(rank: int, folder: Path) -> dict[tuple[Layout, str], dict]:
    found = {}
    for layout in LAYOUTS:
        grid = join_grid(layout, torch.device("cpu"))
        for job in (job for job in JOBS if (layout, job.name) in CASES):
            found[layout, job.name] = {
                "computed": train(job, grid, folder, None),
                "kept": train(job, grid, folder, folder / f"taps-{job.name}-{layout}"),
                # Written by the first of the grids.
                "shared": train(job, grid, folder, folder / f"taps-{job.name}"),
            }
        leave_grid()
    return found


def train(job: Job, grid: Grid, folder: Path, taps: Path | None) -> dict:
    """Losses by step, last parameters, and what each step did."""
    engine = build_engine(folder / job.family, job, grid)
    cache = None if taps is None else open_cache(job, grid, taps)
    result = {"losses": [], "did": []}
    each = job.micro_batches // grid.layout.dp
    mine = slice(grid.dp_rank * each, (grid.dp_rank + 1) * each)
    for number in STEPS:
        step = None
        if cache is not None:
            sequences = torch.arange(number * SEQUENCES, (number + 1) * SEQUENCES)
            step = cache.step(sequences, sequences.view(-1, BATCH)[mine])
        names: list[str] = []
        engine.observers[:] = [Names(names)]
        losses = engine.train_step(iter(micro_batches(number, job.micro_batches)[mine]), step)
        result["losses"].append({k: value.clone() for k, value in losses.items()})
        result["did"].append(sorted(set(names)))
    result["parameters"] = {name: parameter.detach().clone() for name, parameter in engine.stage.named_parameters()}
    return result


class Names:
    """Notes the instructions of a step."""

    def __init__(self, names: list[str]):
        self.names = names

    def begin(self, name: str, fields: dict) -> None:
        self.names.append(name)

    def end(self, name: str) -> None:
        pass


def open_cache(job: Job, grid: Grid, folder: Path) -> TapCache:
    spec = ExitSpec(job.exit_layers, job.kind)
    names = [tap_name(spec, k) for k in job.exit_layers] + ([FINAL] if job.kl_weight else [])
    shape = TapShape(SEQUENCE, 64, torch.float32)
    there = None
    if grid.rank == 0:
        folder.mkdir(exist_ok=True)
        there = torch.stack([kept_sequences(folder, name, shape, 2 * SEQUENCES)[:, 0] >= 0 for name in names]).all(0)
    return TapCache(folder, names, shape, grid.from_rank_0(there), writes=grid.tp_rank == 0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_bits(case: tuple[Layout, str], found: list[dict]) -> None:
    for results in found:
        computed, kept = results[case]["computed"], results[case]["kept"]
        for there, here in zip(computed["losses"], kept["losses"], strict=True):
            assert there.keys() == here.keys()
            assert all(torch.equal(there[k], here[k]) for k in there)
        for name, parameter in computed["parameters"].items():
            assert torch.equal(parameter, kept["parameters"][name]), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_taps_of_one_grid_serve_the_others(case: tuple[Layout, str], found: list[dict]) -> None:
    for results in found:
        computed, shared = results[case]["computed"], results[case]["shared"]
        for there, here in zip(computed["losses"], shared["losses"], strict=True):
            for k in there:
                torch.testing.assert_close(here[k], there[k], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_that_reads_runs_no_layer_and_sends_nothing(case: tuple[Layout, str], found: list[dict]) -> None:
    for results in found:
        did = results[case]["kept"]["did"]
        assert all("ForwardPass" in names and "ReadTaps" not in names for names in did[:3])
        assert did[3] in (
            ["LoadMicroBatch", "OptimizerStep", "ReadTaps", "ReduceGrads", "TrainExits"],
            ["LoadMicroBatch", "ReadTaps"],
        )
        started = 1 if case[0] == LAYOUTS[0] else 0  # the first grid wrote what all share
        assert "ReadTaps" in results[case]["shared"]["did"][3 if started else 1]
