"""`ee-scale tune` through its command line: what it leaves, how it dies, how it goes on."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.cli import run_cli

from ee_scale.artifact.checkpoint import checkpoints
from ee_scale.files import file_digest


def losses(run: Path) -> list[dict[str, float]]:
    """Loss by exit, line by line; the steps must be 1, 2, 3, ..."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def final_digests(run: Path) -> dict[str, str]:
    """Digests of the tensors of the last checkpoint."""
    folder = max(checkpoints(run / "checkpoints").items())[1]
    return {path.name: file_digest(path) for path in folder.glob("*.safetensors")}


def test_a_run_leaves_one_folder_with_everything(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert names == {"config.yaml", "run.json", "metrics.jsonl", "checkpoints"}
    assert [path.name for path in sorted((finished_run / "checkpoints").iterdir())] == [
        "step_00000006",
        "step_00000008",
    ]
    line = json.loads((finished_run / "metrics.jsonl").read_text().splitlines()[-1])
    learned = {"step", "tokens", "learning_rate", "loss", "grad_norm"}
    assert set(line) == learned | {"tokens_per_second", "mfu", "idle", "memory_gib"}
    assert line["tokens"] == 8 * 8 * 32
    assert set(line["loss"]) == {"1", "3"}
    assert line["learning_rate"] == pytest.approx(1e-5)
    rows = losses(finished_run)
    assert len(rows) == 8
    assert all(rows[-1][k] < rows[0][k] for k in rows[0])


def test_every_grid_gives_the_same_run(finished_run, tune_arguments, tmp_path):
    finished = run_cli([*tune_arguments, "out=run", "parallel.tp=2", "parallel.pp=2"], tmp_path, world_size=4)
    assert finished.codes == [0] * 4, finished.outputs
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in finished_run.iterdir()}
    for ours, one_process in zip(losses(tmp_path / "run"), losses(finished_run), strict=True):
        assert ours == pytest.approx(one_process, rel=2e-5)


@pytest.mark.parametrize("how", [{"die_at_step": 5}, {"die_in_save": True}], ids=["mid-run", "mid-save"])
def test_killed_and_resumed_is_the_same_to_the_last_digit(finished_run, tune_arguments, tmp_path, how):
    killed = run_cli([*tune_arguments, "out=run"], tmp_path, **how)
    assert killed.code == -9
    left = tmp_path / "run" / "checkpoints"
    if "die_in_save" in how:
        assert checkpoints(left) == {}
        assert (left / ".step_00000003.tmp" / "exits_001.safetensors").is_file()
    else:
        assert list(checkpoints(left)) == [3]
    stored = tmp_path / "run" / "config.yaml"
    stored.write_text(stored.read_text().replace("train:\n", "train:\n  zero: 1\n"))  # as an earlier version wrote it
    resumed = run_cli([*tune_arguments, "out=run", "train.zero=1"], tmp_path)
    assert resumed.code == 0, resumed.output
    assert "zero" not in stored.read_text()
    assert losses(tmp_path / "run") == losses(finished_run)
    assert final_digests(tmp_path / "run") == final_digests(finished_run)
    assert not list(left.glob(".step_*"))


def test_resume_on_another_grid_continues_the_curve(finished_run, tune_arguments, tmp_path):
    assert run_cli([*tune_arguments, "out=run"], tmp_path, die_at_step=5).code == -9
    grid = ["parallel.tp=2", "parallel.pp=2", "parallel.dp=1"]
    resumed = run_cli([*tune_arguments, "out=run", *grid], tmp_path, world_size=4)
    assert resumed.codes == [0] * 4, resumed.outputs
    assert "continuing from run/checkpoints/step_00000003" in resumed.output
    for ours, whole in zip(losses(tmp_path / "run"), losses(finished_run), strict=True):
        assert ours == pytest.approx(whole, rel=2e-5)
    # and from there on a third grid, with more steps
    again = run_cli([*tune_arguments, "out=run", "parallel.dp=2", "train.steps=9"], tmp_path, world_size=2)
    assert again.codes == [0] * 2, again.outputs
    assert len(losses(tmp_path / "run")) == 9


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("exits_003.safetensors", lambda data: data[: len(data) // 2]),
        ("optimizer_001.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        ("state.json", lambda data: data.replace(b'"step": 8', b'"step": 7')),
        ("state.json", lambda data: data[:20]),
        ("exits_001.safetensors", None),
    ],
    ids=["truncated", "one bit", "edited state", "torn state", "missing"],
)
def test_a_damaged_checkpoint_is_refused_by_name(finished_run, tune_arguments, tmp_path, name, damage):
    shutil.copytree(finished_run, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step_00000008" / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    finished = run_cli([*tune_arguments, "out=run"], tmp_path)
    assert finished.code == 2
    errors = [line for line in finished.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert f"step_00000008/{name}" in errors[0]


def test_a_finished_run_says_so(finished_run, tune_arguments, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    finished = run_cli([*tune_arguments, "out=run"], tmp_path)
    assert finished.code == 0
    assert "run is finished (step 8)" in finished.output


def test_wandb_offline_writes_and_a_failing_wandb_does_not_stop_the_run(tune_arguments, tmp_path, monkeypatch):
    short = [*tune_arguments, "train.steps=2", "logging.wandb=offline"]
    finished = run_cli([*short, "out=good"], tmp_path)
    assert finished.code == 0, finished.output
    assert list((tmp_path / "good" / "wandb").glob("offline-run-*"))
    # A file where wandb wants its folder makes init fail.
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "wandb").write_text("in the way")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "bad" / "wandb" / "x"))
    finished = run_cli([*short, "out=bad", "logging.wandb=online"], tmp_path)
    assert finished.code == 0, finished.output
    assert "wandb failed and is off" in finished.output
    assert len(losses(tmp_path / "bad")) == 2
