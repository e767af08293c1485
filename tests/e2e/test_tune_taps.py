"""`ee-scale tune data.cache_taps=true`: the same run, whether what exits read is computed, kept or read."""

import json
from pathlib import Path

import pytest
from helpers.cli import Finished, run_cli

from ee_scale.artifact.checkpoint import checkpoints
from ee_scale.files import file_digest

EPOCHS = ["data.sequences=16", "train.steps=6", "train.save_every=2"]  # three epochs of two steps
RESTS = "taps are read, the backbone rests"


def losses(run: Path) -> list[dict[str, float]]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def final_digests(run: Path) -> dict[str, str]:
    folder = max(checkpoints(run / "checkpoints").items())[1]
    return {path.name: file_digest(path) for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A cache of its own."""
    return tmp_path_factory.mktemp("taps")


@pytest.fixture(scope="module")
def tune(tune_arguments, folder):
    def run(out: str, *words: str, taps: bool = True, **options) -> Finished:
        cache = [f"data.cache_dir={folder}", f"data.cache_taps={str(taps).lower()}"]
        return run_cli([*tune_arguments, *EPOCHS, *cache, *words, f"out={out}"], folder, **options)

    return run


@pytest.fixture(scope="module")
def plain(tune, folder) -> Path:
    """The run that computes everything."""
    finished = tune("plain", taps=False)
    assert finished.code == 0, finished.output
    assert len(losses(folder / "plain")) == 6
    return folder / "plain"


@pytest.fixture(scope="module")
def killed(tune, folder) -> Path:
    """The same with taps, killed in its third step and gone on with."""
    assert tune("killed", die_at_step=3).code == -9
    assert not list(folder.rglob("*.tmp"))
    resumed = tune("killed")
    assert resumed.code == 0, resumed.output
    assert "continuing from" in resumed.output
    assert "taps: nothing to be written, 100% of the sequences kept already" in resumed.output
    assert f"step 4: {RESTS}" in resumed.output  # the first one is compared
    return folder / "killed"


def test_taps_change_nothing(plain, killed):
    assert losses(killed) == losses(plain)
    assert final_digests(killed) == final_digests(plain)


def test_another_grid_reads_them(tune, plain, killed, folder):
    before = {path: path.stat().st_mtime_ns for path in folder.glob("taps-*/*/*")}
    finished = tune("grid", "parallel.tp=2", "parallel.pp=2", world_size=4)
    assert finished.codes == [0] * 4, finished.outputs
    assert f"step 2: {RESTS}" in finished.output
    for ours, one_process in zip(losses(folder / "grid"), losses(plain), strict=True):
        assert ours == pytest.approx(one_process, rel=2e-5)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("taps-*/*/*")} == before


def test_exits_of_another_kind_and_rate_read_what_two_replicas_kept(tune, folder):
    replicas = tune("replicas", "exits.kind=norm", "parallel.dp=2", "train.steps=4", world_size=2)
    assert replicas.codes == [0, 0], replicas.outputs
    assert f"step 4: {RESTS}" in replicas.output
    other = ["exits.kind=layer", "optim.lr=3e-3", "train.micro_batch_size=4"]
    finished, computed = tune("other", *other), tune("other_computed", *other, taps=False)
    assert (finished.code, computed.code) == (0, 0), finished.output
    assert f"step 2: {RESTS}" in finished.output
    assert RESTS not in computed.output
    for ours, theirs in zip(losses(folder / "other"), losses(folder / "other_computed"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-6)
