"""Run a measurement in fresh processes and bring back its result. Imports nothing heavy."""

import importlib
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from typing import Any


@dataclass(frozen=True)
class Job:
    """One size to measure at: a random Llama, its exits and a batch."""

    folder: str
    device: str
    layers: int
    hidden: int
    vocab: int
    sequence: int
    micro_batch: int
    exits: tuple[int, ...]
    head: str = "low_rank"
    micro_batches: int = 2
    chunk_tokens: int = 1024
    rounds: int = 7
    stages: int = 1
    wait: float = 0.0  # seconds that a stage's forward pass takes instead of its own time; 0: its own time

    @property
    def tokens(self) -> int:
        return self.micro_batches * self.micro_batch * self.sequence


def run_child(target: str, *args: Any, **environment: str) -> Any:
    """`module:function` in one fresh process with these environment variables."""
    return run_children(target, [args], **environment)[0]


def run_timed(
    target: str, *args: Any, seconds: float, forks: bool, preload: Sequence[str] = (), **environment: str
) -> Any:
    """The same for `seconds` at most; `forks`: of a process that has imported `preload` before, for many short ones.

    Forks have the environment of the first call. Raises RuntimeError as `run_children` does, and after that time.
    """
    context = get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([*preload])
    return _run(context, target, [args], environment, seconds)[0]


def run_children(target: str, arguments: list[tuple[Any, ...]], **environment: str) -> list[Any]:
    """The same in one process for each tuple of arguments, at once. Raises RuntimeError with a child's traceback."""
    return _run(get_context("spawn"), target, arguments, environment)


def _run(
    context: BaseContext,
    target: str,
    arguments: list[tuple[Any, ...]],
    environment: dict[str, str],
    seconds: float | None = None,
) -> list[Any]:
    with _environment(environment):
        pairs = []
        for args in arguments:
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_call, args=(target, args, theirs), daemon=True)
            process.start()
            theirs.close()
            pairs.append((process, mine))
    try:
        results: dict[Connection, Any] = {}
        end = None if seconds is None else time.monotonic() + seconds
        while len(results) < len(pairs):
            # Whoever fails first ends it: the others may be waiting for that process.
            left = None if end is None else max(0.0, end - time.monotonic())
            if not (ready := wait([pipe for _, pipe in pairs if pipe not in results], left)):
                raise RuntimeError(f"{target}: not done after {seconds:.0f} s")
            for pipe in ready:
                results[pipe] = _result(target, pipe)
        return [results[pipe] for _, pipe in pairs]
    finally:
        for process, _ in pairs:
            process.join(timeout=10 if len(results) == len(pairs) else 0)
            if process.is_alive():
                process.kill()


def _call(target: str, args: tuple[Any, ...], pipe: Connection) -> None:
    module, function = target.split(":")
    try:
        pipe.send((True, getattr(importlib.import_module(module), function)(*args)))
    except Exception:
        pipe.send((False, traceback.format_exc()))


def _result(target: str, pipe: Connection) -> Any:
    try:
        done, value = pipe.recv()
    except EOFError:
        raise RuntimeError(f"{target}: its process died without a word (killed for memory?)") from None
    if not done:
        raise RuntimeError(f"{target} failed:\n{value}")
    return value


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
