"""Idle time by a clock of our own, peaks, MFU, and what a step's metrics look like as JSON."""

import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from ee_scale.engine.observed import DeviceClock, HostClock, clock_of
from ee_scale.errors import UserError
from ee_scale.training import meter
from ee_scale.training import metrics as metrics_module
from ee_scale.training.meter import StageMeter, measured_flops, mfu, peak_flops, peak_memory, sheet_tflops
from ee_scale.training.metrics import MetricsStream, StepMetrics

CPU = torch.device("cpu")


@dataclass
class FakeClock:
    """Shows `now`; a device that lags behind the host has reached `done` only."""

    now: float = 100.0
    done: float = float("inf")
    marks: list[float] = field(default_factory=list)

    def mark(self) -> float:
        self.marks.append(self.now)
        return self.now

    def reached(self, mark: float) -> bool:
        return mark <= self.done

    def seconds(self, start: float, end: float) -> float:
        assert max(start, end) <= self.done, "read before the device was there"
        return end - start


def run(meter: StageMeter, clock: FakeClock, *instructions: tuple[str, float]) -> None:
    for name, seconds in instructions:
        meter.begin(name, {"buffer_id": 0})
        clock.now += seconds
        meter.end(name)


def test_waits_count_and_work_does_not():
    clock = FakeClock()
    meter = StageMeter(CPU, clock)
    waits = [("RecvActivation", 1.0), ("SendActivation", 0.5), ("RecvGrad", 2.0), ("SendGrad", 0.25)]
    run(meter, clock, *waits, ("ForwardPass", 8.0), ("ShareFinalHidden", 4.0), ("OptimizerStep", 16.0))
    meter.close()
    reading = meter.read()
    assert (reading.wall, reading.waiting) == (31.75, 7.75)
    meter.close()
    assert meter.read().wall == 0  # nothing is read twice


def test_a_wait_inside_an_instruction_and_inside_a_wait_counts_once():
    clock = FakeClock()
    meter = StageMeter(CPU, clock)
    meter.begin("Teach", {})
    meter.begin("RecvActivation", {})
    clock.now += 0.5
    run(meter, clock, ("SendGrad", 3.0))
    clock.now += 0.5
    meter.end("RecvActivation")
    clock.now += 5.0
    meter.end("Teach")
    meter.close()
    assert (meter.read().waiting, clock.now) == (4.0, 109.0)


def test_a_device_that_lags_is_read_later_and_whole():
    clock = FakeClock(done=100.0)
    meter = StageMeter(CPU, clock)
    run(meter, clock, ("RecvActivation", 2.0), ("ForwardPass", 2.0))
    meter.close()
    assert meter.read().wall == 0
    run(meter, clock, ("RecvActivation", 3.0), ("ForwardPass", 1.0))
    meter.close()
    clock.done = 105.0
    assert (first := meter.read()).wall == 4.0
    assert first.waiting == 2.0
    clock.done = 108.0
    assert meter.read().waiting == 3.0


def test_what_lies_between_two_windows_is_left_out_after_a_restart():
    clock = FakeClock()
    meter = StageMeter(CPU, clock)
    run(meter, clock, ("RecvGrad", 1.0))
    meter.close()
    clock.now += 50.0  # a checkpoint
    meter.restart()
    run(meter, clock, ("ForwardPass", 1.0), ("RecvGrad", 1.0))
    meter.close()
    assert (reading := meter.read()).wall == 3.0
    assert reading.waiting == 2.0


class FakeEvent:
    """A CUDA event that the device reaches when the test says so."""

    recorded: list["FakeEvent"] = []  # noqa: RUF012

    def __init__(self, enable_timing: bool = False):
        assert enable_timing
        self.done = False

    def record(self) -> None:
        self.ms = 1000.0 * len(self.recorded)
        self.recorded.append(self)

    def query(self) -> bool:
        return self.done

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert (self.done, end.done) == (True, True), "read before the device was there"
        return end.ms - self.ms


def test_a_gpu_is_timed_by_events_in_its_own_stream(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("the meter made the host wait"))
    assert isinstance(clock_of(CPU), HostClock)
    assert isinstance(clock_of(torch.device("cuda", 0)), DeviceClock)
    meter = StageMeter(torch.device("cuda", 0))  # event 0
    for name in ("RecvActivation", "ForwardPass"):  # events 1 and 2, none
        meter.begin(name, {})
        meter.end(name)
    meter.close()  # event 3
    assert (meter.read().wall, meter.read().memory_gib) == (0.0, 3.0)
    for event in FakeEvent.recorded:
        event.done = True
    assert (reading := meter.read()).wall == 3.0
    assert reading.waiting == 1.0


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_of_data_sheets(name, tflops):
    assert sheet_tflops(name) == tflops


def test_the_given_peak_counts_and_an_unknown_gpu_has_none(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-PCIE-40GB")
    assert peak_flops(gpu, 200.0, 4096, torch.bfloat16) == 200e12
    assert peak_flops(gpu, None, 4096, torch.bfloat16) == 312e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card of tomorrow")
    assert peak_flops(gpu, None, 4096, torch.bfloat16) is None
    with pytest.raises(UserError, match=r"^logging\.peak_tflops=0: must be above 0$"):
        peak_flops(gpu, 0, 4096, torch.bfloat16)


def test_the_peak_of_a_cpu_is_measured(monkeypatch):
    assert 1e8 < measured_flops(CPU, 64, torch.float32) < 1e15
    monkeypatch.setattr(meter, "measured_flops", lambda *asked: asked)
    assert peak_flops(CPU, None, 64, torch.float32) == (CPU, 64, torch.float32)


def test_memory_of_a_process_is_in_bytes_and_never_below_what_it_has_now():
    block = torch.ones(2**24)  # 64 MiB
    now = psutil.Process().memory_info().rss
    assert 0.99 * now < peak_memory(CPU) < psutil.virtual_memory().total
    del block


def test_mfu():
    # 1000 tokens/s x 6e9 FLOPs on 4 devices of 3e12 FLOP/s.
    assert mfu(1000.0, 6e9, 4, 3e12) == pytest.approx(0.5)


def stage_grid(stage: int = 0, pp: int = 2, dp: int = 1) -> Any:
    layout = SimpleNamespace(pp=pp, dp=dp, world_size=pp * dp)
    return SimpleNamespace(layout=layout, stage=stage, tp_rank=0, metrics_group=None, writes_stage=lambda: True)


def flushed(stream: MetricsStream, monkeypatch: pytest.MonkeyPatch, others: list[torch.Tensor]) -> list[StepMetrics]:
    """What rank 0 reads when the other ranks send `others`; what this rank sends is appended to it."""
    done = SimpleNamespace(wait=lambda: None, is_completed=lambda: True)

    def all_reduce(values: torch.Tensor, **_: Any) -> Any:
        mine = values.clone()
        for other in others:
            values += other
        others.append(mine)
        return done

    monkeypatch.setattr(metrics_module.dist, "all_reduce", all_reduce)
    stream.flush()
    return list(stream.ready())


def two_stages(monkeypatch: pytest.MonkeyPatch, **kwargs: Any) -> list[StepMetrics]:
    """Exits 1 (stage 0) and 3 (stage 1); stage 0 waited 1 s of 10, stage 1 6 s of 8. Exit 3 broke at step 2."""
    sent: list[torch.Tensor] = []
    for stage, (k, losses, busy, waiting) in enumerate(((1, (2.0, 1.5), 9.0, 1.0), (3, (4.0, float("nan")), 2.0, 6.0))):
        clock = FakeClock()
        meter = StageMeter(CPU, clock)
        stream = MetricsStream(stage_grid(stage), [1, 3], 100, meter=meter, norm_keys=[1, 3], **kwargs)
        run(meter, clock, ("ForwardPass", busy), ("RecvActivation", waiting))
        for step, loss in enumerate(losses, start=1):
            skipped = {k: torch.tensor(step - 1)} if k == 3 else {}
            norms = {k: torch.tensor(loss / 2)}
            stream.add(step, 0.1, {k: torch.tensor([loss, 9.0])}, grad_norms=norms, skipped=skipped)
        found = flushed(stream, monkeypatch, sent)
    return found


def test_the_stages_are_put_together(monkeypatch):
    first, second = two_stages(monkeypatch)
    assert first.values == {"loss": {1: 2.0, 3: 4.0}}
    assert first.grad_norms == {1: 1.0, 3: 2.0}
    assert (first.skipped, second.skipped) == ({}, {3: 1})
    assert first.stages["idle"] == {0: pytest.approx(0.1), 1: pytest.approx(0.75)}
    assert set(first.stages["memory_gib"]) == {0, 1}
    assert (first.tokens, second.tokens, first.mfu) == (100, 200, None)


def test_mfu_of_a_window_is_of_its_tokens_devices_and_seconds(monkeypatch):
    metrics = two_stages(monkeypatch, flops_per_token=1e3, peak_flops=1e9)[0]
    assert metrics.mfu == pytest.approx(metrics.tokens_per_second * 1e3 / (2 * 1e9))


def test_json_is_strict_and_keeps_its_old_keys(monkeypatch):
    first, second = (m.to_json() for m in two_stages(monkeypatch, flops_per_token=1e3, peak_flops=1e9))
    old = ["step", "tokens", "learning_rate", "loss", "tokens_per_second"]
    assert list(first) == [*old, "mfu", "idle", "memory_gib", "grad_norm"]
    assert list(second) == [*list(first), "skipped"]
    line = json.dumps(second, allow_nan=False)
    assert json.loads(line)["loss"] == {"1": 1.5, "3": None}
    assert json.loads(line)["grad_norm"] == {"1": 0.75, "3": None}


def test_replicas_are_averaged_and_what_they_all_know_is_not_summed(monkeypatch):
    sent: list[torch.Tensor] = []
    for loss in (2.0, 6.0):
        stream = MetricsStream(stage_grid(pp=1, dp=2), [1], 10, norm_keys=["all"])
        norms = {"all": torch.tensor(0.5)}
        stream.add(1, 0.1, {1: torch.tensor([loss])}, grad_norms=norms, skipped={1: torch.tensor(4)})
        found = flushed(stream, monkeypatch, sent)
    assert found[0].values == {"loss": {1: 4.0}}
    assert (found[0].grad_norms, found[0].skipped) == ({"all": 0.5}, {1: 4})


def test_a_checkpoint_between_two_windows_is_no_idle_time(monkeypatch):
    clock = FakeClock()
    meter = StageMeter(CPU, clock)
    stream = MetricsStream(stage_grid(pp=1), [1], 10, meter=meter)
    clock.now += 30.0
    stream.restart_clock()
    run(meter, clock, ("ForwardPass", 1.0), ("RecvGrad", 3.0))
    stream.add(1, 0.1, {1: torch.tensor([1.0])})
    assert flushed(stream, monkeypatch, [])[0].stages["idle"] == {0: 0.75}


def test_a_stream_without_a_meter_is_as_it_was(monkeypatch):
    stream = MetricsStream(stage_grid(pp=1), ["full", "random"], 10, ("loss", "kl"))
    stream.add(7, 0.5, {"full": torch.tensor([1.0, 2.0, 3.0]), "random": torch.tensor([4.0, 5.0, 6.0])})
    (found,) = flushed(stream, monkeypatch, [])
    assert found.values == {"loss": {"full": 1.0, "random": 4.0}, "kl": {"full": 2.0, "random": 5.0}}
    assert list(found.to_json()) == ["step", "tokens", "learning_rate", "loss", "kl", "tokens_per_second"]
    assert found.only(["full"]).values == {"loss": {"full": 1.0}, "kl": {"full": 2.0}}
