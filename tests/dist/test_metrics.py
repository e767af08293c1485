"""Idle shares, MFU and losses of a live pipeline one stage of which is slow."""

import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.runtime.pipe import p2p
from helpers.models import write_model
from helpers.reference import BATCH, Job
from helpers.spawn import spawn
from helpers.tuning import build_engine, my_micro_batches

from ee_scale.engine.timeline import clock_offsets
from ee_scale.grid import Grid, Layout, join_grid, leave_grid
from ee_scale.training.meter import StageMeter
from ee_scale.training.metrics import MetricsStream

JOB = Job("qwen3", "norm", "low_rank", steps=4)
SECONDS = 0.03  # that the slow stage sleeps in every forward pass
LATE = 3.0
PEAK, FLOPS = 1e6, 1e3
FIRST, LAST = min(JOB.exit_layers), max(JOB.exit_layers)


class Sleeper:
    """An observer that makes a stage slow."""

    def begin(self, name: str, fields: dict[str, Any]) -> None:
        time.sleep(SECONDS if name == "ForwardPass" else 0)

    def end(self, name: str) -> None: ...


class Stopwatch:
    """Seconds inside DeepSpeed's send and receive, beside all instructions and observers."""

    seconds = 0.0

    def around(self, function: Any) -> Any:
        def timed(*args: Any) -> Any:
            before = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.seconds += time.perf_counter() - before

        return timed


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return spawn(run_cases, 2, write_model(tmp_path_factory.mktemp("metrics"), JOB.family))


def run_cases(rank: int, root: Path) -> dict[str, Any]:
    grid = join_grid(Layout(1, 2, 1), torch.device("cpu"))
    found = {
        "slow": [run_slow(root, grid, slow) for slow in (0, 1)],
        "late": run_late(grid),
        "offsets": clock_offsets(grid.metrics_group, [0, 1], now=lambda: time.time_ns() + rank * 5 * 10**9),
    }
    leave_grid()
    return found


def run_slow(root: Path, grid: Grid, slow: int) -> dict[str, Any]:
    """The job, with its last step broken on stage 1."""
    engine, stopwatch = build_engine(root, JOB, grid), Stopwatch()
    engine.train_step(my_micro_batches(0, JOB, grid))
    meter, tokens = StageMeter(grid.device), JOB.micro_batches * BATCH
    options = {"norm_keys": JOB.exit_layers, "flops_per_token": FLOPS, "peak_flops": PEAK}
    engine.observers += [meter] + [Sleeper()] * (grid.stage == slow)
    with mock.patch.multiple(p2p, send=stopwatch.around(p2p.send), recv=stopwatch.around(p2p.recv)):
        torch.distributed.barrier()
        stream = MetricsStream(grid, JOB.exit_layers, tokens, meter=meter, **options)
        meter.restart()
        started, mine = time.perf_counter(), []
        for step in range(1, JOB.steps + 1):
            losses = engine.train_step(my_micro_batches(step, JOB, grid))
            mine.append({k: (loss[0].item(), engine.grad_norms[k].item()) for k, loss in losses.items()})
            if step == JOB.steps and grid.stage == 1:
                losses[LAST] = losses[LAST] * float("nan")
            skipped = {LAST: step // 4} if grid.stage == 1 else None
            stream.add(step, 0.1, losses, grad_norms=engine.grad_norms, skipped=skipped)
        seconds = time.perf_counter() - started
        stream.flush()
    return {
        "metrics": list(stream.ready(wait=True)),
        "mine": mine,
        "seconds": seconds,
        "in_p2p": stopwatch.seconds,
    }


def run_late(grid: Grid) -> tuple[float, int]:
    """Stage 1 comes `LATE` seconds late to a window: seconds that flush and ready took here, steps they gave."""
    stream = MetricsStream(grid, JOB.exit_layers, 1, meter=StageMeter(grid.device))
    torch.distributed.barrier()
    time.sleep(LATE * grid.stage)
    started = time.perf_counter()
    stream.add(1, 0.1, {})
    stream.flush()
    steps = len(list(stream.ready()))
    taken = time.perf_counter() - started
    list(stream.ready(wait=True))
    return taken, steps


@pytest.mark.parametrize("slow", [0, 1])
def test_the_stage_beside_the_slow_one_is_idle(slow: int, found: list[dict]) -> None:
    runs = [found[stage]["slow"][slow] for stage in (0, 1)]
    idle = runs[0]["metrics"][0].stages["idle"]
    assert idle[1 - slow] > 0.5
    assert idle[slow] < idle[1 - slow] / 2
    for stage, run in enumerate(runs):
        assert idle[stage] == pytest.approx(run["in_p2p"] / run["seconds"], abs=0.1)


@pytest.mark.parametrize("slow", [0, 1])
def test_mfu_is_of_two_devices(slow: int, found: list[dict]) -> None:
    run = found[0]["slow"][slow]
    tokens = JOB.steps * JOB.micro_batches * BATCH
    assert run["metrics"][0].mfu == pytest.approx(tokens * FLOPS / (run["seconds"] * 2 * PEAK), rel=0.25)
    # Sleeping alone takes so long, so no run can be better than that.
    assert run["metrics"][0].mfu < tokens * FLOPS / (JOB.steps * JOB.micro_batches * SECONDS * 2 * PEAK) * 1.01


def test_numbers_of_all_stages_meet_on_rank_0(found: list[dict]) -> None:
    runs = [found[stage]["slow"][0] for stage in (0, 1)]
    assert [metrics.step for metrics in runs[0]["metrics"]] == [1, 2, 3, 4]
    for metrics, *mine in zip(runs[0]["metrics"], *(run["mine"] for run in runs), strict=True):
        known = mine[0] | mine[1]
        assert set(known) == set(JOB.exit_layers)
        assert metrics.grad_norms == pytest.approx({k: norm for k, (_, norm) in known.items()})
        last = metrics.step == JOB.steps
        kept = [k for k in known if not (last and k == LAST)]
        assert {k: metrics.values["loss"][k] for k in kept} == pytest.approx({k: known[k][0] for k in kept})
        assert metrics.to_json()["loss"][LAST] is None if last else metrics.to_json()["loss"][LAST] > 0
        assert metrics.skipped == ({LAST: 1} if last else {})
        assert set(metrics.stages["memory_gib"]) == {0, 1}
        assert all(0.05 < gib < 100 for gib in metrics.stages["memory_gib"].values())


def test_no_stage_waits_for_a_late_one(found: list[dict]) -> None:
    seconds, steps = found[0]["late"]
    assert seconds < LATE
    assert steps == 0


def test_clocks_that_differ_are_found_out(found: list[dict]) -> None:
    assert found[1]["offsets"] == {}
    offset, error = found[0]["offsets"][1]
    assert 0 < error < 10**9
    assert offset == pytest.approx(5 * 10**9, abs=error + 10**6)
