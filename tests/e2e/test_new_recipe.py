"""A recipe that the package does not have: one file, and the driver, `check` and `trace` know it."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from helpers.cli import Finished, run_cli
from safetensors.torch import load_file

GRID = ["parallel.tp=2", "parallel.pp=2"]


def know_norms(rank: int) -> None:
    importlib.import_module("helpers.norms")


@pytest.fixture(scope="module")
def arguments(tune_arguments: list[str]) -> list[str]:
    """`norms` has no file in configs/, so no groups and no short names of their fields."""
    full = {"model": "model.path", "data": "data.path"}
    named = [word.partition("=") for word in tune_arguments[1:] if not word.startswith("exits.rank")]
    return ["norms", *(f"{full.get(key, key)}={value}" for key, _, value in named), "backbone.mode=full", "out=run"]


def start(arguments: list[str], folder: Path, ranks: int = 4, **options: int) -> Finished:
    return run_cli(arguments, folder, world_size=ranks, inject=know_norms, **options)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"]["final"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_trains_saves_and_resumes_on_a_grid(arguments: list[str], tmp_path: Path) -> None:
    whole = start([*arguments, *GRID, "out=whole"], tmp_path)
    assert whole.codes == [0] * 4, whole.output
    killed = start([*arguments, *GRID], tmp_path, die_at_step=5)
    assert killed.codes[0] == -9
    again = start([*arguments, *GRID], tmp_path)
    assert again.codes == [0] * 4, again.output
    assert "continuing from" in again.output
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    norms: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "run/checkpoints/step_00000008").glob("backbone_0*.safetensors"):
        norms |= load_file(path)
    assert len(norms) == 4 * 2 + 1
    for name, norm in norms.items():
        assert "norm" in name
        assert not torch.equal(norm, torch.ones_like(norm)), name  # where they started


def test_its_losses_are_those_of_one_process(arguments: list[str], tmp_path: Path) -> None:
    assert start([*arguments, "out=one"], tmp_path, ranks=1).code == 0
    assert start([*arguments, *GRID, "out=four"], tmp_path).code == 0
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_it_is_checked_and_traced(arguments: list[str], tmp_path: Path) -> None:
    checked = start(["check", *arguments, *GRID], tmp_path, ranks=1)
    assert checked.code == 0, checked.output
    assert "4 = tp 2 x pp 2 x dp 1" in checked.output
    traced = start(["trace", *arguments, *GRID, "logging.trace_after=1", "logging.trace_steps=2"], tmp_path)
    assert traced.codes == [0] * 4, traced.output
    assert (tmp_path / "run/trace/timeline.json").is_file()
    assert not (tmp_path / "run/checkpoints").exists()
