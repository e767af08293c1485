"""Idle time on a GPU is the stream's, not the host's, and reading it waits for nothing."""

import time
from itertools import pairwise

import pytest
import torch

from ee_scale.training.meter import StageMeter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def test_a_wait_on_the_stream_counts_although_the_host_ran_ahead():
    """The card's clock sets how long its cycles last, and rises while an idle one wakes up: events tell it as it is."""
    torch.cuda._sleep(1000)
    torch.cuda.synchronize()
    meter, cycles, marks = StageMeter(torch.device("cuda", 0)), 3_000_000_000, [mark()]  # a second or more
    started = time.perf_counter()
    for name, part in (("RecvActivation", 3), ("ForwardPass", 1)):
        meter.begin(name, {})
        torch.cuda._sleep(part * cycles // 4)
        meter.end(name)
        marks.append(mark())
    meter.close()
    assert meter.read().wall == 0
    ahead = time.perf_counter() - started
    torch.cuda.synchronize()
    reading = meter.read()
    waiting, working = (a.elapsed_time(b) / 1e3 for a, b in pairwise(marks))
    assert reading.wall == pytest.approx(waiting + working, rel=0.01)
    assert reading.waiting == pytest.approx(waiting, rel=0.01)
    assert reading.waiting > 2 * working > 0.1
    assert reading.wall > 2 * ahead
