"""End what hangs. CPU time tells it: how many seconds something takes says nothing on a busy machine."""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from types import FrameType

import psutil

QUIET = 240.0  # seconds in which all processes of a test together
LEAST = 0.5  # use less CPU seconds than this: none of them works, and none waits for its turn
MOST = 1500.0  # CPU seconds of one test with its fixtures: it runs in circles
CHECKS = 40  # in `QUIET` seconds
ASLEEP = (psutil.STATUS_SLEEPING, psutil.STATUS_IDLE, psutil.STATUS_STOPPED)


class HangError(Exception):
    """This test hangs, or runs in circles."""


class HangWatch(threading.Thread):
    """Watches this process and all below it, inside a `with` block of the main thread or from `start` to `stop`.

    What hangs first loses its child processes, each with its stacks on stderr (signal ABRT): whoever waits for them
    goes on, and the test fails in its own words. After as long again `HangError` is raised in the main thread, and at
    last the process leaves.
    """

    def __init__(self, quiet: float = QUIET, least: float = LEAST, most: float = MOST):
        super().__init__(name="hang watch", daemon=True)
        self._every, self._over = quiet / CHECKS, threading.Event()
        self._least, self._most = least, most

    def __enter__(self) -> "HangWatch":
        self._before = signal.signal(signal.SIGALRM, _raise)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        signal.signal(signal.SIGALRM, self._before)

    def stop(self) -> None:
        self._over.set()

    def run(self) -> None:
        steps = iter((_abort_children, _interrupt, _leave))
        if self._over.wait(self._every):
            return  # most tests: they need no look, which takes 3 ms
        begun = used = cpu_seconds()
        quiet = 0  # checks, not seconds: this process may be the one that waits for its turn
        while not self._over.wait(self._every):
            now = cpu_seconds()
            if abs(now - used) > self._least:
                used, quiet = now, 0
            else:
                quiet += 1
            if quiet >= CHECKS or now - begun > self._most:
                begun, quiet = now, 0
                while not next(steps)():
                    pass


class StillClock:
    """A module `time` whose `monotonic` stands still while ranks work, which takes as long as the machine likes.

    `moved` is in a test's hands; as soon as the file `runs` is there (all ranks wait then) real seconds are added,
    `speed` times.
    """

    time, sleep = staticmethod(time.time), staticmethod(time.sleep)

    def __init__(self, runs: Path, speed: float = 1.0):
        self._runs, self._speed, self._since, self.moved = runs, speed, 0.0, 0.0

    def monotonic(self) -> float:
        if not self._since and self._runs.exists():
            self._since = time.monotonic()
        return self.moved + (self._speed * (time.monotonic() - self._since) if self._since else 0.0)


def cpu_seconds() -> float:
    """CPU time of this process and all below it, without that of the calling thread."""
    total = -time.thread_time()
    for process in _tree():
        with suppress(psutil.Error):
            total += sum(process.cpu_times()[:4])  # with that of children that are gone
    return total


def wait_for(path: Path) -> Path:
    """Until a file is there, with something in it; returns it."""
    while not (path.exists() and path.stat().st_size):
        time.sleep(0.02)
    return path


def wait_asleep(pids: Iterable[int]) -> None:
    """Until all these processes wait for something other than their turn, ten looks in a row."""
    processes, looks = [psutil.Process(pid) for pid in pids], 0
    while looks < 10:
        looks = looks + 1 if all(process.status() in ASLEEP for process in processes) else 0
        time.sleep(0.02)


def _tree() -> list[psutil.Process]:
    here = psutil.Process()
    return [here, *here.children(recursive=True)]


def _abort_children() -> bool:
    """Whether there were any."""
    keep = {os.getpid(), forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid}
    children = [process for process in _tree() if process.pid not in keep]
    for process in children:
        with suppress(psutil.Error):
            process.send_signal(signal.SIGABRT)
    for process in children:
        with suppress(psutil.Error):
            if process.status() == psutil.STATUS_STOPPED:  # hears nothing else
                process.kill()
    return bool(children)


def _interrupt() -> bool:
    signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)
    return True


def _leave() -> bool:
    faulthandler.dump_traceback()
    os._exit(1)


def _raise(number: int, frame: FrameType | None) -> None:
    raise HangError("its processes used no CPU time for minutes, or far too much")
