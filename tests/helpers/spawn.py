"""Run a function on several ranks (gloo, CPU) and bring back what each returned."""

import contextlib
import faulthandler
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from helpers.deprecations import forbid_deprecated_calls

# Imported once, in the fork server; every rank is a fork of it and starts at once. A worker has one such server, and
# whoever asks first says what it imports: one list for ranks and commands.
COMMANDS = ("train", "palette", "export", "evaluate", "generate")
PRELOAD = ["torch", "transformers", "megatron.core", "deepspeed", "ee_scale.engine.frozen"]
PRELOAD += ["ee_scale.training.tune", "ee_scale.training.supernet", *(f"ee_scale.cli.{name}" for name in COMMANDS)]
PRELOAD += ["tests.helpers.warm"]  # found where pytest runs in the repository; forks are slower without it, no more
CHILD_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RankError(AssertionError):
    """A rank failed; the text is its traceback."""


def spawn(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `fn(rank, *args)` on `world_size` ranks that share a gloo world; returns the results by rank.

    `fn` must be importable (module level). Raises `RankError` with the traceback of the rank that failed first, or with
    the stacks of the ranks that hang (see `helpers.hangs`); no process outlives the call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as name, _environment():
        folder = Path(name)
        ranks = [
            context.Process(target=_run_rank, args=(fn, rank, world_size, folder, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            _join(ranks, folder)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        return [torch.load(folder / f"result_{rank}.pt", weights_only=False) for rank in range(world_size)]


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    # The fork server takes the environment of the first call; threads of a fork would only fight for the cores.
    before = dict(os.environ)
    os.environ.update(CHILD_ENVIRONMENT)
    for variable in LAUNCHER_VARIABLES:
        os.environ.pop(variable, None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _join(ranks: list[Any], folder: Path) -> None:
    running = {process.sentinel: process for process in ranks}
    while running:
        failed = [process for sentinel in wait(list(running)) if (process := running.pop(sentinel)).exitcode != 0]
        if failed:
            # The others fail because of it, or hang; what happened first is the cause.
            errors = sorted(folder.glob("error_*.txt"), key=lambda path: path.stat().st_mtime_ns)
            stacks = [path.read_text() for path in sorted(folder.glob("stack_*.txt"))]
            died = f"rank {ranks.index(failed[0])} died with exit code {failed[0].exitcode}"
            raise RankError(errors[0].read_text() if errors else "\n".join([died, *stacks]))


def _run_rank(fn: Callable[..., Any], rank: int, world_size: int, folder: Path, args: tuple[Any, ...]) -> None:
    with (folder / f"stack_{rank}.txt").open("w") as stack:
        faulthandler.enable(stack)
        try:
            forbid_deprecated_calls()
            torch.set_num_threads(1)
            torch.distributed.init_process_group(
                "gloo",
                init_method=f"file://{folder}/rendezvous",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(days=1),  # the watch for hangs knows better
            )
            result = fn(rank, *args)
            torch.save(result, folder / f"result_{rank}.pt")
            torch.distributed.barrier()  # nobody leaves while another still talks to it
        except BaseException:
            # Written aside and renamed: the parent may look at any time.
            aside = folder / f"rank_{rank}.tmp"
            aside.write_text(f"rank {rank} of {world_size}:\n{traceback.format_exc()}")
            aside.rename(folder / f"error_{rank}.txt")
            os._exit(1)
    os._exit(0)  # skips the teardown of DeepSpeed's groups, which may wait for ranks that are gone
