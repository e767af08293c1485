"""Which updates are left out, and that leaving one out leaves everything of its group as it was."""

from collections.abc import Sequence
from math import inf, nan

import pytest
import torch
from torch import nn

from ee_scale.config.groups import OptimConfig
from ee_scale.engine.clipping import CLIP_KEY
from ee_scale.engine.guard import DECAY, WARM_UP, UpdateGuard
from ee_scale.engine.setup import guarded_adamw

CPU = torch.device("cpu")


def judge(guard: UpdateGuard, *losses: float, squares: Sequence[float] = (1.0, 1.0)) -> set[int]:
    """Keys of groups that are not updated."""
    left_out = guard.judge(torch.tensor(losses), torch.tensor(squares[: len(losses)]))
    ((since, reasons),) = guard.verdicts()
    assert since == 0
    found = {key for key, flag in zip(guard.keys, left_out.tolist(), strict=True) if flag}
    assert found == set(reasons)
    return found


def counts(guard: UpdateGuard, key: int) -> tuple[int, int]:
    return int(guard.count(key)), guard.in_a_row[key]


@pytest.mark.parametrize(("loss", "square"), [(nan, 1.0), (inf, 1.0), (2.0, nan), (2.0, inf)])
def test_what_is_no_number_is_left_out(loss, square):
    guard = UpdateGuard([3], 0.0, CPU)
    assert judge(guard, loss, squares=[square]) == {3}
    assert counts(guard, 3) == (1, 1)
    assert "loss" in guard.reasons[3]
    assert judge(guard, 2.0) == set()
    assert (counts(guard, 3), guard.reasons) == ((1, 0), {})


def test_a_loss_that_explodes_is_left_out_once_its_mean_is_known():
    guard = UpdateGuard([3], 4.0, CPU)
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
    guard = UpdateGuard([3], 4.0, CPU)
    for _ in range(WARM_UP - 1):
        judge(guard, 1.0)
    assert judge(guard, 50.0) == set()
    assert judge(guard, 50.0) == {3}


def test_without_a_factor_any_number_is_good():
    guard = UpdateGuard([3], 0.0, CPU)
    for _ in range(2 * WARM_UP):
        judge(guard, 1.0)
    assert judge(guard, 1e30) == set()


def test_groups_are_judged_each_by_itself():
    guard = UpdateGuard([3, 6], 0.0, CPU)
    assert judge(guard, 1.0, nan) == {6}
    assert judge(guard, 1.0, 1.0) == set()
    assert (counts(guard, 3), counts(guard, 6)) == ((0, 0), (1, 0))


def test_the_running_mean_is_that_of_python_numbers():
    guard, mean = UpdateGuard([3], 4.0, CPU), None
    for loss in (torch.rand(50, generator=torch.Generator().manual_seed(0)) + 1).tolist():
        mean = DECAY * (loss if mean is None else mean) + (1 - DECAY) * loss
        judge(guard, loss)
    assert guard._means.item() == mean


def test_the_host_may_read_a_step_late():
    guard = UpdateGuard([3], 0.0, CPU)
    one = torch.ones(1)
    guard.judge(nan * one, one)
    assert list(guard.verdicts(late=1)) == []
    guard.judge(one, one)
    assert guard.in_a_row[3] == 0  # nothing is known yet
    ((since, reasons),) = guard.verdicts(late=1)
    assert (since, list(reasons), guard.in_a_row[3]) == (1, [3], 1)
    assert list(guard.verdicts()) == [(0, {})]
    assert counts(guard, 3) == (1, 0)


def test_nothing_of_a_judgement_is_read_by_the_host(monkeypatch):
    """On a GPU each of these would wait."""
    guard = UpdateGuard([3, 6], 4.0, CPU)

    def read(*_: object) -> None:
        raise AssertionError("read by the host")

    for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, read)
    for loss in (torch.ones(2), torch.full((2,), nan)):
        guard.judge(loss, torch.ones(2))


def test_a_group_that_is_left_out_stays_as_it_was():
    torch.manual_seed(0)
    parameters = {k: [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))] for k in (3, 6)}
    optimizer = guarded_adamw(parameters, OptimConfig(lr=0.1, weight_decay=0.5))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0, 0.5, 0.0]

    def step(*skipped: int) -> None:
        for group in optimizer.param_groups:
            left_out = group[CLIP_KEY] in skipped
            group["left_out"] = torch.tensor(float(left_out))
            for parameter in group["params"]:
                parameter.grad = torch.full_like(parameter, nan if left_out else 1.0)
        optimizer.step()

    step()
    before = {k: [parameter.detach().clone() for parameter in members] for k, members in parameters.items()}
    step(6)
    assert not torch.equal(parameters[3][0], before[3][0])
    for parameter, was in zip(parameters[6], before[6], strict=True):
        assert torch.equal(parameter, was)
        assert optimizer.state[parameter]["step"] == 1
    step()
    assert optimizer.state[parameters[6][0]]["step"] == 2
