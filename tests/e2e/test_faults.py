"""What a run does when it is told to stop, when losses are no numbers, when a rank hangs and when the disk is full."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from helpers.cli import Finished, run_cli
from helpers.hangs import StillClock, wait_asleep, wait_for
from safetensors.torch import load_file

REQUEUE = 75


def lines(out: Path) -> list[dict]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == list(range(1, len(found) + 1))
    return found


def losses(out: Path) -> list[dict]:
    return [line["loss"] for line in lines(out)]


def checkpoint_steps(out: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (out / "checkpoints").glob("step_*"))


def after_step(step: int, rank: int, action) -> None:
    """In the rank of this process, call `action(loop)` when that step is done."""
    from ee_scale.training.loop import Loop

    original = Loop.end

    def end(self: Loop, *args, **options) -> None:
        original(self, *args, **options)
        if self.run.step == step and self.run.grid.rank == rank:
            action(self)

    Loop.end = end


def send_usr1(rank: int) -> None:
    after_step(3, 1, lambda loop: os.kill(os.getpid(), signal.SIGUSR1))


def send_term(rank: int) -> None:
    after_step(4, 0, lambda loop: os.kill(os.getpid(), signal.SIGTERM))


def hang(rank: int) -> None:
    """Rank 1, when step 3 is done. Ten minutes pass in ten seconds, and only when rank 0 waits."""
    from ee_scale.training import watchdog

    watchdog.time = StillClock(Path("clock"), speed=60)
    init = watchdog.Watchdog.__init__

    def init_and_look_often(self: watchdog.Watchdog, *args, **options) -> None:
        init(self, *args, **options)
        self._every = 0.2

    def wait_for_ever(loop) -> None:
        wait_asleep([int(wait_for(Path("pid_0")).read_text())])
        Path("clock").write_text("runs")
        while True:
            signal.pause()

    watchdog.Watchdog.__init__ = init_and_look_often
    Path(f"pid_{rank}").write_text(str(os.getpid()))
    after_step(3, 1, wait_for_ever)


def no_number_at_step_3(rank: int) -> None:
    """The loss of exit 1 is multiplied by NaN in the third step."""
    from ee_scale.training import tune

    original = tune.loss_weights_at

    def weights(step: int, *args) -> dict[int, float]:
        found = original(step, *args)
        return found | {1: float("nan")} if step == 2 else found

    tune.loss_weights_at = weights


def full_disk_at_step_3(rank: int) -> None:
    """Rank 1 cannot write the first checkpoint."""
    from ee_scale.artifact import save

    original, calls = save.save_file, []

    def save_file(tensors, path) -> None:
        calls.append(path)
        if rank == 1 and "00000003" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(tensors, path)

    save.save_file = save_file


@pytest.fixture(scope="module")
def undisturbed(tune_arguments, tmp_path_factory) -> Path:
    """Eight steps at pp=2, nothing in between."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run_cli([*tune_arguments, "parallel.pp=2", "out=run"], folder, 2).codes == [0, 0]
    return folder / "run"


def stopped(out: Path) -> dict:
    return json.loads((out / "stopped.json").read_text())


# Two stages read a vote two steps later; the word about a signal after step 3 is that of step 4.
@pytest.mark.parametrize(("inject", "name", "step"), [(send_usr1, "SIGUSR1", 6), (send_term, "SIGTERM", 7)])
def test_a_signal_saves_and_the_same_command_goes_on(tune_arguments, tmp_path, undisturbed, inject, name, step):
    command = [*tune_arguments, "parallel.pp=2", "out=run", "train.save_every=100"]
    left = run_cli(command, tmp_path, 2, inject=inject)
    assert left.codes == [REQUEUE, REQUEUE], left.output
    note = stopped(tmp_path / "run")
    assert note["code"] == REQUEUE
    assert f"stopped by {name}" in note["reason"]
    assert note["reason"] in left.output
    assert note["reason"] not in left.outputs[1]  # one rank says it
    assert note["step"] == step
    assert checkpoint_steps(tmp_path / "run") == [step]
    assert len(losses(tmp_path / "run")) == step
    again = run_cli(command, tmp_path, 2)
    assert again.codes == [0, 0], again.output
    assert not (tmp_path / "run" / "stopped.json").exists()
    assert losses(tmp_path / "run") == losses(undisturbed)  # to the last digit


def exit_tensors(out: Path, k: int) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / "step_00000008" / f"exits_{k:03d}.safetensors")


def test_an_update_that_is_no_number_is_left_out_for_its_exit_alone(tune_arguments, tmp_path, undisturbed):
    command = [*tune_arguments, "parallel.pp=2", "out=run"]
    finished = run_cli(command, tmp_path, 2, inject=no_number_at_step_3)
    assert finished.codes == [0, 0]
    assert "step 3: update of exit 1 left out (loss" in finished.output
    found = lines(tmp_path / "run")
    assert [line.get("skipped") for line in found] == [None, None] + 6 * [{"1": 1}]
    assert all(torch.isfinite(tensor).all() for tensor in exit_tensors(tmp_path / "run", 1).values())
    # The other exit never noticed; this one differs from an undisturbed run, by the update that it lacks.
    for name, tensor in exit_tensors(undisturbed, 3).items():
        assert torch.equal(exit_tensors(tmp_path / "run", 3)[name], tensor)
    assert any(
        not torch.equal(exit_tensors(tmp_path / "run", 1)[name], tensor)
        for name, tensor in exit_tensors(undisturbed, 1).items()
    )


def test_the_count_of_updates_survives_a_stop(tune_arguments, tmp_path):
    """AdamW's step count is that of the updates made: a stopped run goes on like one that was not."""
    command = [*tune_arguments, "out=run", "train.steps=6", "train.save_every=4"]
    whole = run_cli([*command, "out=whole"], tmp_path, inject=no_number_at_step_3)
    killed = run_cli(command, tmp_path, inject=no_number_at_step_3, die_at_step=5)
    assert (whole.code, killed.code) == (0, -9)
    again = run_cli(command, tmp_path, inject=no_number_at_step_3)
    assert again.code == 0, again.output
    assert lines(tmp_path / "run")[-1]["skipped"] == lines(tmp_path / "whole")[-1]["skipped"] == {"1": 1}
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize("backbone", ["frozen", "full"])
def test_a_run_that_only_leaves_out_updates_stops(tune_arguments, tmp_path, backbone):
    command = [*tune_arguments, "out=run", "optim.lr=1e30", "optim.warmup_fraction=0", "train.steps=50"]
    command += ["train.max_skipped=3", "train.save_every=5", f"backbone={backbone}", "parallel.pp=2"]
    finished = run_cli(command, tmp_path, 2)
    assert finished.codes == [1, 1], finished.output
    note = stopped(tmp_path / "run")
    assert note["code"] == 1
    assert "train.max_skipped=3" in note["reason"]
    assert "lower optim.lr=1e+30" in note["reason"]
    assert note["step"] <= 10
    assert finished.output.count("Traceback") == 0
    if backbone == "frozen":
        assert "exit 1 (" in note["reason"]


def test_a_rank_that_hangs_is_named(tune_arguments, tmp_path):
    command = [*tune_arguments, "out=run", "parallel.pp=2", "parallel.timeout_minutes=10", "train.steps=30"]
    finished = run_cli(command, tmp_path, 2, inject=hang)
    assert finished.codes[0] == 1, finished.output
    told = finished.output + finished.outputs[1]
    assert "rank 1 (stage 1, dp 0, tp 0" in told
    assert "hangs" in told


def test_a_full_disk_costs_one_checkpoint(tune_arguments, tmp_path, undisturbed):
    finished: Finished = run_cli(
        [*tune_arguments, "out=run", "parallel.pp=2", "train.keep=9"], tmp_path, 2, inject=full_disk_at_step_3
    )
    assert finished.codes == [0, 0], finished.output
    assert "step 3: checkpoint not written (rank 1: No space left on device)" in finished.output
    assert checkpoint_steps(tmp_path / "run") == [6, 8]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    assert losses(tmp_path / "run") == losses(undisturbed)


def test_a_supernet_stops_and_goes_on_as_well(supernet_arguments, supernet_run, tmp_path):
    command = [*supernet_arguments, "out=run", "train.save_every=100"]
    left = run_cli(command, tmp_path, inject=send_term)
    assert left.code == REQUEUE, left.output
    note = stopped(tmp_path / "run")
    assert (note["code"], note["step"]) == (REQUEUE, 6)  # one stage reads a vote one step later
    again = run_cli(command, tmp_path)
    assert again.code == 0, again.output
    assert losses(tmp_path / "run") == losses(supernet_run)  # to the last digit
