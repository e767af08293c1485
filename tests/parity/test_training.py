"""Losses, every gradient and the parameters after 10 AdamW steps equal plain autograd on transformers' own model."""

from functools import cache
from pathlib import Path

import pytest
import torch
from helpers.models import write_model
from helpers.reference import STEPS, Job, Record, relative_error, train
from helpers.spawn import spawn
from helpers.tuning import build_engine, join_shards, train_on_grid

from ee_scale.grid import Layout, join_grid, leave_grid

TOLERANCE = 1e-5  # relative; norm-wise for each tensor
KL_ROUNDING = 1e-6  # a KL of 0.1 is the small difference of fp32 log-probabilities of about 5

JOBS = {
    job.name: job
    for job in (
        Job("llama", "embedding", "low_rank", clip_grad=0.2),
        Job("llama", "embedding", "full", clip_grad=0.0),
        Job("llama", "norm", "tied", confidence=True, clip_grad=0.05),
        Job("qwen2", "norm", "low_rank", kl_weight=0.5, loss_weights=(0.3, 1.0, 2.0), clip_grad=0.3),
        # Each exit is clipped to 1, their common norm is above 1: DeepSpeed's own clipping (default 1) would show.
        Job("mistral", "norm", "full", clip_grad=1.0),
        Job("llama", "mlp", "tied", clip_grad=0.5),
        Job("gemma2", "mlp", "low_rank", tied=True, kl_weight=0.7, kl_temperature=2.0, confidence=True, clip_grad=0.5),
        Job("qwen2", "mlp", "full", tied=True, loss_weights=(0.25, 0.5, 1.0), clip_grad=0.5),
        Job("mistral", "layer", "tied", clip_grad=0.5),
        Job("qwen3", "layer", "low_rank", clip_grad=0.5, micro_batches=4),
        Job("gemma2", "layer", "full", clip_grad=0.5),
        Job("qwen3", "mlp", "low_rank", exit_layers=(2, 3, 5), kl_weight=0.5, kl_temperature=0.5, clip_grad=0.5),
        Job("olmo2", "mlp", "low_rank", clip_grad=0.5),
        Job("gemma2", "norm", "shortlist", tied=True, kl_weight=0.7, kl_temperature=2.0, clip_grad=0.3),
        Job("llama", "embedding", "shortlist", confidence=True, clip_grad=0.2),
        Job("qwen2", "mlp", "full", tied=True, clip_grad=0.5, steps=2),  # four tensor ranks on two cores are slow
        # Projections whose parts meet behind each of them: in the MLP, in attention.
        Job("phi3", "mlp", "low_rank", clip_grad=0.5, steps=2),
        Job("olmo2", "layer", "tied", clip_grad=0.5, steps=2),
        # Experts, without and with a shared one (and with a dense layer among them).
        Job("mixtral", "mlp", "full", kl_weight=0.5, clip_grad=0.5, steps=2),
        Job("qwen2_moe", "mlp", "low_rank", clip_grad=0.5, steps=2),
    )
}
MIXTURES = tuple(name for name, job in JOBS.items() if job.family in ("mixtral", "qwen2_moe"))
LONG_JOBS = tuple(name for name, job in JOBS.items() if job.steps == STEPS)
# Every such job runs on TP2 x PP2 and on one process; the other grids take those that stress them.
GRIDS = {
    (1, 1, 1): tuple(JOBS),
    (2, 1, 1): (
        *("llama-embedding-full", "gemma2-mlp-low_rank-kl2.0-confidence", "qwen3-layer-low_rank"),
        *("phi3-mlp-low_rank-2steps", "olmo2-layer-tied-2steps", *MIXTURES),
    ),
    (1, 2, 1): ("olmo2-mlp-low_rank", "qwen2-norm-low_rank-kl1.0", "mistral-layer-tied", *MIXTURES),
    (1, 1, 2): ("olmo2-mlp-low_rank", "llama-norm-tied-confidence", "gemma2-layer-full"),
    (2, 2, 1): (*LONG_JOBS, *MIXTURES),
    (2, 1, 2): ("llama-norm-tied-confidence", "qwen2-mlp-full"),
    (1, 2, 2): ("olmo2-mlp-low_rank", "mistral-norm-full", "gemma2-mlp-low_rank-kl2.0-confidence"),
    (2, 2, 2): ("llama-norm-tied-confidence", "gemma2-mlp-low_rank-kl2.0-confidence", "qwen3-layer-low_rank"),
    (4, 1, 1): ("qwen2-mlp-full-2steps",),
}
CASES = [(grid, name) for grid, names in GRIDS.items() for name in names]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    for family, tied in {(job.family, job.tied) for job in JOBS.values()}:
        write_model(folder / f"{family}-{tied}", family, tie_word_embeddings=tied)
    return folder


def model_of(root: Path, job: Job) -> Path:
    return root / f"{job.family}-{job.tied}"


@pytest.fixture(scope="module")
def found(root: Path) -> dict[tuple, list[Record]]:
    """Records by case and rank. Each world starts once and runs all its cases."""
    records: dict[tuple, list[Record]] = {}
    for world in (1, 2, 4, 8):
        cases = [case for case in CASES if Layout(*case[0]).world_size == world]
        by_rank = spawn(run_cases, world, root, cases)
        records |= {case: [records[case] for records in by_rank] for case in cases}
    return records


def run_cases(rank: int, root: Path, cases: list[tuple]) -> dict[tuple, Record]:
    records = {}
    for layout, name in cases:
        job = JOBS[name]
        grid = join_grid(Layout(*layout), torch.device("cpu"))
        engine = build_engine(model_of(root, job), job, grid)
        records[layout, name] = train_on_grid(engine, job, grid)
        leave_grid()
    return records


@cache
def reference(root: Path, name: str) -> Record:
    return train(model_of(root, JOBS[name]), JOBS[name])


def joined(records: list[Record], layout: Layout, expected: Record) -> Record:
    """One record from those of the ranks: losses averaged over the replicas, tensors whole."""
    whole = Record(losses=[{} for _ in expected.losses], norms=[{} for _ in expected.norms])
    for stage in range(layout.pp):
        ranks = [[records[layout.rank(stage, dp, tp)] for tp in range(layout.tp)] for dp in range(layout.dp)]
        for step, losses in enumerate(whole.losses):
            for k in ranks[0][0].losses[step]:
                replicas = torch.tensor([ranks[dp][0].losses[step][k] for dp in range(layout.dp)])
                losses[k] = replicas.mean(0).tolist()
        for replica in ranks:
            for one in replica:
                assert one.losses == replica[0].losses, "tensor ranks report different losses"
                assert one.norms == ranks[0][0].norms, "ranks of a stage see different gradient norms"
            assert join_shards([one.parameters for one in replica], expected.parameters).keys()
        for step, norms in enumerate(whole.norms):
            norms |= ranks[0][0].norms[step]
        whole.gradients |= join_shards([one.gradients for one in ranks[0]], expected.gradients)
        whole.parameters |= join_shards([one.parameters for one in ranks[0]], expected.parameters)
    return whole


def _id(case: tuple) -> str:
    (tp, pp, dp), name = case
    return f"tp{tp}-pp{pp}-dp{dp}-{name}"


@pytest.fixture
def pair(request: pytest.FixtureRequest, root: Path, found: dict[tuple, list[Record]]) -> tuple[Record, Record]:
    """(what the grid did, what the reference did)."""
    case = request.param
    expected = reference(root, case[1])
    return joined(found[case], Layout(*case[0]), expected), expected


on_every_case = pytest.mark.parametrize("pair", CASES, ids=_id, indirect=True)


@on_every_case
def test_losses(pair: tuple[Record, Record]) -> None:
    """Cross entropy and KL of each exit at each step."""
    actual, expected = pair
    for step, (losses, wanted) in enumerate(zip(actual.losses, expected.losses, strict=True)):
        assert losses.keys() == wanted.keys()
        for k in wanted:
            assert losses[k] == pytest.approx(wanted[k], rel=TOLERANCE, abs=KL_ROUNDING), f"exit {k} at step {step}"


@on_every_case
def test_gradients(pair: tuple[Record, Record]) -> None:
    """Every trainable tensor's gradient before the first step, and the norm of each exit's at each step."""
    actual, expected = pair
    assert actual.gradients.keys() == expected.gradients.keys()
    errors = {name: relative_error(actual.gradients[name], wanted) for name, wanted in expected.gradients.items()}
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}
    for norms, wanted in zip(actual.norms, expected.norms, strict=True):
        assert norms == pytest.approx(wanted, rel=TOLERANCE)


@on_every_case
def test_parameters_after_training(pair: tuple[Record, Record]) -> None:
    """Every trainable tensor after the clipped AdamW steps, and how far it came."""
    actual, expected = pair
    assert actual.parameters.keys() == expected.parameters.keys()
    errors = {name: relative_error(actual.parameters[name], wanted) for name, wanted in expected.parameters.items()}
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}


@pytest.mark.parametrize("name", JOBS)
def test_the_reference_trains_and_clips(root: Path, name: str) -> None:
    """Every tensor has a gradient and moves, and clipping cuts some of the exits' gradients."""
    record = reference(root, name)
    assert all(gradient.norm() > 0 for gradient in record.gradients.values())
    assert all(relative_error(record.start[n], record.parameters[n]) > 100 * TOLERANCE for n in record.parameters)
    most = JOBS[name].clip_grad
    assert any(norm > most > 0 for norms in record.norms for norm in norms.values()) or most == 0
