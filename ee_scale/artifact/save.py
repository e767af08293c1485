"""Write a run's checkpoint from any grid, and read one into a run at any grid."""

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ee_scale.artifact.checkpoint import STATE, checkpoints, exits_name, optimizer_name
from ee_scale.artifact.files import file_digest, write_json
from ee_scale.engine.state import MOMENTS, restore_tensors, whole_tensors
from ee_scale.errors import UserError
from ee_scale.files import sync
from ee_scale.grid import Grid
from ee_scale.log import log
from ee_scale.training.tune import TuneRun


def save_checkpoint(root: Path, run: TuneRun, facts: dict[str, Any], keep: int) -> None:
    """Write a checkpoint of the run's step and drop all but the last `keep`. All ranks call it.

    `facts` go into state.json. A failed write on any rank raises on all, and the previous checkpoint stays.
    """
    grid = run.grid
    folder, temporary = root / f"step_{run.step:08d}", root / f".step_{run.step:08d}.tmp"
    _agree(grid, lambda: _clear(temporary) if grid.rank == 0 else None)
    digests = _agree(grid, lambda: _write_stage(temporary, run))
    if grid.rank == 0:
        files = {name: digest for part in digests if part for name, digest in part.items()}
        state = {"step": run.step, "consumed_samples": run.consumed_samples, **facts, "files": files}
    _agree(grid, lambda: _publish(temporary, folder, state, keep) if grid.rank == 0 else None)
    log.info("saved %s", folder)


def load_checkpoint(folder: Path, run: TuneRun, state: dict[str, Any]) -> None:
    """Put a checkpoint into a run, at whatever grid. The files were checked before (`read_checkpoint`)."""
    run.step = state["step"]
    if not run.stage.exit_layers:
        return
    with ExitStack() as stack:
        files = {
            k: [
                stack.enter_context(safe_open(folder / name(k), framework="pt"))
                for name in (exits_name, optimizer_name)
            ]
            for k in run.stage.exit_layers
        }

        def read(name: str, key: str) -> torch.Tensor:
            parameters, moments = files[int(name.split(".")[1])]
            return parameters.get_tensor(name) if key == "param" else moments.get_tensor(f"{name}.{key}")

        parameters = [pair for k in run.stage.exit_layers for pair in _parameters(run, k)]
        restore_tensors(parameters, read, run.engine.optimizer, run.step, run.grid)


def _parameters(run: TuneRun, k: int) -> list[tuple[str, torch.nn.Parameter]]:
    prefix = f"exit_heads.{k}."
    return [(prefix + name, parameter) for name, parameter in run.stage.exit_heads[str(k)].named_parameters()]


def _write_stage(folder: Path, run: TuneRun) -> dict[str, str]:
    """Gather this stage's exits, one at a time, and write them on one of its ranks. Returns file digests."""
    digests: dict[str, str] = {}
    failure: Exception | None = None
    for k in run.stage.exit_layers:
        parameters, moments = {}, {}
        for name, tensors in whole_tensors(_parameters(run, k), run.plan.shape.vocab_size, run.grid):
            if run.grid.writes_stage():
                parameters[name] = tensors["param"].contiguous()
                moments |= {f"{name}.{moment}": tensors[moment].contiguous() for moment in MOMENTS}
        try:
            for file_name, tensors in ((exits_name(k), parameters), (optimizer_name(k), moments)):
                if tensors and failure is None:
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
