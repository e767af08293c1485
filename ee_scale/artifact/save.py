"""Write a run's checkpoint from any grid, and read one into a run at any grid."""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from ee_scale.artifact.checkpoint import STATE, checkpoints
from ee_scale.backbone.loading import TensorFolder
from ee_scale.backbone.narrowing import fill
from ee_scale.engine.staging import Staging
from ee_scale.engine.state import MOMENTS, restore_tensors, whole_tensors
from ee_scale.files import file_digest, sync
from ee_scale.grid import Grid
from ee_scale.log import log
from ee_scale.reading import write_json
from ee_scale.training.recipe import BEST, Run


class NotWrittenError(Exception):
    """A checkpoint could not be written on some rank; raised on all, as 'rank 3: No space left on device'."""


@dataclass(frozen=True)
class Snapshot:
    """A run's trained state at one step, out of the optimizer's reach.

    Attributes:
        state: what goes into state.json beside the digests.
        files: whole fp32 tensors on the CPU, by file and name; on the rank that writes its stage, empty elsewhere.
    """

    step: int
    state: dict[str, Any]
    files: dict[str, dict[str, torch.Tensor]]


@torch.no_grad()
def take_snapshot(run: Run, facts: dict[str, Any]) -> Snapshot:
    """Copy the trained state, parameter by parameter. A collective over the groups of the training; all ranks call it.

    It costs the memory of parameters and moments (12 bytes per trained parameter) on the rank that writes its stage,
    and that of one parameter on the others.
    """
    writes, staging = run.grid.writes_stage(), Staging(run.grid.device)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for part in run.saved_parts():
        parameters: dict[str, torch.Tensor] = {}
        moments: dict[str, torch.Tensor] = {}
        for name, parameter in part.frozen:
            whole = run.gather(name, parameter, parameter.detach().float())
            if writes:
                on_host = staging.to_host(whole)  # on a CPU it may be the live tensor itself
                parameters[name] = (on_host.clone() if on_host is whole else on_host).contiguous()
        for name, tensors in whole_tensors(part.training, run.gather, staging):
            if writes:
                parameters[name] = tensors["param"].contiguous()
                moments |= {f"{name}.{moment}": tensors[moment].contiguous() for moment in MOMENTS}
        if writes and part.training:
            made = run.optimizer_steps - int(run.engine.guard.count(part.group))
            moments[_updates(part.group)] = torch.tensor([made])
        files |= {name: tensors for name, tensors in ((part.file, parameters), (part.moments_file, moments)) if tensors}
    return Snapshot(run.step, {"step": run.step, "consumed_samples": run.consumed_samples, **facts}, files)


def write_snapshot(root: Path, snapshot: Snapshot, grid: Grid, keep: int) -> Path:
    """Write a snapshot below `root`, publish it by a rename, then drop all but the last `keep` checkpoints and
    the best one (`BEST` in the state names its step).

    All ranks call it, in whatever thread: they talk in `grid.save_group` alone. Returns the checkpoint's folder.
    Raises `NotWrittenError` on all ranks if it failed on one; what was there before is untouched then.
    """
    folder, temporary = root / f"step_{snapshot.step:08d}", root / f".step_{snapshot.step:08d}.tmp"
    try:
        _agree(grid, lambda: _clear(temporary) if grid.rank == 0 else None)
        digests = _agree(grid, lambda: _write_files(temporary, snapshot.files))
        files = {name: digest for part in digests for name, digest in part.items()}
        state = {**snapshot.state, "files": files}
        _agree(grid, lambda: _publish(temporary, folder, state, keep) if grid.rank == 0 else None)
    except NotWrittenError:
        if grid.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # a full disk wants the space back
        raise
    return folder


def _updates(group: int) -> str:
    """Name of the number of updates that a clip group had."""
    return f"updates.{group}"


def load_checkpoint(folder: Path, run: Run, state: dict[str, Any]) -> None:
    """Put a checkpoint into a run, at whatever grid. The files were checked before (`read_checkpoint`)."""
    tensors = checkpoint_tensors(folder, state)
    run.step = state["step"]
    training = [pair for part in run.saved_parts() for pair in (*part.training, *part.copies)]
    if not training:
        return

    def read(name: str, key: str) -> torch.Tensor:
        return tensors.read(name if key == "param" else f"{name}.{key}")

    def updates(group: int) -> int:
        made = int(tensors.read(_updates(group))) if _updates(group) in tensors else run.optimizer_steps
        run.engine.guard.recall(group, run.optimizer_steps - made)
        return made

    restore_tensors(training, read, run.local, run.engine.optimizer, updates)


@torch.no_grad()
def load_frozen(folder: Path, run: Run, state: dict[str, Any]) -> None:
    """Fill what was trained before the part that trains now. It needs no engine yet."""
    tensors = checkpoint_tensors(folder, state)
    run.step = state["step"]
    for part in run.saved_parts():
        for name, parameter in part.frozen:
            fill(parameter, run.local(name, parameter, tensors.read(name)), name)


def checkpoint_tensors(folder: Path, state: dict[str, Any]) -> TensorFolder:
    """Every tensor of a checkpoint by name, whichever stage wrote it."""
    return TensorFolder(folder, [folder / name for name in state["files"]])


def _write_files(folder: Path, files: dict[str, dict[str, torch.Tensor]]) -> dict[str, str]:
    """Digests by file name."""
    digests = {}
    for name, tensors in files.items():
        save_file(tensors, folder / name)
        sync(folder / name)
        digests[name] = file_digest(folder / name)
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
        _drop(folder)
    temporary.rename(folder)
    sync(folder.parent)
    best = state.get(BEST, {}).get("step")
    for step, old in sorted(checkpoints(folder.parent).items())[:-keep]:
        try:
            if step != best:
                _drop(old)
        except OSError as error:
            log.warning("cannot delete the old checkpoint %s (%s)", old, _reason(error))


def _drop(folder: Path) -> None:
    """Delete a checkpoint. Under its name it is whole or gone; a rest is deleted by the next save."""
    aside = folder.with_name(f".{folder.name}.old.tmp")
    folder.rename(aside)
    shutil.rmtree(aside)


def _agree(grid: Grid, action: Callable[[], Any]) -> list[Any]:
    """Run `action` on every rank, share what it returned, and fail everywhere if it failed anywhere."""
    result, failure = None, ""
    try:
        result = action()
    except Exception as error:  # whatever it is: the others wait in the collective
        failure = _reason(error)
        log.debug("writing a checkpoint failed", exc_info=True)
    outcomes: list[Any] = [None] * grid.layout.world_size
    dist.all_gather_object(outcomes, (failure, result), group=grid.save_group)
    failures = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(outcomes) if text]
    if failures:
        raise NotWrittenError(failures[0])
    return [result for _, result in outcomes]


def _reason(error: Exception) -> str:
    """What the system said, in its words: 'No space left on device'."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if found := re.search(r"I/O error: (.+) \(os error \d+\)", str(error)):  # as safetensors wraps it
        return found[1]
    return str(error) or type(error).__name__
