"""A SLURM job of two nodes with two ranks each, stopped by a signal in the middle and queued again; real processes."""

import json

from helpers.slurm import Slurm

from ee_scale.cli.main import main

STEPS = 40
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}


def test_a_job_that_is_queued_again_goes_on(tmp_path, monkeypatch):
    slurm = Slurm(tmp_path / "slurm", ENVIRONMENT)
    monkeypatch.setenv("PATH", slurm.path)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    grid = ["parallel.pp=2", "parallel.dp=2", "launcher=slurm", "launcher.nodes=2", "launcher.max_restarts=1"]
    steps = [f"train.steps={STEPS}", "train.save_every=1000", "logging.every=1"]
    assert main(["launch", "tune", "+debug=cpu", *grid, *steps, "out=my run"]) == 0

    metrics = tmp_path / "my run/metrics.jsonl"
    (job,) = slurm.submitted()
    codes = slurm.run(job, signal_when=lambda: metrics.is_file() and metrics.read_text().count("\n") >= 3)
    output = (tmp_path / "my run/launch/slurm-100.out").read_text()
    assert codes == [75, 0], output
    assert slurm.requeued() == ["100"]
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert "continuing from" in output
    assert "Traceback" not in output
