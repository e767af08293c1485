"""Train on the first GPU, or on a CPU where there is none: then only CUDA itself stays unproven."""

import json
from pathlib import Path

import pytest
import torch

from helpers.cli import run_cli

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = [f"parallel.device={DEVICE}", "train.precision=bf16"]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def train(folder: Path, arguments: list[str], world_size: int = 1, **options: int) -> list[dict]:
    """Train in `folder`/run in bf16 on the device; the lines of its metrics."""
    finished = run_cli([*arguments, *BF16, "out=run"], folder, world_size, device=DEVICE, **options)
    assert finished.codes == [0] * world_size, finished.outputs
    assert "backbone unchanged" in finished.output or "backbone=full" in arguments
    return metrics(folder / "run")


def train_on_cpu(folder: Path, arguments: list[str]) -> list[dict]:
    """The same in fp32 on a CPU."""
    finished = run_cli([*arguments, "parallel.device=cpu", "train.precision=fp32", "out=reference"], folder)
    assert finished.code == 0, finished.output
    return metrics(folder / "reference")


def metrics(run: Path) -> list[dict]:
    """What a run has written of each step."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
