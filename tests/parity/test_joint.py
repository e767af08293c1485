"""Joint training: losses, gradients, norms and parameters of every grid equal plain autograd on transformers' model."""

from functools import cache
from pathlib import Path

import pytest
import torch
from helpers.joint import (
    FINAL,
    JointJob,
    JointRecord,
    build_joint_engine,
    file_names,
    rows_of,
    train_on_grid,
    train_reference,
)
from helpers.models import write_model
from helpers.reference import relative_error
from helpers.spawn import spawn

from ee_scale.exits.stage import gather_whole
from ee_scale.grid import Layout, join_grid, leave_grid

TOLERANCE = 1e-5  # relative; norm-wise for each tensor

JOBS = {
    job.name: job
    for job in (
        JointJob("llama", "mlp", "low_rank", "full"),
        JointJob("qwen3", "norm", "tied", "full", tied=True),
        JointJob("gemma2", "mlp", "low_rank", "full", tied=True, checkpointing=True),
        JointJob("qwen2", "layer", "full", "full", tied=True, exit_layers=(2, 3, 5)),
        JointJob("mistral", "embedding", "low_rank", "full", confidence=True),
        JointJob("qwen3", "mlp", "low_rank", "low_rank", checkpointing=True),
        JointJob("llama", "norm", "tied", "low_rank", tied=True, targets=("attention",)),
        JointJob("gemma2", "layer", "full", "low_rank", targets=("mlp",)),
        JointJob("llama", "norm", "shortlist", "full", exit_layers=(1, 2, 5)),
        # Adapters beside projections whose parts are joined behind each: all, those of either half of a layer.
        JointJob("olmo2", "norm", "tied", "low_rank"),
        JointJob("phi3", "norm", "tied", "low_rank"),
        JointJob("glm4", "norm", "tied", "low_rank"),
    )
}
GRIDS = {
    (1, 1, 1): tuple(JOBS),
    (2, 1, 1): (
        *("llama-mlp-low_rank-full", "qwen3-mlp-low_rank-low_rank-checkpointing"),
        *("olmo2-norm-tied-low_rank", "phi3-norm-tied-low_rank", "glm4-norm-tied-low_rank"),
    ),
    (1, 2, 1): ("qwen2-layer-full-full-tied", "llama-norm-tied-low_rank-tied"),
    (1, 1, 2): ("qwen3-norm-tied-full-tied", "gemma2-layer-full-low_rank"),
    (2, 2, 1): tuple(JOBS),
    (1, 2, 2): ("qwen3-norm-tied-full-tied", "qwen3-mlp-low_rank-low_rank-checkpointing"),
    (2, 1, 2): ("gemma2-mlp-low_rank-full-tied-checkpointing",),
    (1, 4, 1): ("qwen3-norm-tied-full-tied", "llama-mlp-low_rank-full", "gemma2-layer-full-low_rank"),
    (2, 2, 2): ("gemma2-mlp-low_rank-full-tied-checkpointing", "llama-norm-tied-low_rank-tied"),
}
CASES = [(grid, name) for grid, names in GRIDS.items() for name in names]
on_every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "tp{}-pp{}-dp{}-".format(*case[0]) + case[1])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joint")
    for family, tied in {(job.family, job.tied) for job in JOBS.values()}:
        write_model(folder / f"{family}-{tied}", family, tie_word_embeddings=tied)
    return folder


def model_of(root: Path, job: JointJob) -> Path:
    return root / f"{job.family}-{job.tied}"


@pytest.fixture(scope="module")
def found(root: Path) -> dict[tuple, list]:
    """(record, start values) by case and rank. Each world starts once and runs all its cases."""
    records: dict[tuple, list] = {}
    for world in (1, 2, 4, 8):
        cases = [case for case in CASES if Layout(*case[0]).world_size == world]
        by_rank = spawn(run_cases, world, root, cases)
        records |= {case: [found[case] for found in by_rank] for case in cases}
    return records


def run_cases(rank: int, root: Path, cases: list[tuple]) -> dict[tuple, tuple[JointRecord, dict]]:
    records = {}
    for layout, name in cases:
        job = JOBS[name]
        grid = join_grid(Layout(*layout), torch.device("cpu"))
        engine = build_joint_engine(model_of(root, job), job, grid)
        start = {
            name: gather_whole(name, parameter, parameter.detach(), rows_of(name, engine.stage), grid).clone()
            for name, parameter in file_names(engine.stage).items()
        }
        records[layout, name] = (train_on_grid(engine, job, grid), start)
        leave_grid()
    return records


@pytest.fixture(scope="module")
def reference(root: Path, found: dict[tuple, list]):
    """What one process does, from the start values of the one-rank run."""
    return cache(lambda name: train_reference(model_of(root, JOBS[name]), JOBS[name], found[(1, 1, 1), name][0][1]))


def joined(case: tuple, found: dict[tuple, list]) -> JointRecord:
    """One record of all ranks; tensors that several ranks hold must be the same bits."""
    layout, records = Layout(*case[0]), [record for record, _ in found[case]]
    whole = JointRecord(norms=records[0].norms)
    for step in range(len(records[0].losses)):
        losses: dict = {}
        for rank, record in enumerate(records):
            _, _, tp = layout.coordinates(rank)
            if tp == 0:
                for key, loss in record.losses[step].items():
                    losses[key] = losses.get(key, 0.0) + loss / layout.dp
        whole.losses.append(losses)
    for record in records:
        assert record.norms == records[0].norms
        for kind in ("gradients", "parameters"):
            for name, tensor in getattr(record, kind).items():
                first = getattr(whole, kind).setdefault(name, tensor)
                assert torch.equal(first, tensor), f"{kind} of {name} differ between ranks"
    return whole


@on_every_case
def test_equal_to_one_process(case: tuple, found: dict[tuple, list], reference) -> None:
    actual, expected = joined(case, found), reference(case[1])
    for step, (losses, wanted) in enumerate(zip(actual.losses, expected.losses, strict=True)):
        assert losses == pytest.approx(wanted, rel=TOLERANCE), f"step {step}"
    assert actual.norms == pytest.approx(expected.norms, rel=TOLERANCE)
    for kind in ("gradients", "parameters"):
        mine, theirs = getattr(actual, kind), getattr(expected, kind)
        assert mine.keys() == theirs.keys()
        errors = {name: relative_error(mine[name], wanted) for name, wanted in theirs.items()}
        assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}, kind


@pytest.mark.parametrize("name", JOBS)
def test_the_reference_trains_and_clips(name: str, found: dict[tuple, list], reference) -> None:
    record, start = reference(name), found[(1, 1, 1), name][0][1]
    assert all(gradient.norm() > 0 for gradient in record.gradients.values())
    assert all(relative_error(start[n], record.parameters[n]) > 50 * TOLERANCE for n in record.parameters)
    assert FINAL in record.losses[0]
    assert max(record.norms) > JOBS[name].clip_grad
