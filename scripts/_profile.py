"""What device and host do during a call, by torch's profiler."""

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # lines of the profiler about itself
ATTENTION = "aten::_scaled_dot_product_"  # what torch's choice of kernel is called
SHOWN = 12


@dataclass(frozen=True)
class Profile:
    """Of one call.

    Attributes:
        seconds: on the host, until the device is done.
        busy: share of them in which some kernel or copy ran; None on a CPU, which runs everything itself.
        kernels: that ran, copies included. waits: calls in which the host waited for the device.
        attention: kernels that torch chose for attention, by calls.
        kernel_ms, host_ms: the dearest, on the device and on the host.
    """

    seconds: float
    busy: float | None
    kernels: int
    waits: int
    attention: dict[str, int] = field(default_factory=dict)
    kernel_ms: dict[str, float] = field(default_factory=dict)
    host_ms: dict[str, float] = field(default_factory=dict)


def profile(work: Callable[[], Any], device: torch.device) -> Profile:
    """Run `work` under the profiler, which slows the host down: no times for comparisons, but counts are exact."""
    gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        start = time.perf_counter()
        work()
        if gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    spans, kernel_us, host_us = [], Counter[str](), Counter[str]()
    attention, waits = Counter[str](), 0
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spans.append((event.time_range.start, event.time_range.end))
            kernel_us[event.name[:90]] += event.time_range.elapsed_us()
            continue
        host_us[event.name[:60]] += event.self_cpu_time_total
        waits += event.name.startswith("cuda") and event.name.endswith("Synchronize")
        if event.name.startswith(ATTENTION):
            attention[event.name.removeprefix(ATTENTION)] += 1
    return Profile(
        seconds,
        busy_time(spans) / 1e6 / seconds if gpu else None,
        len(spans),
        max(0, waits - gpu),  # our own at the end
        dict(attention),
        {name: us / 1e3 for name, us in kernel_us.most_common(SHOWN)},
        {name: us / 1e3 for name, us in host_us.most_common(SHOWN)},
    )


def busy_time(spans: list[tuple[float, float]]) -> float:
    """Length of what spans cover, those that overlap counted once."""
    busy, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    return busy
