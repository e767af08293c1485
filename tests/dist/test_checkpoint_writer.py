"""Checkpoints written in the background hold the step of their save; a failed one is told and spoils no earlier one."""

import errno
import logging
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Timer
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.models import VOCAB, write_model
from helpers.reference import Job
from helpers.spawn import spawn
from helpers.tuning import build_engine, my_micro_batches

from ee_scale.artifact import save
from ee_scale.artifact.checkpoint import checkpoints, read_checkpoint
from ee_scale.artifact.writer import CheckpointWriter
from ee_scale.errors import RunError
from ee_scale.files import file_digest
from ee_scale.grid import Grid, Layout, join_grid, leave_grid
from ee_scale.log import log
from ee_scale.training.tune import TuneRun

JOB = Job("llama", "norm", "low_rank")
LAYOUTS = [Layout(tp=2, dp=2), Layout(pp=2, dp=2)]
SAVED = (2, 4, 6)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("writer"), JOB.family)


def test_a_background_save_holds_the_step_it_was_taken_at(model, tmp_path):
    found = spawn(save_both_ways, 4, model, tmp_path)
    for layout in LAYOUTS:
        folders = {how: checkpoints(tmp_path / f"{how}-{layout}") for how in ("foreground", "background")}
        for step in SAVED:
            one, other = (folders[how][step] for how in folders)
            names = {path.name for path in one.iterdir()}
            assert len(names) == 7  # 3 exits and their moments, state.json
            assert {path.name for path in other.iterdir()} == names
            assert all(file_digest(one / name) == file_digest(other / name) for name in names), (layout, step)
            read_checkpoint(other)
        moved = {file_digest(folder / "exits_001.safetensors") for folder in folders["background"].values()}
        assert len(moved) == len(SAVED)
        for rank in found:
            # Step 3 was trained while step 2 was being written, 5 and 6 while step 4 was.
            assert rank[layout]["busy"] == [True, True, False]
            # The save at step 6 waited for that of step 4, so that no two snapshots are held.
            assert rank[layout]["published at 6"] == [2, 4]
            assert rank[layout]["written again"] == 0


def save_both_ways(rank: int, model: Path, root: Path) -> dict[Layout, dict[str, Any]]:
    found = {}
    for layout in LAYOUTS:
        grid = join_grid(layout, torch.device("cpu"))
        run = start(model, grid)
        writer = CheckpointWriter(root / f"foreground-{layout}", grid, 3, background=False)
        for step in range(1, 7):
            train(run)
            if step in SAVED:
                writer.save(run, {})
                assert not writer.busy
        writer.finish()
        found[layout] = save_behind(start(model, grid), root / f"background-{layout}")
        leave_grid()
    return found


def save_behind(run: TuneRun, root: Path) -> dict[str, Any]:
    """The same with a disk that is held up, on every rank that writes, until training has gone on."""
    writer = CheckpointWriter(root, run.grid, 3, background=True)
    goes_on, calls, busy = Event(), [], []

    def held_up(tensors: dict[str, torch.Tensor], path: Path) -> None:
        calls.append(path)
        goes_on.wait()  # for ever, if training does not go on while a checkpoint is written
        write(tensors, path)

    write = save.save_file
    with mock.patch.object(save, "save_file", held_up), writer:
        train(run, 2)
        writer.save(run, {})
        train(run, 1)
        busy.append(is_busy(writer, run.grid))
        goes_on.set()
        writer.finish()
        goes_on.clear()
        train(run, 1)
        writer.save(run, {})
        train(run, 2)
        busy.append(is_busy(writer, run.grid))
        Timer(0.3, goes_on.set).start()
        writer.save(run, {})
        published = sorted(checkpoints(root))
        writer.finish()
        busy.append(writer.busy)
        before = len(calls)
        writer.save(run, {})  # as a run does that is told to stop right after a save
        writer.finish()
    return {"busy": busy, "published at 6": published[:2], "written again": len(calls) - before}


def is_busy(writer: CheckpointWriter, grid: Grid) -> bool:
    """Asked on all ranks before any of them goes on."""
    busy = writer.busy
    torch.distributed.barrier(grid.metrics_group)
    return busy


def test_a_failed_save_is_told_and_leaves_the_earlier_one(model, tmp_path):
    found = spawn(fail_and_go_on, 4, model, tmp_path)
    said, kept = found[0]["said"], found[0]["kept"]
    retry = "training goes on and the next save tries again"
    assert kept["full"] == [1]
    assert said["full"] == [
        f"step 2: checkpoint not written (rank 2: No space left on device); the last good one is step_00000001; {retry}"
    ]
    assert kept["odd"] == [1]
    assert said["odd"] == [
        f"step 3: checkpoint not written (rank 0: what is this); the last good one is step_00000001; {retry}"
    ]
    assert kept["unpublished"] == [1]
    assert "(rank 0: No space left on device)" in said["unpublished"][0]
    assert kept["next"] == [5]
    assert said["next"] == [f"saved {tmp_path / 'run' / 'step_00000005'}"]
    assert kept["kernel"] == [5]
    assert "(rank 2: File too large)" in said["kernel"][0]
    assert "(rank 0: File exists: " in said["nowhere"][0]
    for rank in found:
        assert rank["left over"] == []
        assert rank["restored"] == 5
        assert rank["error"]["kernel"] == (
            "step 6: the last checkpoint was not written (rank 2: File too large); the last good one is step_00000005"
        )
        assert rank["error"]["nowhere"].endswith("the last good one is none")
        assert set(rank["error"]) == {"kernel", "nowhere"}
    assert not any(lines for rank in found[1:] for lines in rank["said"].values())  # rank 0 speaks for all


def fail_and_go_on(rank: int, model: Path, folder: Path) -> dict[str, Any]:
    """Saves that fail on one rank, each with one good checkpoint behind it and keep=1."""
    grid = join_grid(LAYOUTS[1], torch.device("cpu"))
    run, root = start(model, grid), folder / "run"
    found: dict[str, Any] = {"said": {}, "kept": {}, "error": {}, "left over": []}
    writer = CheckpointWriter(root, grid, 1, background=True)

    def attempt(name: str, writer: CheckpointWriter = writer) -> None:
        with lines() as said:
            train(run)
            writer.save(run, {})
            if name in ("kernel", "nowhere"):
                try:
                    writer.finish()
                except RunError as error:
                    found["error"][name] = str(error)
            writer._wait()
            writer.poll()  # nothing is told twice
        found["said"][name], found["kept"][name] = said, sorted(checkpoints(root))
        torch.distributed.barrier(grid.metrics_group)  # rank 0 has cleared up
        found["left over"] += root.glob(".*")
        torch.distributed.barrier(grid.metrics_group)

    attempt("good")
    with failing("save_file", OSError(errno.ENOSPC, "No space left on device"), rank == 2):
        attempt("full")
    with failing("save_file", ValueError("what is this"), rank == 0):
        attempt("odd")
    with failing("_publish", OSError(errno.ENOSPC, "No space left on device"), rank == 0):
        attempt("unpublished")
    for old in checkpoints(root).values():
        read_checkpoint(old)
    attempt("next")
    with largest_file(4096) if rank == 2 else mock.MagicMock():
        attempt("kernel")
    attempt("nowhere", CheckpointWriter(model / "config.json", grid, 1, background=True))
    (last,) = checkpoints(root).values()
    save.load_checkpoint(last, run, read_checkpoint(last))
    found["restored"] = run.step
    return found


def test_the_old_checkpoint_goes_after_the_new_one_is_there(tmp_path, monkeypatch):
    for name in ("step_00000001", ".step_00000002.tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(save, "_drop", lambda folder: seen.append((folder.name, sorted(checkpoints(tmp_path)))))
    seen: list[Any] = []
    save._publish(tmp_path / ".step_00000002.tmp", tmp_path / "step_00000002", {"step": 2}, 1)
    assert seen == [("step_00000001", [1, 2])]


def test_an_old_checkpoint_that_cannot_be_deleted_is_no_failure(tmp_path, monkeypatch, caplog):
    for name in ("step_00000001", ".step_00000002.tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(save.shutil, "rmtree", mock.Mock(side_effect=PermissionError(1, "Operation not permitted")))
    monkeypatch.setattr(log, "propagate", True)
    save._publish(tmp_path / ".step_00000002.tmp", tmp_path / "step_00000002", {"step": 2}, 1)
    assert sorted(checkpoints(tmp_path)) == [2]
    assert "cannot delete the old checkpoint" in caplog.text


def start(model: Path, grid: Grid) -> TuneRun:
    """A run at its start."""
    engine = build_engine(model, JOB, grid)
    config = SimpleNamespace(train=SimpleNamespace(global_batch_size=4))
    shape, backbone = SimpleNamespace(vocab_size=VOCAB), SimpleNamespace(trains=False)
    plan = SimpleNamespace(config=config, shape=shape, backbone=backbone, spec=engine.stage.spec)
    return TuneRun(plan, grid, engine.stage, engine)


def train(run: TuneRun, steps: int = 1) -> None:
    for _ in range(steps):
        run.engine.train_step(my_micro_batches(run.step, JOB, run.grid))
        run.step += 1


@contextmanager
def failing(name: str, error: Exception, here: bool) -> Iterator[None]:
    """`save.<name>` raises on this rank."""
    original: Callable[..., Any] = getattr(save, name)
    with mock.patch.object(save, name, mock.Mock(side_effect=error) if here else original):
        yield


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses to write beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def lines() -> Iterator[list[str]]:
    """What is logged, from INFO on."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage()) if record.levelno > logging.DEBUG else None
    log.addHandler(handler)
    level, _ = log.level, log.setLevel("INFO")
    try:
        yield found
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
