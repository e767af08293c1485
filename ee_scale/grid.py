"""The process grid: tensor x pipeline x data, one rank order for Megatron-Core and DeepSpeed.

The only file that makes process groups or reads the launcher's environment (RANK, WORLD_SIZE, LOCAL_RANK).
"""

import gc
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from megatron.core import parallel_state

from ee_scale.errors import UserError
from ee_scale.gpu import check_capability

T = TypeVar("T")
_met_here = False  # whether the default process group is ours to destroy, and not of who calls us
_named_here = False  # whether LOCAL_RANK is ours
_groups_before: set[dist.ProcessGroup] = set()  # the caller's groups, when `join_grid` was called


@dataclass(frozen=True)
class Layout:
    """Rank arithmetic without processes: tp is fastest, then dp, pp slowest (Megatron's default order)."""

    tp: int = 1
    pp: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "dp"):
            if getattr(self, name) < 1:
                raise UserError(f"parallel.{name}={getattr(self, name)}: must be at least 1")

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(pp, dp, tp) of a global rank."""
        return rank // (self.tp * self.dp), rank // self.tp % self.dp, rank % self.tp

    def rank(self, pp: int, dp: int, tp: int) -> int:
        """Global rank of a coordinate."""
        return (pp * self.dp + dp) * self.tp + tp

    def topology(self) -> PipeModelDataParallelTopology:
        """The same order in DeepSpeed's words."""
        return PipeModelDataParallelTopology(num_pp=self.pp, num_mp=self.tp, num_dp=self.dp)


@dataclass(frozen=True)
class LaunchInfo:
    """What a launcher (torchrun, or SLURM through it) told this process."""

    rank: int
    local_rank: int
    world_size: int


def launch_info() -> LaunchInfo | None:
    """The launcher's word, or None when this process was started by hand."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    rank = int(os.environ["RANK"])
    return LaunchInfo(rank, int(os.environ.get("LOCAL_RANK", rank)), int(os.environ["WORLD_SIZE"]))


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """'auto', 'cpu' or 'cuda' -> this process's device. Raises `UserError` for a GPU that is missing or too old."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("parallel.device=cuda: torch sees no GPU; use parallel.device=cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU of its own: {torch.cuda.device_count()} GPUs on this node; "
            "start fewer processes per node"
        )
    check_capability(local_rank)
    return torch.device("cuda", local_rank)


@dataclass(frozen=True)
class Grid:
    """This process in the grid, with its live groups."""

    layout: Layout
    rank: int
    device: torch.device
    metrics_group: dist.ProcessGroup  # gloo over all ranks: small CPU messages beside the training traffic
    save_group: dist.ProcessGroup  # the same for the thread that writes checkpoints

    @property
    def stage(self) -> int:
        return self.layout.coordinates(self.rank)[0]

    @property
    def dp_rank(self) -> int:
        return self.layout.coordinates(self.rank)[1]

    @property
    def tp_rank(self) -> int:
        return self.layout.coordinates(self.rank)[2]

    @property
    def tp_group(self) -> dist.ProcessGroup:
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def dp_group(self) -> dist.ProcessGroup:
        return parallel_state.get_data_parallel_group()

    @property
    def pp_group(self) -> dist.ProcessGroup:
        return parallel_state.get_pipeline_model_parallel_group()

    def writes_stage(self) -> bool:
        """Whether this rank writes and reports for its stage (the others of the stage hold shards or copies)."""
        return self.dp_rank == 0 and self.tp_rank == 0

    def stages_group(self, stages: Sequence[int]) -> dist.ProcessGroup | None:
        """The ranks of those stages at this rank's place in replica and tensor group; None: its stage is not one.

        All ranks call it with the same stages.
        """
        mine = None
        for dp in range(self.layout.dp):
            for tp in range(self.layout.tp):
                ranks = [self.layout.rank(stage, dp, tp) for stage in stages]
                group = dist.new_group(ranks) if len(ranks) > 1 else None
                mine = group if self.rank in ranks else mine
        return mine

    def from_rank_0(self, value: T | None) -> T:
        """A small Python value of rank 0, on every rank."""
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=self.metrics_group)
        return box[0]


def join_grid(
    layout: Layout,
    device: torch.device,
    timeout_minutes: float = 30.0,
    init_method: str | None = None,
    rank: int | None = None,
) -> Grid:
    """Meet the other ranks and make every group.

    `init_method` and `rank` are for processes that were not started by torchrun (tests, one-process runs).
    Raises `UserError` if the world is not tp x pp x dp.
    """
    global _met_here, _groups_before
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        alone = init_method is None and launch_info() is None
        store = dist.HashStore() if alone else None
        rank = 0 if alone else -1 if rank is None else rank
        size = -1 if rank == -1 else layout.world_size  # -1: as the launcher says
        # NCCL would guess the device at the first barrier, and warn.
        bound = device if device.type == "cuda" else None
        dist.init_process_group(backend, init_method, timeout, size, rank, store, device_id=bound)
        _met_here = True
    if dist.get_world_size() != layout.world_size:
        raise UserError(world_size_message(layout, dist.get_world_size()))
    _groups_before = _groups()
    _join_deepspeed(device)
    # Of groups with some ranks only: the others take part in making one of NCCL, and would wait where it is gloo's.
    parallel_state.initialize_model_parallel(layout.tp, layout.pp, create_gloo_process_groups=False)
    metrics_group, save_group = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    grid = Grid(layout, dist.get_rank(), device, metrics_group, save_group)
    _assert_one_order(grid)
    return grid


def leave_grid() -> None:
    """Drop all groups, so that the same processes can join another grid; the world too, if `join_grid` made it.

    All ranks call it, when nothing is under way any more. Without it NCCL warns at the end of a process.
    """
    global _met_here
    parallel_state.destroy_model_parallel()
    _leave_deepspeed()
    if _met_here and dist.is_initialized():
        deepspeed.comm.destroy_process_group()
    elif dist.is_initialized():
        # A group of gloo has a thread that wakes up a hundred times a second, whether it is used or not.
        for group in _groups() - _groups_before:
            dist.destroy_process_group(group)
        gc.collect()  # engines that are gone still hold theirs, in cycles
    _met_here = False


def _groups() -> set[dist.ProcessGroup]:
    """All groups of this process."""
    return set(dist.distributed_c10d._world.pg_map)


def abandon_grid() -> None:
    """`leave_grid` after an error, which the others need not have met: waits for nobody."""
    global _met_here
    parallel_state.destroy_model_parallel()
    _leave_deepspeed()
    if _met_here and dist.is_initialized() and dist.get_backend() == "nccl":
        with suppress(Exception):  # what is left ends with the process
            dist.distributed_c10d._abort_process_group()
        _met_here = False


def world_size_message(layout: Layout, world_size: int) -> str:
    """Why a world of this size does not fit the grid."""
    return (
        f"{world_size} processes, but tp={layout.tp} x pp={layout.pp} (stages launched) x dp={layout.dp} "
        f"needs {layout.world_size}"
    )


def _join_deepspeed(device: torch.device) -> None:
    global _named_here
    if "LOCAL_RANK" not in os.environ:  # PipelineModule reads it
        os.environ["LOCAL_RANK"] = str(device.index or 0)
        _named_here = True
    if device.type == "cpu":
        # Serves inference_all_reduce only, and takes a compiler and 20 s or more on first use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False, dist_init_required=False)


def _leave_deepspeed() -> None:
    """Other libraries (accelerate) take a process with a LOCAL_RANK for one of many."""
    global _named_here
    if _named_here:
        os.environ.pop("LOCAL_RANK", None)
        _named_here = False


def _assert_one_order(grid: Grid) -> None:
    stage, dp_rank, tp_rank = grid.layout.coordinates(grid.rank)
    megatron = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    coordinate = grid.layout.topology().get_coord(grid.rank)
    assert megatron == (stage, dp_rank, tp_rank) == (coordinate.pipe, coordinate.data, coordinate.model)
