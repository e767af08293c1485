"""Idle time on a GPU is the stream's, not the host's, and reading it waits for nothing."""

import pytest
import torch

from ee_scale.training.meter import StageMeter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_wait_on_the_stream_counts_although_the_host_ran_ahead():
    device = torch.device("cuda", 0)
    torch.cuda._sleep(1000)
    torch.cuda.synchronize()
    meter, cycles = StageMeter(device), 3_000_000_000  # a second or more
    for name, part in (("RecvActivation", 3), ("ForwardPass", 1)):
        meter.begin(name, {})
        torch.cuda._sleep(part * cycles // 4)
        meter.end(name)
    meter.close()
    assert meter.read().wall == 0
    torch.cuda.synchronize()
    reading = meter.read()
    assert reading.wall > 0.1
    assert reading.waiting / reading.wall == pytest.approx(0.75, abs=0.02)
