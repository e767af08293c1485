"""A supernet's losses, gradients and parameters at any grid, against plain transformers models in one process."""

from pathlib import Path

import pytest
import torch
from helpers.spawn import spawn
from helpers.supernet import Reference, SupernetJob, run_on_grid, write_base

from ee_scale.elastic.sampling import ROLES
from ee_scale.grid import Layout, join_grid, leave_grid

JOBS = {
    "llama": SupernetJob("llama"),
    "llama, live teacher, tied, exits": SupernetJob("llama", teacher="live", tied=True, exits=(1, 3)),
    "llama, whole updates": SupernetJob("llama", rank=0, gamma=0.0, targets=("attention", "mlp")),
    "qwen2": SupernetJob("qwen2", gamma=-0.5),
    "qwen3": SupernetJob("qwen3", targets=("attention",), feature_weight=0.0),
    "llama, kept teacher, palette": SupernetJob(
        "llama", cache=4, full_every=2, palette_share=0.8, steps=(1, 3), tied=True
    ),
    "bert": SupernetJob("bert"),
    "bert, kept teacher, palette": SupernetJob("bert", cache=3, full_every=2, palette_share=0.8, steps=(1, 3)),
    "bert, live teacher": SupernetJob("bert", teacher="live", gamma=1.0),
    "roberta": SupernetJob("roberta"),
    "modernbert": SupernetJob("modernbert", exits=(2,)),
}
# One process runs everything; two and four share the cases out, so that each is cut by tensors and by stages.
TWO = {
    Layout(2, 1, 1): ["llama", "qwen2", "bert, live teacher", "bert, kept teacher, palette", "roberta"],
    Layout(1, 2, 1): ["llama", "llama, whole updates"],
}
FOUR = {
    Layout(4, 1, 1): ["llama"],
    Layout(2, 2, 1): [
        "llama, live teacher, tied, exits",
        "qwen3",
        "bert",
        "llama, kept teacher, palette",
        "modernbert",
    ],
    Layout(1, 2, 2): ["llama", "bert, live teacher", "bert, kept teacher, palette"],
    Layout(2, 1, 2): ["llama, whole updates", "bert", "modernbert"],
    Layout(1, 4, 1): ["qwen2", "bert", "roberta", "modernbert"],
}
CASES = [(1, Layout(1, 1, 1), name) for name in JOBS]
CASES += [(layout.world_size, layout, name) for layout, names in (TWO | FOUR).items() for name in names]
WORLDS = (4, 2, 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("supernet")
    return {name: write_base(root / str(i), job) for i, (name, job) in enumerate(JOBS.items())}


@pytest.fixture(scope="module")
def references(folders: dict[str, Path]) -> dict[str, dict]:
    return {name: Reference(folder, JOBS[name]).run() for name, folder in folders.items()}


@pytest.fixture(scope="module")
def runs(folders: dict[str, Path]) -> dict[int, list[dict]]:
    return {world: spawn(run_cases, world, world, folders) for world in WORLDS}


def run_cases(rank: int, world: int, folders: dict[str, Path]) -> dict:
    found = {}
    for _, layout, name in (case for case in CASES if case[0] == world):
        grid = join_grid(layout, torch.device("cpu"))
        found[layout, name] = run_on_grid(folders[name], JOBS[name], grid)
        leave_grid()
    return found


def close(mine: torch.Tensor, theirs: torch.Tensor, tolerance: float, least: float = 0.0) -> bool:
    """Norm-wise; `least` is for gradients that are zero but for rounding (an encoder's key biases)."""
    return float((mine - theirs).norm()) <= tolerance * max(float(theirs.norm()), least)


@pytest.mark.parametrize(("world", "layout", "name"), CASES, ids=str)
def test_equals_plain_transformers(world: int, layout: Layout, name: str, runs: dict, references: dict) -> None:
    reference, results = references[name], [found[layout, name] for found in runs[world]]
    norms = {stage: max(float(g.norm()) for k, g in reference["gradients"].items() if k[0] == stage) for stage in "01"}
    for rank, result in enumerate(results):
        for key, gradient in result["gradients"].items():
            least = 1e-3 * norms[key.split(".")[0]]
            assert close(gradient, reference["gradients"][key], 1e-5, least), f"gradient of {key} on rank {rank}"
        for key, parameter in result["parameters"].items():
            assert close(parameter, reference["parameters"][key], 1e-4), f"{key} on rank {rank}"
        assert result["norms"] == pytest.approx(reference["norms"], rel=1e-4)
        assert result["streams"] == results[0]["streams"]
    owned = {key for result in results for key in result["gradients"]}
    assert owned == set(reference["gradients"])
    for step, expected in enumerate(reference["losses"]):
        # Features are local to a stage, the others are known to the last one; replicas average.
        summed = sum(result["losses"][step] for result in results) / layout.tp / layout.dp
        for role, values in expected.items():
            if JOBS[name].feature_weight == 0:
                values[2] = 0.0  # not computed
            torch.testing.assert_close(summed[ROLES.index(role)], values, rtol=2e-5, atol=1e-6)
