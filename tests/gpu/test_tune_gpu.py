"""Every way to tune, in bf16 on the device, agrees with fp32 on a CPU; a run that died goes on; ranks on two GPUs."""

from pathlib import Path

import pytest
from helpers.cli import run_cli
from helpers.device import BF16, DEVICE, metrics, train, train_on_cpu, two_gpus

pytestmark = pytest.mark.gpu

WAYS = {
    "frozen, KL": ["exits.kl_weight=0.5"],
    "frozen, layer": ["exits.kind=layer"],
    "full": ["backbone=full", "backbone.activation_checkpointing=true"],
    "low_rank": ["backbone=low_rank"],
}


def follows(ours: list[dict], reference: list[dict], abs_error: float) -> None:
    """The losses of two runs, step by step."""
    assert [line["step"] for line in ours] == [line["step"] for line in reference] == list(range(1, len(ours) + 1))
    for mine, theirs in zip(ours, reference, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=abs_error)
        assert mine.get("kl", {}) == pytest.approx(theirs.get("kl", {}), abs=abs_error)
        assert mine["memory_gib"]


@pytest.mark.parametrize("way", WAYS)
def test_bf16_follows_fp32_on_a_cpu(request, tune_arguments, tmp_path, way):
    arguments = [*tune_arguments, *WAYS[way]]
    ours = metrics(request.getfixturevalue("tuned")) if way == "frozen, KL" else train(tmp_path, arguments)
    reference = train_on_cpu(tmp_path, arguments)
    assert ("final" in ours[0]["loss"]) == way.startswith(("full", "low_rank"))
    assert ("kl" in ours[0]) == ("KL" in way)
    follows(ours, reference, 2e-2)
    assert ours[-1]["loss"]["3"] < ours[0]["loss"]["3"] - 0.1  # it learns


def test_a_run_that_died_goes_on(tuned: Path, tune_arguments, tmp_path):
    arguments = [*tune_arguments, "exits.kl_weight=0.5"]
    died = run_cli([*arguments, *BF16, "out=run"], tmp_path, device=DEVICE, die_at_step=5)
    assert died.code == -9, died.output
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_00000003"]
    follows(train(tmp_path, arguments), metrics(tuned), 0.0 if DEVICE == "cpu" else 1e-2)


@two_gpus
@pytest.mark.parametrize("grid", ["parallel.tp=2", "parallel.pp=2", "parallel.dp=2"])
@pytest.mark.parametrize("way", ["frozen, KL", "full"])
def test_two_ranks_follow_one_on_a_cpu(tune_arguments, tmp_path, way, grid):
    arguments = [*tune_arguments, *WAYS[way]]
    ours = train(tmp_path, [*arguments, grid], 2)
    for mine, theirs in zip(ours, train_on_cpu(tmp_path, arguments), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=3e-2)
