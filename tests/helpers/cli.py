"""Run `ee-scale` in processes of its own: quick forks, one per rank, started the way torchrun starts them."""

import faulthandler
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from helpers.deprecations import forbid_deprecated_calls
from helpers.spawn import CHILD_ENVIRONMENT, PRELOAD

_servers: dict[str, forkserver.ForkServer] = {}


@dataclass(frozen=True)
class Finished:
    """What a command left: exit codes and output by rank."""

    codes: list[int]
    outputs: list[str]

    @property
    def code(self) -> int:
        return self.codes[0]

    @property
    def output(self) -> str:
        return self.outputs[0]


def run_cli(
    arguments: list[str],
    folder: Path,
    world_size: int = 1,
    *,
    die_at_step: int = 0,
    die_in_save: bool = False,
    measure_here: bool = False,
    inject: Callable[[int], None] | None = None,
    device: str = "cpu",
) -> Finished:
    """Run a command with `folder` as working directory; with several ranks, each under torchrun's variables.

    `die_at_step` and `die_in_save` kill rank 0 (signal 9) after that step, earlier checkpoints being on disk, or when
    all files of a checkpoint are written and only the rename is missing. `measure_here`: a palette's folders are
    measured in the command's own process, which saves seconds for each, and their memory is said to be twice their
    weights. `inject`: called with the rank in each process before the command runs (an importable function).
    `device`: what DeepSpeed is imported for, 'cpu' or 'cuda'; the command's own settings say where it runs.
    """
    context = multiprocessing.get_context("forkserver")
    port = _free_port()
    options = (arguments, folder, die_at_step, die_in_save, measure_here, inject, device)
    ranks = [
        context.Process(target=_rank, args=(rank, world_size, port, *options), daemon=True)
        for rank in range(world_size)
    ]
    try:
        with _forks_for(device):
            for process in ranks:
                process.start()
        for process in ranks:
            process.join()
    finally:
        for process in ranks:
            process.kill()
    codes = [process.exitcode for process in ranks]
    return Finished(codes, [(folder / f".output_{rank}").read_text() for rank in range(world_size)])


@contextmanager
def running_cli(
    arguments: list[str], folder: Path, inject: Callable[[int], None] | None = None
) -> Iterator[multiprocessing.Process]:
    """A command that goes on until it is told to end, or the block is over; its output is in `folder/.output_0`."""
    process = multiprocessing.get_context("forkserver").Process(
        target=_rank, args=(0, 1, 0, arguments, folder, 0, False, False, inject, "cpu"), daemon=True
    )
    with _forks_for("cpu"):
        process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


@contextmanager
def _forks_for(device: str) -> Iterator[None]:
    """Processes are forks of one that has imported everything, DeepSpeed for this device; it is made when first used.

    Python has one such process, which is the CPU's.
    """
    if device == "cpu":
        forkserver.set_forkserver_preload(PRELOAD)
        yield
        return
    if device not in _servers:
        _servers[device] = forkserver.ForkServer()
        _servers[device].set_forkserver_preload(PRELOAD)
    # The number of GPUs is asked of NVML: CUDA itself would not survive the fork.
    variables = {"DS_ACCELERATOR": device, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    connect = _servers[device].connect_to_new_process
    with mock.patch.dict(os.environ, variables), mock.patch.object(forkserver, "connect_to_new_process", connect):
        yield


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _rank(
    rank: int,
    world_size: int,
    port: int,
    arguments: list[str],
    folder: Path,
    die_at_step: int,
    die_in_save: bool,
    measure_here: bool,
    inject: Callable[[int], None] | None,
    device: str,
) -> None:
    os.environ.update(CHILD_ENVIRONMENT | {"DS_ACCELERATOR": device})
    if world_size > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    os.chdir(folder)
    descriptor = os.open(folder / f".output_{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable()  # the fork server's goes elsewhere
    torch.set_num_threads(1)
    forbid_deprecated_calls()
    from ee_scale.artifact import save  # imported in the fork, after its output was redirected
    from ee_scale.cli.main import main
    from ee_scale.training.metrics import MetricsStream

    if die_at_step and rank == 0:
        _kill_after(MetricsStream, "flush", lambda stream: stream._pending[-1].steps[-1][0] >= die_at_step)
    if die_in_save and rank == 0:
        save._publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    if measure_here:
        _measure_here()
    if inject is not None:
        inject(rank)
    code = main(arguments)
    os._exit(code)


def _measure_here() -> None:
    from ee_scale.palettes import edge, make

    def measure(folder: Path, task: str, **options: Any) -> edge.EdgeMeasure:
        found = edge._measure(str(folder), task, **options)
        return replace(found, memory_mb=2 * found.weights_mb)

    make.measure_edge = measure


def _kill_after(owner: Any, name: str, when: Any) -> None:
    original = getattr(owner, name)

    def patched(self: Any) -> None:
        original(self)
        if self._pending and when(self):
            for thread in threading.enumerate():
                if thread.name == "checkpoint writer":
                    thread.join()
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, patched)
