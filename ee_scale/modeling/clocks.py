"""What the parts of a decode cycle take, as the device sees it."""

import time
from collections.abc import Callable
from typing import Protocol

import torch


class Event(Protocol):
    """A mark in the device's queue, as `torch.cuda.Event`."""

    def record(self) -> None: ...

    def elapsed_time(self, end_event: "Event") -> float: ...


class Clock:
    """Seconds by name, of the host's time: right where work is done when its call returns."""

    def __init__(self):
        self.begin = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Add the time since the last lap."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    def end(self, name: str) -> None:
        """The last lap. On a device the host has read what came behind all other laps."""
        self.lap(name)

    def total(self) -> float:
        """Seconds since the start."""
        return self.last - self.begin

    def __getitem__(self, name: str) -> float:
        return self.seconds.get(name, 0.0)


class DeviceClock(Clock):
    """Laps of the device: marks in its queue, looked at when the cycle is over, so that none is waited for.

    The last lap is what is left of the host's time. Where the host is slower than the device, marks tell that too: the
    device comes to them when it has got the work before them.
    """

    def __init__(self, make: Callable[[], Event]):
        super().__init__()
        self.make = make
        self.marks = [("", self._mark())]

    def _mark(self) -> Event:
        event = self.make()
        event.record()
        return event

    def lap(self, name: str) -> None:
        self.marks.append((name, self._mark()))

    def end(self, name: str) -> None:
        for (_, before), (lap, mark) in zip(self.marks, self.marks[1:], strict=False):
            self.seconds[lap] = self.seconds.get(lap, 0.0) + before.elapsed_time(mark) / 1000
        laps = sum(self.seconds.values())
        self.last = time.perf_counter()
        self.seconds[name] = max(0.0, self.total() - laps)


def start_clock(device: torch.device) -> Clock:
    """A clock for work on this device, started."""
    return DeviceClock(lambda: torch.cuda.Event(enable_timing=True)) if device.type == "cuda" else Clock()
