"""Write a run's checkpoint from any grid, and read one into a run at any grid."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from ee_scale.artifact.checkpoint import STATE, checkpoints
from ee_scale.artifact.files import file_digest, write_json
from ee_scale.backbone.loading import TensorFolder
from ee_scale.engine.state import MOMENTS, restore_tensors, whole_tensors
from ee_scale.errors import UserError
from ee_scale.files import sync
from ee_scale.grid import Grid
from ee_scale.log import log
from ee_scale.training.parts import Run


def save_checkpoint(root: Path, run: Run, facts: dict[str, Any], keep: int) -> None:
    """Write a checkpoint of the run's step and drop all but the last `keep`. All ranks call it.

    `facts` go into state.json. A failed write on any rank raises on all, and the previous checkpoint stays.
    """
    grid = run.grid
    folder, temporary = root / f"step_{run.step:08d}", root / f".step_{run.step:08d}.tmp"
    _agree(grid, lambda: _clear(temporary) if grid.rank == 0 else None)
    digests = _agree(grid, lambda: _write_parts(temporary, run))
    if grid.rank == 0:
        files = {name: digest for part in digests if part for name, digest in part.items()}
        state = {"step": run.step, "consumed_samples": run.consumed_samples, **facts, "files": files}
    _agree(grid, lambda: _publish(temporary, folder, state, keep) if grid.rank == 0 else None)
    log.info("saved %s", folder)


def load_checkpoint(folder: Path, run: Run, state: dict[str, Any]) -> None:
    """Put a checkpoint into a run, at whatever grid. The files were checked before (`read_checkpoint`)."""
    tensors = checkpoint_tensors(folder, state)
    run.step = state["step"]
    training = [pair for part in run.saved_parts() for pair in part.training]
    if training:
        read = lambda name, key: tensors.read(name if key == "param" else f"{name}.{key}")  # noqa: E731
        restore_tensors(training, read, run.local, run.engine.optimizer, run.optimizer_steps)


@torch.no_grad()
def load_frozen(folder: Path, run: Run, state: dict[str, Any]) -> None:
    """Fill what was trained before the part that trains now. It needs no engine yet."""
    tensors = checkpoint_tensors(folder, state)
    run.step = state["step"]
    for part in run.saved_parts():
        for name, parameter in part.frozen:
            parameter.copy_(run.local(name, parameter, tensors.read(name)))


def checkpoint_tensors(folder: Path, state: dict[str, Any]) -> TensorFolder:
    """Every tensor of a checkpoint by name, whichever stage wrote it."""
    return TensorFolder(folder, [folder / name for name in state["files"]])


def _write_parts(folder: Path, run: Run) -> dict[str, str]:
    """Gather this stage's tensors, one at a time, and write them on one of its ranks. Returns file digests."""
    digests: dict[str, str] = {}
    failure: Exception | None = None
    for part in run.saved_parts():
        parameters, moments = {}, {}
        for name, parameter in part.frozen:
            parameters[name] = run.gather(name, parameter, parameter.detach().float()).cpu().contiguous()
        for name, tensors in whole_tensors(part.training, run.gather):
            parameters[name] = tensors["param"].contiguous()
            moments |= {f"{name}.{moment}": tensors[moment].contiguous() for moment in MOMENTS}
        try:
            for file_name, tensors in ((part.file, parameters), (part.moments_file, moments)):
                if tensors and failure is None and run.grid.writes_stage():
                    save_file(tensors, folder / file_name)
                    sync(folder / file_name)
                    digests[file_name] = file_digest(folder / file_name)
        except (OSError, SafetensorError) as error:
            failure = error  # the other ranks of the stage are waiting in the next gather
    if failure is not None:
        raise OSError(str(failure)) from failure
    return digests


def _clear(temporary: Path) -> None:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    for leftover in temporary.parent.glob(".step_*.tmp"):
        shutil.rmtree(leftover)
    temporary.mkdir()


def _publish(temporary: Path, folder: Path, state: dict[str, Any], keep: int) -> None:
    write_json(temporary / STATE, state)
    sync(temporary)
    if folder.exists():  # a resumed run that repeats the step of a refused or replaced checkpoint
        shutil.rmtree(folder)
    temporary.rename(folder)
    sync(folder.parent)
    for _, old in sorted(checkpoints(folder.parent).items())[:-keep]:
        shutil.rmtree(old)


def _agree(grid: Grid, action: Callable[[], Any]) -> list[Any]:
    """Run `action` on every rank, share what it returned, and fail everywhere if it failed anywhere."""
    result, failure = None, ""
    try:
        result = action()
    except OSError as error:
        failure = str(error)
    outcomes: list[Any] = [None] * grid.layout.world_size
    dist.all_gather_object(outcomes, (failure, result), group=grid.metrics_group)
    failures = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(outcomes) if text]
    if failures:
        raise UserError(f"checkpoint not written ({failures[0]}); earlier checkpoints are untouched")
    return [result for _, result in outcomes]
