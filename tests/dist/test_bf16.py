"""bf16 (DeepSpeed's BF16_Optimizer): trains, and stays beside fp32."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.models import write_model
from helpers.reference import Job
from helpers.spawn import spawn
from helpers.tuning import build_engine, my_micro_batches

from ee_scale.grid import Layout, join_grid, leave_grid

STEPS = 8
JOBS = {
    # Every trainable parameter is whole on every tensor rank: DeepSpeed's own norm fails on tensor rank 1.
    "norm-tied": Job("llama", "norm", "tied", clip_grad=1.0, lr=0.02),
    "mlp-low_rank": Job("llama", "mlp", "low_rank", clip_grad=1.0, lr=5e-3),
    "layer-full": Job("qwen3", "layer", "full", clip_grad=1.0, lr=1e-3),
}
CASES = [
    *(((1, 1, 1), name) for name in JOBS),
    ((2, 1, 1), "norm-tied"),
    ((2, 1, 1), "layer-full"),
    ((1, 1, 2), "norm-tied"),
    ((1, 1, 2), "mlp-low_rank"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, dict]:
    root = tmp_path_factory.mktemp("bf16")
    for job in JOBS.values():
        write_model(root / job.family, job.family)
    results: dict[tuple, dict] = {}
    for world in (1, 2):
        cases = [case for case in CASES if Layout(*case[0]).world_size == world]
        results |= spawn(run_cases, world, root, cases)[0]
    return results


def run_cases(rank: int, root: Path, cases: list[tuple]) -> dict[tuple, dict]:
    found = {}
    for layout, name in cases:
        job = replace(JOBS[name], steps=STEPS)
        grid = join_grid(Layout(*layout), torch.device("cpu"))
        result = {}
        for bf16 in (False, True):
            engine = build_engine(root / job.family, job, grid, bf16=bf16)
            result["losses", bf16] = []
            for _ in range(STEPS):  # the same tokens every time, so that the loss has to fall
                losses = torch.stack(list(engine.train_step(my_micro_batches(0, job, grid)).values()))[
                    :, 0
                ].contiguous()
                dist.all_reduce(losses, group=grid.dp_group)
                result["losses", bf16].append(losses / grid.layout.dp)
            result["optimizer", bf16] = type(engine.optimizer).__name__
            result["dtypes", bf16] = {p.dtype for p in engine.stage.exit_heads.parameters()}
            result["backbone", bf16] = {p.dtype for p in engine.stage.backbone.parameters()}
        found[layout, name] = result
        leave_grid()
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: "tp{}-pp{}-dp{}-{}".format(*case[0], case[1]))
def test_bf16_stays_beside_fp32(case: tuple, found: dict[tuple, dict]) -> None:
    result = found[case]
    assert (result["optimizer", True], result["dtypes", True]) == ("BF16_Optimizer", {torch.bfloat16})
    assert (result["backbone", True], result["backbone", False]) == ({torch.bfloat16}, {torch.float32})
    fp32, bf16 = torch.stack(result["losses", False]), torch.stack(result["losses", True])
    assert (fp32[-1] < fp32[0] - 0.02).all(), fp32
    assert (bf16[-1] < bf16[0] - 0.02).all(), bf16
    torch.testing.assert_close(bf16, fp32, rtol=1e-2, atol=0)
    # The fall itself agrees too: an optimizer that loses small updates would stop early.
    torch.testing.assert_close(bf16[0] - bf16[-1], fp32[0] - fp32[-1], rtol=0.1, atol=0.01)


@pytest.mark.parametrize("case", [case for case in CASES if case[0] != (1, 1, 1)], ids=str)
def test_the_grid_does_not_change_the_losses(case: tuple, found: dict[tuple, dict]) -> None:
    """bf16 rounds differently when sums are cut, so it is held to its own precision; fp32 to its own."""
    alone = found[(1, 1, 1), case[1]]
    for bf16, tolerance in ((False, 1e-5), (True, 5e-3)):
        losses, expected = (torch.stack(result["losses", bf16]) for result in (found[case], alone))
        torch.testing.assert_close(losses, expected, rtol=tolerance, atol=0)
