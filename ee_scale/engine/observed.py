"""A pipeline engine that tells observers what it does: idle time, traces and the watchdog read the same stream."""

import contextlib
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import PipeSchedule

from ee_scale.engine.bf16 import reduce_gradients, update

Mark = TypeVar("Mark")
# What waits for another stage. A send does too: gloo and NCCL hand a tensor over when the other side takes it.
WAITS = ("RecvActivation", "RecvGrad", "SendActivation", "SendGrad", "ShareFinalHidden")


class Observer(Protocol):
    """Called around every instruction of the schedule, by its name; instructions may lie inside others."""

    def begin(self, name: str, fields: dict[str, Any]) -> None: ...

    def end(self, name: str) -> None: ...


class ObservedEngine(PipelineEngine):
    """Runs a schedule as DeepSpeed does, telling `observers` (a list that is there from the start)."""

    def __init__(self, *args: object, **kwargs: object):
        self.observers: list[Observer] = []
        super().__init__(*args, **kwargs)

    def close(self) -> None:
        """Let go of the parameters, which live on: their hooks and links are what keeps an engine's memory."""
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints what it has removed
            self.destroy()
        for parameter in self.module.parameters():
            parameter.grad = parameter._hp_grad = None

    def _bf16_reduce_grads(self) -> None:
        reduce_gradients(self.optimizer, self.mpu.get_data_parallel_group())

    def _exec_optimizer_step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        if isinstance(self.optimizer, BF16_Optimizer):
            update(self.optimizer)
        else:
            super()._exec_optimizer_step(lr_kwargs)

    @contextmanager
    def during(self, name: str, **fields: object) -> Iterator[None]:
        """Observers see the block as an instruction of this name."""
        for observer in self.observers:
            observer.begin(name, fields)
        yield
        for observer in self.observers:
            observer.end(name)

    def _exec_schedule(self, pipe_schedule: PipeSchedule) -> None:
        self._reserve_pipe_buffers(pipe_schedule.num_pipe_buffers())
        for commands in pipe_schedule:
            for command in commands:
                with self.during(command.name, **command.kwargs):
                    self._INSTRUCTION_MAP[type(command)](self, **command.kwargs)


class Clock(Protocol[Mark]):
    """Marks in what a device does, in order; read when it has got there."""

    def mark(self) -> Mark: ...

    def reached(self, mark: Mark) -> bool: ...

    def seconds(self, start: Mark, end: Mark) -> float:
        """Between two marks that were reached."""


class HostClock:
    """For a CPU: every instruction, gloo's sends and receives too, is over when its call returns."""

    def mark(self) -> int:
        return time.perf_counter_ns()

    def reached(self, mark: int) -> bool:
        return True

    def seconds(self, start: int, end: int) -> float:
        return (end - start) / 1e9


class DeviceClock:
    """For a GPU: the host runs ahead, so marks are events on its stream (which waits for NCCL), read without a sync."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def reached(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1e3


def clock_of(device: torch.device) -> Clock[Any]:
    """The clock that tells when a device did what."""
    return DeviceClock() if device.type == "cuda" else HostClock()
