"""bf16 joint training: falls beside fp32, and the copies of one output matrix stay the same bits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from helpers.joint import FINAL, JointJob, build_joint_engine
from helpers.models import write_model
from helpers.reference import micro_batches
from helpers.spawn import spawn

from ee_scale.grid import Layout, join_grid, leave_grid

STEPS = 6
JOB = JointJob("qwen3", "norm", "tied", "full", tied=True, exit_layers=(1, 4), loss_weights=(0.5, 0.5), clip_grad=1.0)
LAYOUTS = [(1, 2, 1), (2, 1, 1), (1, 1, 2)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return spawn(run_cases, 2, write_model(tmp_path_factory.mktemp("joint_bf16"), "qwen3", tie_word_embeddings=True))


def run_cases(rank: int, root: Path) -> dict[tuple, dict]:
    found = {}
    for layout in LAYOUTS:
        grid = join_grid(Layout(*layout), torch.device("cpu"))
        result = {}
        for bf16 in (False, True):
            engine = build_joint_engine(root, replace(JOB), grid, bf16=bf16)
            each = JOB.micro_batches // grid.layout.dp
            mine = slice(grid.dp_rank * each, (grid.dp_rank + 1) * each)
            losses = []
            for _ in range(STEPS):  # the same tokens every time, so that the loss has to fall
                found_losses = engine.train_step(iter(micro_batches(0, JOB.micro_batches)[mine]))
                total = found_losses[FINAL][:1].clone() if FINAL in found_losses else torch.zeros(1)
                dist.all_reduce(total, group=grid.dp_group)
                losses.append(total.item() / grid.layout.dp)
            matrix = engine.stage.trained["model.embed_tokens.weight"]
            result[bf16] = {
                "losses": losses,
                "optimizer": type(engine.optimizer).__name__,
                "matrix": matrix.detach().clone(),
                "master": safe_get_full_fp32_param(matrix).clone(),
                "copied": engine.stage.copied is not None,
            }
        found[layout] = result
        leave_grid()
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bf16_stays_beside_fp32(layout: tuple, found: list[dict]) -> None:
    last = found[-1][layout]  # the rank with the model's own loss
    fp32, bf16 = torch.tensor(last[False]["losses"]), torch.tensor(last[True]["losses"])
    assert last[True]["optimizer"] == "BF16_Optimizer"
    assert fp32[-1] < fp32[0] - 0.05
    torch.testing.assert_close(bf16, fp32, rtol=1e-2, atol=0)
    torch.testing.assert_close(bf16[0] - bf16[-1], fp32[0] - fp32[-1], rtol=0.1, atol=0.01)


@pytest.mark.parametrize("bf16", [False, True])
def test_copies_on_two_stages_stay_equal(bf16: bool, found: list[dict]) -> None:
    first, last = (rank[(1, 2, 1)][bf16] for rank in found)
    assert first["copied"]
    assert last["copied"]
    assert torch.equal(first["matrix"], last["matrix"])
    assert torch.equal(first["master"], last["master"])
