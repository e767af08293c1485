"""A rank that hangs is named, with its stage and what it was doing, before the collectives of the others time out."""

import faulthandler
import itertools
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread, Timer
from types import TracebackType
from typing import Any, NamedTuple

import torch.distributed as dist

from ee_scale.engine.observed import WAITS
from ee_scale.errors import FAILED
from ee_scale.grid import Grid, Layout
from ee_scale.log import log

BETWEEN, AFTER = "between steps", "after the run"
# Phases with collectives in them: whoever stays in one may just be waiting for another rank.
WAITING = {*WAITS, "ReduceGrads", "ReduceTiedGrads", "OptimizerStep", BETWEEN, AFTER, "save", "vote"}
MOST_NAMED = 4

_numbers = itertools.count()  # of the watchdogs of this process: all ranks make the same ones in the same order


class Position(NamedTuple):
    """Where this rank's main thread is; replaced as a whole, so that the other thread never sees half of it."""

    progress: int
    step: int
    phase: str
    since: float


@dataclass(frozen=True)
class State:
    """What a rank tells about itself: `seconds` in this phase, at wall clock `sent`; `beat` counts the messages."""

    beat: int
    progress: int
    step: int
    phase: str
    seconds: float
    sent: float
    host: str
    pid: int


States = dict[int, State | None]  # by rank; None: it never said anything


class Watchdog(AbstractContextManager):
    """Ends this process with exit code 1 when a rank hangs, after a line that names the rank.

    It listens to an engine (`engine.observers`) and to the loop (`step`, `during`). A daemon thread sends this rank's
    state to a key-value store. When this rank makes no progress for nearly `timeout_seconds`, it reads those of all,
    and what it finds is told by every rank that can still speak, with its stack: in `<out>/hang_rank_<rank>.txt`, or on
    stderr without `out`.

    store: any store that all ranks share; None: the one that the default process group met in.
    """

    def __init__(self, grid: Grid, timeout_seconds: float, out: Path | None = None, store: dist.Store | None = None):
        self._grid, self._out = grid, out
        self._every = min(5.0, timeout_seconds / 20)
        self._limit = timeout_seconds - 4 * self._every  # the collectives' own time limit would say less
        # A connection of its own: a blocking get of the main thread locks the one it uses.
        store = (store or dist.distributed_c10d._get_default_store()).clone()  # type: ignore[attr-defined]
        self._store = dist.PrefixStore(f"watchdog_{next(_numbers)}", store)
        self._stack: list[str] = []
        self._now = Position(0, 0, BETWEEN, time.monotonic())
        self._beat = 0
        self._stopped = Event()
        self._asking = Thread()
        self._thread = Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._move()
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()
        self._thread.join()

    def step(self, step: int) -> None:
        """The training step that begins now."""
        self._move(step)

    def begin(self, name: str, fields: dict[str, Any]) -> None:
        """An instruction of the schedule begins; it may lie inside another one."""
        self._stack.append(name)
        self._move()

    def end(self, name: str) -> None:
        """It is done."""
        while self._stack and self._stack.pop() != name:  # an exception skips the ends of what lies inside
            pass
        self._move()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What the loop does beside the schedule: 'starting', 'data', 'save', 'vote' (these two with collectives)."""
        self.begin(phase, {})
        try:
            yield
        finally:
            self.end(phase)

    def _move(self, step: int | None = None) -> None:
        phase = self._stack[-1] if self._stack else BETWEEN
        self._now = Position(self._now.progress + 1, self._now.step if step is None else step, phase, time.monotonic())

    def _watch(self) -> None:
        first: tuple[float, States | None] | None = None  # when this rank began to wonder, and what all said then
        while True:
            if verdict := self._ask(self._exchange):
                self._leave(verdict)
            now = time.monotonic()
            stuck = now - self._now.since
            if stuck < self._limit / 2:
                first = None
            elif first is None:
                first = now, self._ask(self._read)
            elif stuck >= self._limit and now - first[0] >= self._limit / 3:  # not: this process itself was stopped
                self._leave(self._judge(first[1]))
            if self._stopped.wait(self._every):
                break
        self._stack, self._now = [], self._now._replace(phase=AFTER, since=time.monotonic())
        self._ask(self._exchange)

    def _judge(self, before: States | None) -> str:
        states = self._ask(self._read)
        if states is None:
            here = self._my_state()
            return (
                f"{place(self._grid.layout, self._grid.rank, here)} waits {doing(here)}, "
                "and the job's key-value store does not answer: the process that holds it hangs or is gone"
            )
        line = diagnose(self._grid.layout, before or {}, states, self._limit)
        # The first judgement holds for all.
        return self._ask(lambda: self._store.compare_set("verdict", "", line).decode()) or line

    def _my_state(self) -> State:
        progress, step, phase, since = self._now
        seconds, host = time.monotonic() - since, socket.gethostname()
        return State(self._beat, progress, step, phase, seconds, time.time(), host, os.getpid())

    def _exchange(self) -> str:
        """Send this rank's state; returns the verdict, if another rank has come to one."""
        self._beat += 1
        self._store.set(str(self._grid.rank), json.dumps(asdict(self._my_state())))
        return self._store.get("verdict").decode() if self._store.check(["verdict"]) else ""

    def _read(self) -> States:
        keys = [str(rank) for rank in range(self._grid.layout.world_size)]
        there = keys if self._store.check(keys) else [key for key in keys if self._store.check([key])]
        found = dict(zip(there, self._store.multi_get(there), strict=True))
        return {int(key): State(**json.loads(found[key])) if key in found else None for key in keys}

    def _ask(self, question: Callable[[], Any]) -> Any:
        """The store's answer; None if it fails, or keeps silent: a store in a process that hangs must not stop us."""
        answers: list[Any] = []

        def ask() -> None:
            with suppress(Exception):
                answers.append(question())

        if not self._asking.is_alive():
            self._asking = Thread(target=ask, daemon=True)
            self._asking.start()
            self._asking.join(max(1.0, self._every))
        return answers[0] if answers else None

    def _leave(self, line: str) -> None:
        last = Timer(max(2.0, 4 * self._every), os._exit, (FAILED,))  # the logger's lock or the disk may hang as well
        last.daemon = True
        last.start()
        log.error("rank %d leaves: %s", self._grid.rank, line)
        with suppress(OSError):
            if self._out is None:
                faulthandler.dump_traceback(sys.stderr)
            else:
                with (self._out / f"hang_rank_{self._grid.rank}.txt").open("w") as file:
                    file.write(f"{line}\n\n")
                    file.flush()
                    faulthandler.dump_traceback(file)
        logging.shutdown()
        time.sleep(2 * self._every)  # until every rank has read the verdict
        os._exit(FAILED)


def diagnose(layout: Layout, before: States, after: States, limit: float) -> str:
    """Which rank hangs, in one line, from what all said when a rank began to wonder and `limit / 3` or more later.

    First those that are not heard of any more; else those that stay in a phase in which nobody waits; else those that
    are through with the run; else those that are behind the others.
    """
    silent = [
        rank for rank, state in after.items() if state is None or (before.get(rank) == state and state.phase != AFTER)
    ]
    if silent:
        told = [f"{place(layout, rank, after[rank])} has not been heard of{_age(after[rank])}" for rank in silent]
        return _line(told, len(after))
    heard = {rank: state for rank, state in after.items() if state is not None}  # all of them
    busy = [rank for rank, state in heard.items() if state.phase not in WAITING and state.seconds >= limit / 2]
    left = [rank for rank, state in heard.items() if state.phase == AFTER]
    named = next((ranks for ranks in (busy, left) if 0 < len(ranks) < len(heard)), None) or _behind(layout, heard)
    return _line([f"{place(layout, rank, heard[rank])} hangs: {doing(heard[rank])}" for rank in named], len(heard))


def place(layout: Layout, rank: int, state: State | None) -> str:
    """A rank, its place in the grid and its process."""
    pp, dp, tp = layout.coordinates(rank)
    process = f"; host {state.host}, pid {state.pid}" if state else ""
    return f"rank {rank} (stage {pp}, dp {dp}, tp {tp}{process})"


def doing(state: State) -> str:
    """What a rank has been doing for how long, by its own word."""
    return f"in '{state.phase}' of step {state.step} for {state.seconds:.0f} s"


def _behind(layout: Layout, states: dict[int, State]) -> list[int]:
    """Ranks with the fewest steps, else those that did less than others of their stage (all do the same), else all."""
    least = min(state.step for state in states.values())
    late = [rank for rank, state in states.items() if state.step == least]
    if len(late) < len(states):
        return late
    stage = {rank: layout.coordinates(rank)[0] for rank in states}
    most = {pp: max(state.progress for rank, state in states.items() if stage[rank] == pp) for pp in stage.values()}
    return [rank for rank, state in states.items() if state.progress < most[stage[rank]]] or late


def _age(state: State | None) -> str:
    return f" for {time.time() - state.sent:.0f} s" if state else " since the start"


def _line(told: list[str], ranks: int) -> str:
    more = f" and {len(told) - MOST_NAMED} more" if len(told) > MOST_NAMED else ""
    rest = "; the others wait for it" if len(told) < ranks else "; no rank can be told apart as the cause"
    return ", ".join(told[:MOST_NAMED]) + more + rest
