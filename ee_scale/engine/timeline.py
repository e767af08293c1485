"""What every stage did when: instructions on one clock, as a Chrome trace and as sums."""

import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ee_scale.engine.observed import WAITS, Clock, clock_of

# Kinds of instructions; what is not listed is 'other'.
KINDS = {
    "ForwardPass": "forward",
    "Teach": "teacher",
    "BackwardPass": "backward",
    "TrainExits": "exits",
    **dict.fromkeys(WAITS, "wait"),
    "ReduceGrads": "reduce",
    "ReduceTiedGrads": "reduce",
    "OptimizerStep": "optimizer",
}
STEP = "step"  # name of the events that hold a whole step
PINGS = 8


@dataclass(frozen=True)
class Event:
    """An instruction (or a STEP) of one stage.

    Attributes:
        start, end: ns since the epoch, by the clock of this machine.
        step: optimizer step, from 1. micro_batch: of the step, from 0; None where the instruction has none.
        depth: 0, or how many instructions it lies in.
    """

    name: str
    start: int
    end: int
    step: int
    depth: int = 0
    micro_batch: int | None = None
    buffer: int | None = None

    @property
    def kind(self) -> str:
        return KINDS.get(self.name, "other")


@dataclass(frozen=True)
class StageTimeline:
    """A window of one stage, in the order of beginnings. `events` without, `steps` with STEP events only."""

    stage: int
    rank: int
    host: str
    events: list[Event]
    steps: list[Event]

    @property
    def wall(self) -> float:
        """Seconds from the first step's beginning to the last one's end."""
        return (self.steps[-1].end - self.steps[0].start) / 1e9

    @property
    def waiting(self) -> float:
        """Seconds in instructions that wait for another stage. None of them lies in another one."""
        return sum(event.end - event.start for event in self.events if event.kind == "wait") / 1e9

    @property
    def busy(self) -> float:
        """Seconds in all other instructions."""
        return sum(event.end - event.start for event in self.events if event.depth == 0) / 1e9 - self.waiting

    @property
    def idle(self) -> float:
        """Share of the window that the stage waited."""
        return self.waiting / self.wall

    def shifted(self, offset: int) -> "StageTimeline":
        """The same by a clock that is `offset` ns behind this one's."""
        events, steps = (
            [Event(**{**vars(event), "start": event.start - offset, "end": event.end - offset}) for event in found]
            for found in (self.events, self.steps)
        )
        return StageTimeline(self.stage, self.rank, self.host, events, steps)


@dataclass
class _Open:
    name: str
    start: Any
    micro_batch: int | None
    buffer: int | None


@dataclass
class TimelineRecorder:
    """An observer that keeps every instruction between `start` and `finish`; `step` comes before each step.

    ranges: also name the instructions in torch's profiler.
    """

    device: torch.device
    ranges: bool = False
    clock: Clock | None = None
    _stack: list[_Open] = field(default_factory=list)
    _ranges: list[Any] = field(default_factory=list)
    _marks: list[tuple[_Open, Any, int, int]] = field(default_factory=list)  # instruction, end, step, depth
    _steps: list[tuple[int, Any]] = field(default_factory=list)
    _counts: Counter[str] = field(default_factory=Counter)

    def start(self) -> None:
        """Begin the window; the device is idle here."""
        self.clock = self.clock or clock_of(self.device)
        self._synchronize()
        self._origin, self._origin_ns = self.clock.mark(), time.time_ns()

    def step(self, number: int) -> None:
        """A step begins."""
        self._steps.append((number, self.clock.mark()))
        self._counts.clear()

    def begin(self, name: str, fields: dict[str, Any]) -> None:
        """The n-th instruction of a name in a step works on micro-batch n; one inside another on the same as that."""
        buffer, micro_batch = fields.get("buffer_id"), fields.get("micro_batch")
        if micro_batch is None and self._stack:
            micro_batch = self._stack[-1].micro_batch
        elif micro_batch is None and buffer is not None:
            micro_batch = self._counts[name]
            self._counts[name] += 1
        if self.ranges:
            self._ranges.append(torch.profiler.record_function(name))
            self._ranges[-1].__enter__()
        self._stack.append(_Open(name, self.clock.mark(), micro_batch, buffer))

    def end(self, name: str) -> None:
        """See `begin`."""
        begun = self._stack.pop()
        self._marks.append((begun, self.clock.mark(), self._steps[-1][0], len(self._stack)))
        if self.ranges:
            self._ranges.pop().__exit__(None, None, None)

    def finish(self, stage: int, rank: int) -> StageTimeline:
        """End the window and read it."""
        bounds = [*self._steps, (0, self.clock.mark())]
        self._synchronize()
        events = [
            Event(o.name, self._ns(o.start), self._ns(end), step, depth, o.micro_batch, o.buffer)
            for o, end, step, depth in self._marks
        ]
        events.sort(key=lambda event: (event.start, event.depth))
        steps = [
            Event(STEP, self._ns(bounds[i][1]), self._ns(bounds[i + 1][1]), bounds[i][0])
            for i in range(len(self._steps))
        ]
        return StageTimeline(stage, rank, socket.gethostname(), events, steps)

    def _ns(self, mark: int | torch.cuda.Event) -> int:
        return self._origin_ns + round(self.clock.seconds(self._origin, mark) * 1e9)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def clock_offsets(
    group: dist.ProcessGroup, ranks: Sequence[int], now: Callable[[], int] = time.time_ns
) -> dict[int, tuple[int, int]]:
    """How far the clocks of `ranks` are ahead of rank 0's, and half the way there and back: rank -> (ns, +- ns).

    The quickest of a few pings counts (Cristian, 1989). Rank 0 and all of `ranks` call it; rank 0 learns the answer.
    """
    here, found = dist.get_rank(), {}
    message = torch.zeros(1, dtype=torch.int64)
    for rank in ranks:
        if rank == 0 or here not in (0, rank):
            continue
        tries = []
        for _ in range(PINGS):
            if here == 0:
                before = now()
                dist.send(message, rank, group=group)
                dist.recv(message, rank, group=group)
                after = now()
                tries.append(((after - before) // 2, int(message) - (before + after) // 2))
            else:
                dist.recv(message, 0, group=group)
                message.fill_(now())
                dist.send(message, 0, group=group)
        if tries:
            error, offset = min(tries)
            found[rank] = offset, error
    return found


def chrome_trace(timelines: Sequence[StageTimeline], clock: str) -> dict[str, Any]:
    """One process per stage: instructions on its first row, steps on its second. Microseconds since the first step.

    `clock`: a sentence on how the stages' clocks belong together.
    """
    origin = min(timeline.steps[0].start for timeline in timelines)
    rows: list[dict[str, Any]] = []
    for timeline in timelines:
        pid = timeline.stage
        name = f"stage {pid} (rank {timeline.rank}, {timeline.host})"
        rows.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}})
        rows.append({"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}})
        for tid, name in enumerate(("instructions", "steps")):
            rows.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}})
        rows += [_row(event, pid, 0, origin) for event in timeline.events]
        rows += [_row(event, pid, 1, origin) for event in timeline.steps]
    return {"traceEvents": rows, "displayTimeUnit": "ms", "otherData": {"clock": clock}}


def _row(event: Event, pid: int, tid: int, origin: int) -> dict[str, Any]:
    numbers = {"step": event.step, "micro_batch": event.micro_batch, "buffer": event.buffer}
    return {
        "ph": "X",
        "name": f"{STEP} {event.step}" if event.name == STEP else event.name,
        "cat": STEP if event.name == STEP else event.kind,
        "pid": pid,
        "tid": tid,
        "ts": (event.start - origin) / 1e3,
        "dur": (event.end - event.start) / 1e3,
        "args": {name: value for name, value in numbers.items() if value is not None},
    }
