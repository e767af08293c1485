"""How well the devices are used: idle time and memory of a stage, FLOPs against the peak (MFU)."""

import resource
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from ee_scale.engine.observed import WAITS, Clock, clock_of
from ee_scale.errors import UserError
from ee_scale.log import log

GIB = 2**30

# Dense bf16 peaks in TFLOP/s of NVIDIA's data sheets, by a part of torch.cuda.get_device_name; the first hit counts.
PEAK_TFLOPS = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A40": 150,
    "A10G": 70,
    "A10": 125,
    "RTX 6000 Ada": 364,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
MEASURE_SECONDS = 0.2
SMALLEST_MATRIX = 512  # smaller ones measure the cost of a call


@dataclass(frozen=True)
class StageReading:
    """A stage since the last reading: seconds that passed, seconds of those inside `WAITS`; peak memory so far."""

    wall: float
    waiting: float
    memory_gib: float


class StageMeter:
    """An observer of one rank's engine. Nothing here waits for the device: what it has not done yet is read later."""

    def __init__(self, device: torch.device, clock: Clock | None = None):
        self._device, self._clock = device, clock or clock_of(device)
        self._spans: list[tuple[Any, Any]] = []
        self._closed: deque[tuple[Any, Any, list[tuple[Any, Any]]]] = deque()
        self._depth, self._began = 0, None
        self.restart()

    def begin(self, name: str, fields: dict[str, Any]) -> None:
        """A wait inside another one is a part of it."""
        if name in WAITS:
            if self._depth == 0:
                self._began = self._clock.mark()
            self._depth += 1

    def end(self, name: str) -> None:
        """See `begin`."""
        if name in WAITS:
            self._depth -= 1
            if self._depth == 0:
                self._spans.append((self._began, self._clock.mark()))

    def restart(self) -> None:
        """Leave out what happened since the last `close` (a checkpoint)."""
        self._start, self._spans = self._clock.mark(), []

    def close(self) -> None:
        """End of a window, between two instructions."""
        now = self._clock.mark()
        self._closed.append((self._start, now, self._spans))
        self._start, self._spans = now, []

    def read(self) -> StageReading:
        """Sum of the closed windows that the device has come to the end of, and that were not read before."""
        wall = waiting = 0.0
        while self._closed and self._clock.reached(self._closed[0][1]):
            start, end, spans = self._closed.popleft()
            wall += self._clock.seconds(start, end)
            waiting += sum(self._clock.seconds(*span) for span in spans)
        return StageReading(wall, waiting, peak_memory(self._device) / GIB)


def peak_memory(device: torch.device) -> float:
    """Most bytes held so far: tensors on a GPU; on a CPU what this process had resident."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def peak_flops(device: torch.device, given_tflops: float | None, hidden_size: int, dtype: torch.dtype) -> float | None:
    """FLOP/s that one device could do: as given, else by data sheet (bf16, dense), on a CPU measured in `dtype`.

    None for a GPU that is not in the table; a line in the log says so. Raises `UserError` for a peak of 0 or below.
    """
    if given_tflops is not None:
        if not given_tflops > 0:
            raise UserError(f"logging.peak_tflops={given_tflops}: must be above 0")
        return given_tflops * 1e12
    if device.type != "cuda":
        return measured_flops(device, hidden_size, dtype)
    name = torch.cuda.get_device_name(device)
    peak = sheet_tflops(name)
    if peak is None:
        log.info("no MFU: the peak of '%s' is not known here; give logging.peak_tflops", name)
    return peak and peak * 1e12


def sheet_tflops(name: str) -> float | None:
    """The data sheet's word on a GPU of this name."""
    words = f" {name.replace('-', ' ')} "
    return next((peak for part, peak in PEAK_TFLOPS.items() if f" {part} " in words), None)


def measured_flops(device: torch.device, hidden_size: int, dtype: torch.dtype) -> float:
    """FLOP/s of the best of some products of square matrices as wide as the model, by this process and its threads.

    Ranks that share the cores with it take their part of them at the same time, in this as in the run.
    """
    size = max(hidden_size, SMALLEST_MATRIX)
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best, started = 0.0, time.perf_counter()
    while best == 0.0 or time.perf_counter() - started < MEASURE_SECONDS:
        before = time.perf_counter()
        matrix @ matrix
        best = max(best, 2 * size**3 / (time.perf_counter() - before))
    return best


def mfu(tokens_per_second: float, flops_per_token: float, devices: int, peak: float) -> float:
    """Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B): FLOP/s that the run needs over those it could do.

    tokens_per_second: over all replicas; flops_per_token: of the whole replica; peak: FLOP/s of one device.
    """
    return tokens_per_second * flops_per_token / (devices * peak)
