"""Rank arithmetic, device choice and the launcher's words."""

import os

import pytest
import torch
import torch.distributed as dist
from helpers.spawn import spawn

from ee_scale import grid
from ee_scale.cli import main as command
from ee_scale.errors import BAD_INPUT, FAILED, REQUEUE, UserError
from ee_scale.grid import LaunchInfo, Layout, join_grid, launch_info, leave_grid, pick_device, world_size_message

LAYOUTS = [Layout(), Layout(2, 1, 1), Layout(2, 3, 4), Layout(1, 4, 2), Layout(4, 2, 1)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_and_coordinates_are_inverse(layout: Layout) -> None:
    assert layout.world_size == layout.tp * layout.pp * layout.dp
    coordinates = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert len(set(coordinates)) == layout.world_size
    assert [layout.rank(*coordinate) for coordinate in coordinates] == list(range(layout.world_size))


def test_tensor_ranks_are_neighbours_and_stages_far_apart() -> None:
    layout = Layout(tp=2, pp=3, dp=4)
    assert layout.coordinates(1) == (0, 0, 1)
    assert layout.coordinates(2) == (0, 1, 0)
    assert layout.coordinates(8) == (1, 0, 0)
    assert layout.rank(2, 3, 1) == 23


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_deepspeed_counts_the_same_way(layout: Layout) -> None:
    topology = layout.topology()
    for rank in range(layout.world_size):
        coordinate = topology.get_coord(rank)
        assert (coordinate.pipe, coordinate.data, coordinate.model) == layout.coordinates(rank)


@pytest.mark.parametrize("name", ["tp", "pp", "dp"])
def test_sizes_start_at_one(name: str) -> None:
    with pytest.raises(UserError, match=f"parallel.{name}=0: must be at least 1"):
        Layout(**{name: 0})


def test_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert launch_info() is None
    monkeypatch.setenv("RANK", "5")
    assert launch_info() is None
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert launch_info() == LaunchInfo(5, 5, 8)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert launch_info() == LaunchInfo(5, 1, 8)


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto", 3) == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match=r"parallel\.device=cuda: torch sees no GPU"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: [])
    assert pick_device("auto", 1) == torch.device("cuda", 1)
    assert pick_device("cpu", 1) == torch.device("cpu")
    with pytest.raises(UserError, match="local rank 2 has no GPU of its own: 2 GPUs on this node"):
        pick_device("auto", 2)


def test_world_size_message() -> None:
    assert world_size_message(Layout(2, 3, 1), 4) == "4 processes, but tp=2 x pp=3 (stages launched) x dp=1 needs 6"


class MetError(Exception):
    """Raised where a process group would be made."""


def test_nccl_is_told_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def meet(*args: object, **options: object) -> None:
        given.append((args[0], options["device_id"]))
        raise MetError

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", meet)
    for device in (torch.device("cuda", 1), torch.device("cpu")):
        with pytest.raises(MetError):
            join_grid(Layout(), device)
    assert given == [("nccl", torch.device("cuda", 1)), ("gloo", None)]


def threads_behind(rank: int) -> list[int]:
    """Threads of this process after one and after three grids in a world that was there before."""
    found = []
    for _ in range(3):
        join_grid(Layout(), torch.device("cpu"))
        leave_grid()
        found.append(len(os.listdir("/proc/self/task")))
    return found


def test_the_groups_of_a_grid_go_with_it() -> None:
    """Each group of gloo has threads of its own."""
    ((first, _, third),) = spawn(threads_behind, 1)
    assert third <= first


def come_and_go(rank: int) -> list[bool]:
    """Whether there is a process group: after leaving a world that was there, and in and after two of our own."""
    join_grid(Layout(), torch.device("cpu"))
    leave_grid()
    found = [dist.is_initialized()]
    dist.destroy_process_group()
    for _ in range(2):
        joined = join_grid(Layout(), torch.device("cpu"))
        dist.all_reduce(torch.ones(1), group=joined.dp_group)
        found.append(dist.is_initialized())
        leave_grid()
        found.append(dist.is_initialized())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # which the helper waits in
    return found


def test_a_world_of_our_own_is_left_behind() -> None:
    assert spawn(come_and_go, 1) == [[True, True, False, True, False]]


def test_nobody_waits_for_the_others_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that leaves in order destroys its groups, which waits for the others; one that fails aborts them."""
    called: list[str] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(grid.deepspeed.comm, "destroy_process_group", lambda: called.append("destroy"))
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: called.append("abort"))
    for code in (0, REQUEUE, FAILED, BAD_INPUT):
        monkeypatch.setattr(grid, "_met_here", True)
        monkeypatch.setattr(command, "_main", lambda arguments, code=code: code)
        assert command.main([]) == code
    assert called == ["destroy", "destroy", "abort", "abort"]

    def fail(arguments: object) -> int:
        raise MetError

    monkeypatch.setattr(grid, "_met_here", True)
    monkeypatch.setattr(command, "_main", fail)
    with pytest.raises(MetError):
        command.main([])
    assert called[4:] == ["abort"]
