"""A pipeline engine that tells observers what it does: idle time, traces and the watchdog read the same stream."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from deepspeed.runtime.pipe.engine import PipelineEngine

WAITS = ("RecvActivation", "RecvGrad", "ShareFinalHidden")  # what waits for another stage


class Observer(Protocol):
    """Called around every instruction of the schedule, by its name; instructions may lie inside others."""

    def begin(self, name: str, fields: dict[str, Any]) -> None: ...

    def end(self, name: str) -> None: ...


class ObservedEngine(PipelineEngine):
    """Runs a schedule as DeepSpeed does, telling `observers` (a list that is there from the start)."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.observers: list[Observer] = []
        super().__init__(*args, **kwargs)

    @contextmanager
    def during(self, name: str, **fields: Any) -> Iterator[None]:
        """Observers see the block as an instruction of this name."""
        for observer in self.observers:
            observer.begin(name, fields)
        yield
        for observer in self.observers:
            observer.end(name)

    def _exec_schedule(self, pipe_schedule: Any) -> None:
        self._reserve_pipe_buffers(pipe_schedule.num_pipe_buffers())
        for commands in pipe_schedule:
            for command in commands:
                with self.during(command.name, **command.kwargs):
                    self._INSTRUCTION_MAP[type(command)](self, **command.kwargs)
