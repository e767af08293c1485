"""torchrun's agent on one of several machines: it knows a run that ended on purpose, and leaves without a torn line.

torchrun starts ranks again whatever they ended with, and an agent leaves when its own ranks have ended. The store
where all agents meet goes with the machine that holds it, and the others fail in whatever they were asking it.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from threading import Event, Thread
from typing import Any

import psutil
import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousHandler, RendezvousInfo
from torch.distributed.launcher import api

from ee_scale.errors import BAD_INPUT, FAILED, REQUEUE, Requeue
from ee_scale.launching.signals import PASSED_ON, STOPPING, ranks_of_agent

ON_PURPOSE = (REQUEUE, BAD_INPUT)
BEAT, SILENCE = 1.0, 10.0  # seconds between two signs of life, and without one until a machine counts as gone
UNREACHABLE = "cannot be reached: the machine where all meet is gone"


class Meeting(RendezvousHandler):
    """Where the agents of a run meet; who holds its store leaves after all others that are still there.

    grace: seconds that the ranks of this machine may go on after the run has ended on another.
    """

    def __init__(self, inner: RendezvousHandler, grace: float):
        self._inner, self._grace = inner, grace
        self.left = Event()
        self._beaten = 0.0
        self._asked: list[float] = []  # since when, by the main thread
        self._info: RendezvousInfo | None = None
        self._closed_since: float | None = None

    @property
    def use_agent_store(self) -> bool:
        return self._inner.use_agent_store

    def get_backend(self) -> str:
        return self._inner.get_backend()

    def get_run_id(self) -> str:
        return self._inner.get_run_id()

    def is_closed(self) -> bool:
        with self._asking():
            return self._inner.is_closed()

    def set_closed(self) -> None:
        with self._asking():
            self._inner.set_closed()

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the other agents. Raises `Requeue` at a signal: there are no ranks to pass it on to."""
        with _ended_by_signals():
            self._info = self._inner.next_rendezvous()
        return self._info

    def silence(self) -> float:
        """Seconds that the store has owed an answer. Nothing else ends a question when a cable is cut."""
        return time.monotonic() - self._asked[0] if self._asked else 0.0

    @contextmanager
    def _asking(self) -> Iterator[None]:
        self._asked.append(time.monotonic())
        try:
            yield
        finally:
            self._asked.pop()

    def num_nodes_waiting(self) -> int:
        """The agent asks while its ranks run. Raises RendezvousClosedError where the run has ended elsewhere."""
        now = time.monotonic()
        if self._info is not None and self._info.world_size > 1 and now - self._beaten >= BEAT:
            self._beaten = now
            with suppress(dist.DistError), self._asking():  # what follows says it better
                self._info.store.add("beats", 1)
            if self.is_closed():
                self._closed_since = self._closed_since or now
                if now - self._closed_since > self._grace:
                    raise RendezvousClosedError
        with self._asking():
            return self._inner.num_nodes_waiting()

    def shutdown(self) -> bool:
        with self._asking():
            closed = self._inner.shutdown()
        if closed and self._info is not None and self._info.world_size > 1:
            with suppress(dist.DistError):
                self._leave(self._info.store, self._info.world_size)
        self.left.set()
        return closed

    def _leave(self, store: dist.Store, nodes: int) -> None:
        with self._asking():
            left = store.add("left", 1)  # the last word of those that do not hold it
        if not _listens():
            return
        beats, heard = 0, time.monotonic()
        while left < nodes and time.monotonic() - heard < SILENCE:
            time.sleep(0.05)
            left, before, beats = store.add("left", 0), beats, store.add("beats", 0)
            if beats != before:
                heard = time.monotonic()


class Agent(LocalElasticAgent):
    """Ranks that ended on purpose are not started again, and an agent without ranks waits for no silent store."""

    def __init__(self, grace: float, spec: WorkerSpec, *args: Any, **options: Any):
        self._meeting = spec.rdzv_handler = Meeting(spec.rdzv_handler, grace)
        super().__init__(spec, *args, **options)
        Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._meeting.left.wait(BEAT):
            if self._meeting.silence() >= SILENCE and not ranks_of_agent():
                sys.stderr.write(f"error: the run {UNREACHABLE}\n")
                sys.stderr.flush()
                os._exit(FAILED)  # the main thread is inside the store's client, where no exception reaches it

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if any(failure.exitcode in ON_PURPOSE for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    def stop(name: str) -> None:
        raise Requeue(f"{name} came before the ranks were ready; the same command goes on from the last checkpoint")

    if STOPPING in os.environ:
        stop(os.environ[STOPPING])
    before = {n: signal.signal(n, lambda n, _: stop(signal.Signals(n).name)) for n in PASSED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _listens() -> bool:
    """Whether this process holds a store: others connect to it."""
    return any(link.status == psutil.CONN_LISTEN for link in psutil.Process(os.getpid()).net_connections("tcp"))


@contextmanager
def our_agent(grace: float) -> Iterator[None]:
    """torchrun makes agents of this kind while the block runs."""
    theirs = api.LocalElasticAgent
    api.LocalElasticAgent = partial(Agent, grace)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        api.LocalElasticAgent = theirs  # type: ignore[misc]
