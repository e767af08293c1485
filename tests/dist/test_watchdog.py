"""Which rank hangs is said by every rank that can still speak, before they leave with code 1."""

import multiprocessing
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from helpers.hangs import StillClock, wait_asleep, wait_for
from helpers.models import write_model
from helpers.reference import Job
from helpers.spawn import CHILD_ENVIRONMENT, PRELOAD
from helpers.tuning import build_engine, my_micro_batches

from ee_scale.errors import FAILED
from ee_scale.grid import Layout, join_grid
from ee_scale.log import configure_logging
from ee_scale.training import watchdog as watchdog_module
from ee_scale.training.watchdog import AFTER, State, Watchdog, diagnose

JOB = Job("llama", "norm", "low_rank", steps=5)
LAYOUT = Layout(pp=2, dp=2)
TIMEOUT = 10.0  # seconds without progress: a thread that waits for its turn is not taken for one that is silent
HUNG, HUNG_STEP = 3, 2  # stage 1, dp 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("watchdog"), JOB.family)


@pytest.fixture(scope="module")
def hung(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, "Trained"]:
    """Three times four ranks one of which hangs, side by side: they mostly wait."""
    ways = ("forward", "data", "stopped")
    with ThreadPoolExecutor(len(ways)) as pool:
        started = [pool.submit(train_with_watchdog, model, tmp_path_factory.mktemp(how), how) for how in ways]
        return {how: one.result() for how, one in zip(ways, started, strict=True)}


@pytest.mark.parametrize(
    ("how", "found"),
    [
        ("forward", rf"hangs: in 'ForwardPass' of step {HUNG_STEP} for \d+ s; the others wait for it"),
        ("data", rf"hangs: in 'data' of step {HUNG_STEP} for \d+ s; the others wait for it"),
        ("stopped", r"has not been heard of for \d+ s; the others wait for it"),
    ],
)
def test_every_rank_names_the_one_that_hangs(hung, how, found):
    codes, pids, said, out = hung[how]
    able = [rank for rank in range(4) if how != "stopped" or rank != HUNG]
    assert [codes[rank] for rank in able] == [FAILED] * len(able), said
    culprit = rf"rank {HUNG} \(stage 1, dp 1, tp 0; host \S+, pid {pids[HUNG]}\) {found}"
    for rank in able:
        lines = [line for line in said[rank].splitlines() if " leaves: " in line]
        assert len(lines) == 1, said[rank]
        assert re.search(rf"ERROR rank {rank} leaves: {culprit}$", lines[0]), lines
    stacks = {path.name: path.read_text() for path in out.glob("hang_rank_*.txt")}
    assert set(stacks) == {f"hang_rank_{rank}.txt" for rank in able}
    if how == "forward":
        assert "in hang_in_forward" in stacks[f"hang_rank_{HUNG}.txt"]


def test_a_run_that_goes_on_raises_no_alarm(model, tmp_path):
    """It takes longer than the time limit, and every rank leaves the watch at another time."""
    trained = train_with_watchdog(model, tmp_path, "slow")
    assert trained.codes == [0] * 4, trained.said
    assert not list(tmp_path.glob("hang_rank_*.txt"))


class Trained(NamedTuple):
    """Of four ranks: exit codes, process ids and what they said; the folder that they wrote into."""

    codes: list[Any]
    pids: list[int]
    said: list[str]
    out: Path


def train_with_watchdog(model: Path, out: Path, how: str) -> Trained:
    """Four ranks that meet at a store of this process, as torchrun's agent has it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    args = (store.port, model, out, how)
    ranks = [context.Process(target=run_rank, args=(rank, *args), daemon=True) for rank in range(4)]
    try:
        for process in ranks:
            process.start()
        if how != "slow":
            wait_for(out / "hangs")
            if how == "stopped":
                os.kill(ranks[HUNG].pid, signal.SIGSTOP)
            wait_asleep(process.pid for process in ranks)
            (out / "clock").write_text("runs")
        for rank, process in enumerate(ranks):
            if how != "stopped" or rank != HUNG:
                process.join()
        said = [(out / f"said_{rank}").read_text() for rank in range(4)]
        return Trained([p.exitcode for p in ranks], [p.pid for p in ranks], said, out)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def run_rank(rank: int, port: int, model: Path, out: Path, how: str) -> None:
    descriptor = os.open(out / f"said_{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 2)
    configure_logging(rank)
    os.environ.update(CHILD_ENVIRONMENT)
    torch.set_num_threads(1)
    watchdog_module.time = clock = StillClock(out / "clock")
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False)
    timeout = timedelta(days=1)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=4, timeout=timeout)
    grid = join_grid(LAYOUT, torch.device("cpu"))
    engine = build_engine(model, JOB, grid)
    grid.from_rank_0(None)
    limit = TIMEOUT if how != "slow" else 4.0
    with Watchdog(grid, limit, out) as watchdog:
        engine.observers.append(watchdog)
        for step in range(1, JOB.steps + 1):
            watchdog.step(step)
            with watchdog.during("data"):
                batches = my_micro_batches(step, JOB, grid)
                if how == "slow":
                    clock.moved += limit / 4
                    time.sleep(0.3)
                elif rank == HUNG and step == HUNG_STEP:
                    hang(how, engine, out)
            engine.train_step(batches)
        if how == "slow":
            time.sleep(rank / 4)
    os._exit(0)


def hang(how: str, engine: Any, out: Path) -> None:
    """Begin to hang, now or in the next forward."""
    if how == "forward":
        engine.stage.register_forward_pre_hook(lambda *_: hang_in_forward(out))
    else:
        hang_in_forward(out)


def hang_in_forward(out: Path) -> None:
    (out / "hangs").write_text("now")
    while True:
        signal.pause()


def test_a_store_that_keeps_silent_does_not_stop_the_watch(monkeypatch):
    """As where rank 0 holds the store and hangs itself."""
    said = []
    monkeypatch.setattr(Watchdog, "_leave", lambda self, line: said.append(line) or self._stopped.set())
    grid = SimpleNamespace(layout=LAYOUT, rank=1)
    with Watchdog(grid, 2.0, store=torch.distributed.HashStore()) as watchdog, watchdog.during("vote"):
        monkeypatch.setattr(watchdog, "_store", SilentStore())
        watchdog._thread.join()
    assert re.fullmatch(
        r"rank 1 \(stage 0, dp 1, .*\) waits in 'vote' of step 0 for \d+ s, and the job's key-value store .*", said[0]
    )


class SilentStore:
    """Takes questions and never answers."""

    def set(self, *_: Any) -> None:
        Event().wait()


# Who is named, without processes.

FOUR = {
    rank: State(beat=9, progress=100, step=7, phase="RecvActivation", seconds=50.0, sent=0.0, host="a", pid=rank)
    for rank in range(4)
}


def named(changes: dict[int, dict[str, Any]], before: dict[int, int] | None = None, missing: int | None = None) -> str:
    """Diagnosis of four ranks that wait, but for `changes`; all have spoken since, but for `before`."""
    after: dict[int, State | None] = {rank: replace(state, **changes.get(rank, {})) for rank, state in FOUR.items()}
    then = {rank: replace(state, beat=(before or {}).get(rank, 5)) for rank, state in after.items()}
    if missing is not None:
        after[missing] = then[missing] = None
    return diagnose(LAYOUT, then, after, limit=60.0)


def ranks_of(line: str) -> list[int]:
    return [int(rank) for rank in re.findall(r"rank (\d) \(", line)]


def test_a_silent_rank_comes_first():
    assert ranks_of(named({1: {"phase": "ForwardPass"}}, before={2: 9})) == [2]
    line = named({1: {"phase": "ForwardPass"}}, missing=0)
    assert line == "rank 0 (stage 0, dp 0, tp 0) has not been heard of since the start; the others wait for it"


def test_then_those_that_are_not_waiting_for_long():
    assert ranks_of(named({1: {"phase": "ForwardPass"}})) == [1]
    # rank 0 just works, and rank 2 is behind but waits
    working = {"phase": "ForwardPass", "seconds": 2.0}
    assert ranks_of(named({0: working, 1: {"phase": "data"}, 2: {"step": 6}})) == [1]
    assert ranks_of(named({1: {"phase": "data"}, 2: {"phase": "starting"}})) == [1, 2]


def test_then_those_that_have_left():
    left = {"phase": AFTER, "seconds": 0.0}
    assert ranks_of(named({2: left}, before={2: 9})) == [2]
    assert ranks_of(named({2: left, 3: {"phase": "save", "seconds": 50.0}, 0: {"phase": "data"}}, before={2: 9})) == [0]


def test_then_those_that_are_behind():
    assert ranks_of(named({3: {"step": 6}})) == [3]
    # stages run different instructions: counts are compared within a stage
    assert ranks_of(named({0: {"progress": 20}, 1: {"progress": 20}, 2: {"progress": 99}})) == [2]
    line = named({})
    assert ranks_of(line) == [0, 1, 2, 3]
    assert line.endswith("no rank can be told apart as the cause")
