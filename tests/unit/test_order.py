"""Sorted units dealt to tensor ranks, and the file that keeps their order."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ee_scale.elastic.modules import Active
from ee_scale.elastic.order import UnitOrder, deal, undeal
from ee_scale.elastic.subnet import ElasticShape, SubnetSpec
from ee_scale.errors import UserError

SHAPE = ElasticShape(32, 4, 24, 3, 8, 2, head_dim_is_derived=False)


@pytest.fixture
def order() -> UnitOrder:
    generator = torch.Generator().manual_seed(0)
    rows = lambda size: torch.stack([torch.randperm(size, generator=generator) for _ in range(3)])  # noqa: E731
    return UnitOrder(torch.randperm(32, generator=generator), rows(4), rows(24), torch.tensor([1, 0, 2]))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize(("shape", "dim"), [((24,), 0), ((24, 5), 0), ((5, 24), 1)])
def test_what_is_dealt_can_be_put_together(tp: int, block: int, shape: tuple[int, ...], dim: int) -> None:
    whole = torch.randn(shape)
    parts = [deal(whole, dim, block, rank, tp) for rank in range(tp)]
    assert all(part.shape[dim] == 24 // tp and part.is_contiguous() for part in parts)
    assert torch.equal(undeal(parts, dim, block), whole)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("block", [1, 3])
def test_the_first_units_of_all_ranks_are_the_most_important_ones(tp: int, block: int) -> None:
    units = 12
    whole = torch.arange(units * block)
    parts = [deal(whole, 0, block, rank, tp) for rank in range(tp)]
    for k in range(tp, units + 1, tp):
        first = torch.cat([part[: k * block // tp] for part in parts])
        assert sorted(first.tolist()) == list(range(k * block))
        assert torch.equal(undeal([part[: k * block // tp] for part in parts], 0, block), whole[: k * block])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_active_sizes_are_those_of_the_rank(tp: int) -> None:
    active = Active(SHAPE, tp)
    active.select(SubnetSpec(20, 4, 16, (0,)))
    assert active.lengths == {"hidden": 20, "heads": 4 * 16 // tp, "kv": 4 * 8 // tp, "ffn": 16 // tp}
    cut = active.cut(torch.zeros(24 // tp, 32), ("ffn", "hidden"))
    assert cut.shape == (16 // tp, 20)
    assert active.cut(torch.zeros(7, 32), ("vocab", "hidden")).shape == (7, 20)


def test_rows_of_an_axis(order: UnitOrder) -> None:
    assert torch.equal(order.rows("hidden", None, SHAPE), order.hidden)
    assert torch.equal(order.rows("ffn", 2, SHAPE), order.ffn[2])
    group = order.groups[1].tolist()  # a group: one KV head of 8 rows, two query heads of 16
    assert order.rows("kv", 1, SHAPE).tolist() == [8 * g + i for g in group for i in range(8)]
    assert order.rows("heads", 1, SHAPE).tolist() == [16 * g + i for g in group for i in range(16)]
    assert order.rows("vocab", None, SHAPE) is None
    assert order.rows("whole", 0, SHAPE) is None


def test_the_identity_is_the_base_models_order() -> None:
    identity = UnitOrder.identity(SHAPE)
    assert identity.rows("heads", 2, SHAPE).tolist() == list(range(64))
    assert identity.hidden.tolist() == list(range(32))
    assert identity.drop.tolist() == [2, 1, 0]


def test_it_survives_its_file(order: UnitOrder, tmp_path: Path) -> None:
    order.save(tmp_path / "order.safetensors")
    again = UnitOrder.load(tmp_path / "order.safetensors", SHAPE)
    for name in ("hidden", "groups", "ffn", "drop"):
        assert torch.equal(getattr(order, name), getattr(again, name)), name


def test_damaged_files_are_refused(order: UnitOrder, tmp_path: Path) -> None:
    path = tmp_path / "order.safetensors"
    with pytest.raises(UserError, match=r"order.safetensors: not a whole file of unit orders"):
        UnitOrder.load(path, SHAPE)
    order.save(path)
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"order.safetensors: not a whole file of unit orders"):
            UnitOrder.load(path, SHAPE)
    path.write_bytes(whole)
    tensors = load_file(path)
    del tensors["ffn"]
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"not a whole file of unit orders .*ffn"):
        UnitOrder.load(path, SHAPE)


@pytest.mark.parametrize("name", ["hidden", "groups", "ffn", "drop"])
def test_a_unit_that_is_there_twice_is_refused(order: UnitOrder, name: str, tmp_path: Path) -> None:
    path = tmp_path / "order.safetensors"
    order.save(path)
    tensors = load_file(path)
    tensors[name][..., -1] = tensors[name][..., 0]
    save_file(tensors, path)
    with pytest.raises(UserError, match=f"'{name}' is no order of this model's units"):
        UnitOrder.load(path, SHAPE)


@pytest.mark.parametrize(
    ("other", "name", "size"),
    [
        (ElasticShape(16, 4, 24, 3, 8, 2, False), "hidden", r"\[16\]"),
        (ElasticShape(32, 2, 24, 3, 8, 4, False), "groups", r"\[3, 2\]"),
        (ElasticShape(32, 4, 48, 3, 8, 2, False), "ffn", r"\[3, 48\]"),
        (ElasticShape(32, 4, 24, 4, 8, 2, False), "groups", r"\[4, 4\]"),
    ],
)
def test_another_models_file_is_refused(order: UnitOrder, other: ElasticShape, name: str, size: str, tmp_path) -> None:
    order.save(tmp_path / "order.safetensors")
    with pytest.raises(UserError, match=f"'{name}' is no order of this model's units {size}"):
        UnitOrder.load(tmp_path / "order.safetensors", other)
