"""Idle shares, MFU and losses of a live pipeline one stage of which is slow."""

import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.runtime.pipe import p2p
from helpers.hangs import wait_for
from helpers.models import write_model
from helpers.reference import BATCH, Job
from helpers.spawn import spawn
from helpers.tuning import build_engine, my_micro_batches

from ee_scale.engine.timeline import clock_offsets
from ee_scale.grid import Grid, Layout, join_grid, leave_grid
from ee_scale.training import metrics
from ee_scale.training.meter import StageMeter
from ee_scale.training.metrics import MetricsStream

JOB = Job("qwen3", "norm", "low_rank", steps=4)
SECONDS = (0.001, 0.03)  # of a forward pass, and of one of the slow stage
PEAK, FLOPS = 1e6, 1e3
FIRST, LAST = min(JOB.exit_layers), max(JOB.exit_layers)


class SharedClock:
    """Seconds that no other work on the machine changes: a forward pass takes what it is said to take, a message waits
    until both ends are there, and nothing else takes time. Observes an engine; is the clock of its meter and metrics.
    """

    def __init__(self, forward: float):
        self.forward, self.now, self.in_p2p = forward, 0.0, 0.0

    def begin(self, name: str, fields: dict[str, Any]) -> None:
        self.now += self.forward if name == "ForwardPass" else 0

    def end(self, name: str) -> None: ...

    def mark(self) -> float:
        return self.now

    perf_counter = mark

    def reached(self, mark: float) -> bool:
        return True

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def around(self, message: Any) -> Any:
        """DeepSpeed's send or receive, after which both ends have the time of the later one."""

        def timed(*args: Any) -> Any:
            found = message(*args)
            mine, times = torch.tensor([self.now], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
            torch.distributed.all_gather_into_tensor(times, mine)
            later = times.max().item()
            self.in_p2p += later - self.now
            self.now = later
            return found

        return timed


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return spawn(run_cases, 2, write_model(tmp_path_factory.mktemp("metrics"), JOB.family))


def run_cases(rank: int, root: Path) -> dict[str, Any]:
    grid = join_grid(Layout(1, 2, 1), torch.device("cpu"))
    found = {
        "slow": [run_slow(root, grid, slow) for slow in (0, 1)],
        "late": run_late(root, grid),
        "offsets": clock_offsets(grid.metrics_group, [0, 1], now=lambda: time.time_ns() + rank * 5 * 10**9),
    }
    leave_grid()
    return found


def run_slow(root: Path, grid: Grid, slow: int) -> dict[str, Any]:
    """The job, with its last step broken on stage 1."""
    engine, clock = build_engine(root, JOB, grid), SharedClock(SECONDS[grid.stage == slow])
    engine.train_step(my_micro_batches(0, JOB, grid))
    meter, tokens = StageMeter(grid.device, clock), JOB.micro_batches * BATCH
    options = {"norm_keys": JOB.exit_layers, "flops_per_token": FLOPS, "peak_flops": PEAK}
    engine.observers += [meter, clock]
    messages = {"send": clock.around(p2p.send), "recv": clock.around(p2p.recv)}
    with mock.patch.multiple(p2p, **messages), mock.patch.object(metrics, "time", clock):
        stream = MetricsStream(grid, JOB.exit_layers, tokens, meter=meter, **options)
        mine = []
        for step in range(1, JOB.steps + 1):
            losses = engine.train_step(my_micro_batches(step, JOB, grid))
            mine.append({k: (loss[0].item(), engine.grad_norms[k].item()) for k, loss in losses.items()})
            if step == JOB.steps and grid.stage == 1:
                losses[LAST] = losses[LAST] * float("nan")
            skipped = {LAST: torch.tensor(step // 4)} if grid.stage == 1 else None
            stream.add(step, 0.1, losses, grad_norms=engine.grad_norms, skipped=skipped)
        stream.flush()
    found = list(stream.ready(wait=True))
    return {"metrics": found, "mine": mine, "seconds": clock.now, "in_p2p": clock.in_p2p}


def run_late(root: Path, grid: Grid) -> int | None:
    """Stage 1 comes to a window when stage 0 has left flush and ready: steps that these gave there."""
    stream = MetricsStream(grid, JOB.exit_layers, 1, meter=StageMeter(grid.device))
    if grid.stage == 1:
        wait_for(root / "left")
    stream.add(1, 0.1, {})
    stream.flush()
    steps = None
    if grid.stage == 0:
        steps = len(list(stream.ready()))
        (root / "left").write_text("now")
    list(stream.ready(wait=True))
    return steps


@pytest.mark.parametrize("slow", [0, 1])
def test_the_stage_beside_the_slow_one_is_idle(slow: int, found: list[dict]) -> None:
    runs = [found[stage]["slow"][slow] for stage in (0, 1)]
    idle = runs[0]["metrics"][0].stages["idle"]
    assert idle[1 - slow] > 0.5
    assert idle[slow] < idle[1 - slow] / 2
    for stage, run in enumerate(runs):
        assert idle[stage] == pytest.approx(run["in_p2p"] / run["seconds"], rel=1e-5)


@pytest.mark.parametrize("slow", [0, 1])
def test_mfu_is_of_two_devices(slow: int, found: list[dict]) -> None:
    run = found[0]["slow"][slow]
    tokens = JOB.steps * JOB.micro_batches * BATCH
    assert run["metrics"][0].mfu == pytest.approx(tokens * FLOPS / (run["seconds"] * 2 * PEAK))
    # The slow stage alone takes so long.
    assert run["seconds"] >= JOB.steps * (JOB.micro_batches - 1) * SECONDS[1]


def test_numbers_of_all_stages_meet_on_rank_0(found: list[dict]) -> None:
    runs = [found[stage]["slow"][0] for stage in (0, 1)]
    assert [metrics.step for metrics in runs[0]["metrics"]] == [1, 2, 3, 4]
    for told, *mine in zip(runs[0]["metrics"], *(run["mine"] for run in runs), strict=True):
        known = mine[0] | mine[1]
        assert set(known) == set(JOB.exit_layers)
        assert told.grad_norms == pytest.approx({k: norm for k, (_, norm) in known.items()})
        last = told.step == JOB.steps
        kept = [k for k in known if not (last and k == LAST)]
        assert {k: told.values["loss"][k] for k in kept} == pytest.approx({k: known[k][0] for k in kept})
        assert told.to_json()["loss"][LAST] is None if last else told.to_json()["loss"][LAST] > 0
        assert told.skipped == ({LAST: 1} if last else {})
        assert set(told.stages["memory_gib"]) == {0, 1}
        assert all(0.05 < gib < 100 for gib in told.stages["memory_gib"].values())


def test_no_stage_waits_for_a_late_one(found: list[dict]) -> None:
    """It would for ever."""
    assert found[0]["late"] == 0


def test_clocks_that_differ_are_found_out(found: list[dict]) -> None:
    assert found[1]["offsets"] == {}
    offset, error = found[0]["offsets"][1]
    assert 0 < error < 10**9
    assert offset == pytest.approx(5 * 10**9, abs=error + 10**6)
