"""Which updates are left out, and that leaving one out leaves everything of its group as it was."""

from math import inf, nan

import pytest
import torch
from torch import nn

from ee_scale.config.groups import OptimConfig
from ee_scale.engine.clipping import CLIP_KEY
from ee_scale.engine.guard import WARM_UP, UpdateGuard
from ee_scale.engine.setup import guarded_adamw


def judge(guard: UpdateGuard, loss: float, square: float = 1.0, key: int = 3) -> set[int]:
    return guard.judge([key], torch.tensor([loss]), torch.tensor([square]))


@pytest.mark.parametrize(("loss", "square"), [(nan, 1.0), (inf, 1.0), (2.0, nan), (2.0, inf)])
def test_what_is_no_number_is_left_out(loss, square):
    guard = UpdateGuard(0.0)
    assert judge(guard, loss, square) == {3}
    assert (guard.skipped[3], guard.in_a_row[3]) == (1, 1)
    assert "loss" in guard.reasons[3]
    assert judge(guard, 2.0) == set()
    assert (guard.skipped[3], guard.in_a_row[3], guard.reasons) == (1, 0, {})


def test_a_loss_that_explodes_is_left_out_once_its_mean_is_known():
    guard = UpdateGuard(4.0)
    assert judge(guard, 100.0) == set()  # nothing to compare with yet
    for _ in range(200):
        assert judge(guard, 2.0) == set()
    assert judge(guard, 7.9) == set()
    assert judge(guard, 30.0) == {3}
    assert guard.reasons[3].startswith("loss 30 is above 4 times its running mean 2.")
    for _ in range(50):  # what is left out is not learned from
        assert judge(guard, 30.0) == {3}
    assert guard.in_a_row[3] == 51


def test_the_mean_needs_some_updates():
    guard = UpdateGuard(4.0)
    for _ in range(WARM_UP - 1):
        judge(guard, 1.0)
    assert judge(guard, 50.0) == set()
    assert judge(guard, 50.0) == {3}


def test_without_a_factor_any_number_is_good():
    guard = UpdateGuard(0.0)
    for _ in range(2 * WARM_UP):
        judge(guard, 1.0)
    assert judge(guard, 1e30) == set()


def test_groups_are_judged_each_by_itself():
    guard = UpdateGuard(0.0)
    assert guard.judge([3, 6], torch.tensor([1.0, nan]), torch.tensor([1.0, 1.0])) == {6}
    assert guard.judge([3, 6], torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0])) == set()
    assert (guard.skipped[3], guard.skipped[6]) == (0, 1)


def test_a_group_that_is_left_out_stays_as_it_was():
    torch.manual_seed(0)
    parameters = {k: [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))] for k in (3, 6)}
    optimizer = guarded_adamw(parameters, OptimConfig(lr=0.1, weight_decay=0.5))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0, 0.5, 0.0]

    def step(*skipped: int) -> None:
        for group in optimizer.param_groups:
            group["skipped"] = group[CLIP_KEY] in skipped
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    step()
    before = {k: [parameter.detach().clone() for parameter in members] for k, members in parameters.items()}
    step(6)
    assert not torch.equal(parameters[3][0], before[3][0])
    for parameter, was in zip(parameters[6], before[6], strict=True):
        assert torch.equal(parameter, was)
        assert optimizer.state[parameter]["step"] == 1
        assert parameter.grad is not None  # DeepSpeed looks at it afterwards
    step()
    assert optimizer.state[parameters[6][0]]["step"] == 2
