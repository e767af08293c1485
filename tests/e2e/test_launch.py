"""Real processes, the way a person starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers.cli import run_cli
from helpers.launcher import end

ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}


def start(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def losses(metrics: Path) -> list[dict]:
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def wait_for_step(step: int, metrics: Path, command: subprocess.Popen) -> None:
    while command.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") >= step):
        time.sleep(0.01)


def test_debug_config_survives_a_killed_rank_and_passes_signals_on(tmp_path):
    settings = ["tune", "+debug=cpu", "train.steps=150", "logging.every=1", "train.save_every=5", "train.keep=99"]
    command = [sys.executable, "-m", "ee_scale", *settings, "launcher.max_restarts=1"]
    metrics = tmp_path / "runs/debug_cpu/metrics.jsonl"
    options = {"cwd": tmp_path, "env": ENVIRONMENT, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **options) as first:
        try:
            wait_for_step(7, metrics, first)
            while not list(metrics.parent.glob("checkpoints/step_*")) and first.poll() is None:
                time.sleep(0.01)
            (victim,) = (rank for rank in psutil.Process(first.pid).children() if rank.environ()["LOCAL_RANK"] == "1")
            victim.kill()
            killed_at = metrics.read_text().count("\n")
            wait_for_step(killed_at + 10, metrics, first)  # its ranks are started again, and go on
            first.send_signal(signal.SIGTERM)
            told = first.communicate()[1]
        finally:
            end(first.pid)
    assert first.returncode == 75, told
    assert told.count("continuing from runs/debug_cpu/checkpoints/step_") == 1, told
    assert "Traceback" not in told
    assert json.loads((tmp_path / "runs/debug_cpu/stopped.json").read_text())["code"] == 75
    finished = start(command, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("continuing from") == 1
    undisturbed = run_cli([*settings, "out=undisturbed"], tmp_path, 2)
    assert undisturbed.codes == [0, 0]
    assert losses(metrics) == losses(tmp_path / "undisturbed/metrics.jsonl")  # to the last digit
    assert "next: ee-scale export src=runs/debug_cpu" in finished.stderr
    assert {name for name in os.listdir(tmp_path) if not name.startswith(".")} == {"runs", "undisturbed"}


def test_torchrun(tune_arguments, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = start([*torchrun, "-m", "ee_scale", *tune_arguments, "parallel.tp=2", "out=run"], tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 8


def test_a_failing_rank_ends_the_command(tune_arguments, tmp_path, model_dir):
    # Bad input that only a rank can see: a tensor of the wrong shape.
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(model_dir, tmp_path / "odd")
    tensors = load_file(tmp_path / "odd" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][:-1].clone()
    save_file(tensors, tmp_path / "odd" / "model.safetensors", metadata={"format": "pt"})
    command = [sys.executable, "-m", "ee_scale", *tune_arguments, "model=odd", "parallel.pp=2", "out=run"]
    finished = start(command, tmp_path)
    assert finished.returncode != 0
    assert "error: odd: 'model.layers.1.mlp.up_proj.weight' has shape" in finished.stderr


def test_demo(tmp_path):
    settings = ["model=tiny", "pretrain_minutes=0.05", "steps=3", "new_tokens=8", f"cache_dir={tmp_path / 'cache'}"]
    command = [sys.executable, "-m", "ee_scale", "demo", *settings]
    done = start(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "loss at copy-init" in done.stdout
    assert (tmp_path / "runs/demo/exits.png").is_file()
    assert (tmp_path / "runs/demo/model/modeling_early_exit.py").is_file()
    assert "yes" in done.stdout.split("lossless")[1]
    again = start([*command, "prompt=def f(x):"], tmp_path)  # the exits are there
    assert again.returncode == 0, again.stderr
    assert "exits of an earlier demo" in again.stdout
    assert "step" not in again.stderr


def test_commands_load_no_compiler(tmp_path):
    """Megatron's fuser would load torch's inductor, which takes a second; nothing here is compiled."""
    code = (
        "import sys; from ee_scale.libraries import prepare_libraries; prepare_libraries(); import ee_scale.cli.train;"
        "assert 'megatron.core.jit' in sys.modules; assert 'torch._inductor.compile_fx' not in sys.modules"
    )
    done = start([sys.executable, "-c", code], tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["tune", "--help"]])
def test_help_is_quick(arguments, tmp_path):
    code = "import sys; from ee_scale.cli.main import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    assert start([sys.executable, "-c", code, *arguments], tmp_path).returncode == 0
