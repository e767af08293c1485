"""What the parts of a decode cycle are said to take, and what decoding leaves as it was."""

import threading

import pytest
import torch

from ee_scale.modeling import clocks
from ee_scale.modeling.attention import without_cudnn
from ee_scale.modeling.clocks import Clock, DeviceClock


class Timeline:
    """A host and a device with clocks that stand still unless told otherwise; work is queued by the host."""

    def __init__(self):
        self.host = self.device = 0.0

    def perf_counter(self) -> float:
        return self.host

    def queue(self, launch: float, work: float) -> None:
        """The host takes `launch` seconds to queue what the device works at for `work` seconds."""
        self.host += launch
        self.device = max(self.device, self.host) + work

    def read(self) -> None:
        self.host = self.device = max(self.host, self.device)


class Mark:
    """A CUDA event: when the device came to it is known once the host has read something behind it."""

    def __init__(self, timeline: Timeline):
        self.timeline = timeline

    def record(self) -> None:
        self.at = max(self.timeline.device, self.timeline.host)

    def elapsed_time(self, end_event: "Mark") -> float:
        assert end_event.at <= self.timeline.host, "looked at before it was over"
        return 1000 * (end_event.at - self.at)


@pytest.fixture
def timeline(monkeypatch) -> Timeline:
    timeline = Timeline()
    monkeypatch.setattr(clocks, "time", timeline)
    return timeline


def _cycle(timeline: Timeline, clock: Clock, launch: float, work: float) -> Clock:
    for _ in range(3):
        timeline.queue(launch, 4 * work)
        clock.lap("early")
        timeline.queue(launch, work)
        clock.lap("check")
    timeline.queue(launch, 8 * work)
    clock.lap("late")
    timeline.queue(launch, work)
    timeline.read()
    timeline.host += 0.25  # texts are kept
    clock.end("tail")
    return clock


def test_a_slow_device_is_what_is_timed(timeline):
    """Launches are over in no time; laps of the host would know nothing of layers."""
    clock = _cycle(timeline, DeviceClock(lambda: Mark(timeline)), launch=0.001, work=1.0)
    assert clock["early"] == pytest.approx(12, abs=0.01)
    assert clock["check"] == pytest.approx(3, abs=0.01)
    assert clock["late"] == pytest.approx(8, abs=0.01)
    assert clock["tail"] == pytest.approx(1.25, abs=0.01)
    assert clock.total() == pytest.approx(24.25, abs=0.01)


def test_a_slow_host_is_what_is_timed(timeline):
    clock = _cycle(timeline, DeviceClock(lambda: Mark(timeline)), launch=1.0, work=0.001)
    assert clock["early"] == pytest.approx(3, abs=0.02)
    assert clock["late"] == pytest.approx(1, abs=0.02)
    assert clock.total() == pytest.approx(sum(clock[name] for name in ("early", "check", "late", "tail")))


def test_the_host_s_laps(timeline):
    clock = Clock()
    for name, seconds in (("early", 2.0), ("check", 1.0), ("early", 3.0)):
        timeline.host += seconds
        clock.lap(name)
    timeline.host += 0.5
    clock.end("tail")
    assert (clock["early"], clock["check"], clock["tail"], clock["late"]) == (5.0, 1.0, 0.5, 0.0)
    assert clock.total() == 6.5


@pytest.fixture(params=[True, False])
def before(request):
    kept = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(request.param)
    yield request.param
    torch.backends.cuda.enable_cudnn_sdp(kept)


def test_the_switch_is_put_back(before):
    with without_cudnn(), without_cudnn():
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
    with pytest.raises(ValueError, match="no"), without_cudnn():
        raise ValueError("no")
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_the_last_thread_puts_the_switch_back(before):
    """One that began while another was inside must not take what it found for what was wanted."""
    inside, out = threading.Event(), threading.Event()

    def other() -> None:
        with without_cudnn():
            inside.set()
            out.wait(60)

    thread = threading.Thread(target=other)
    with without_cudnn():
        thread.start()
        assert inside.wait(60)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    out.set()
    thread.join()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
