"""What a recorder keeps, the Chrome trace of it, its sums, and the picture."""

import json
from collections import Counter
from typing import Any

import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from ee_scale.engine.timeline import Event, StageTimeline, TimelineRecorder, chrome_trace
from ee_scale.evaluation.timeline_plot import COLOURS, plot_timeline

MS = 1_000_000


class FakeClock:
    """In ms."""

    now = 5.0

    def mark(self) -> float:
        return self.now

    def seconds(self, start: float, end: float) -> float:
        return (end - start) / 1e3


@pytest.fixture
def recorded() -> StageTimeline:
    """Two steps of a stage that teaches, receives, works, and waits; 1 ms of Python before each instruction."""
    clock = FakeClock()
    recorder = TimelineRecorder(torch.device("cpu"), clock=clock)

    def run(name: str, ms: float, *inside: tuple[str, float], **fields: Any) -> None:
        clock.now += 1
        recorder.begin(name, fields)
        for inner in inside:
            run(*inner)
        clock.now += ms
        recorder.end(name)

    recorder.start()
    for step in (4, 5):
        recorder.step(step)
        run("Teach", 4, ("RecvActivation", 2), micro_batch=1)
        for buffer in (0, 1, 0):
            run("RecvActivation", 3, buffer_id=buffer)
            run("ForwardPass", 6, buffer_id=buffer)
        run("ReduceGrads", 1)
        run("OptimizerStep", 2)
    return recorder.finish(stage=1, rank=2)


def test_instructions_know_step_micro_batch_and_what_they_lie_in(recorded):
    first = [event for event in recorded.events if event.step == 4]
    assert [(e.name, e.micro_batch, e.buffer, e.depth) for e in first[:6]] == [
        ("Teach", 1, None, 0),
        ("RecvActivation", 1, None, 1),
        ("RecvActivation", 0, 0, 0),
        ("ForwardPass", 0, 0, 0),
        ("RecvActivation", 1, 1, 0),
        ("ForwardPass", 1, 1, 0),
    ]
    assert [(e.name, e.micro_batch) for e in first[-3:]] == [
        ("ForwardPass", 2),
        ("ReduceGrads", None),
        ("OptimizerStep", None),
    ]
    again = [event for event in recorded.events if event.step == 5]
    assert [(e.name, e.micro_batch, e.buffer) for e in again] == [(e.name, e.micro_batch, e.buffer) for e in first]


def test_sums_of_a_stage(recorded):
    # A step: Teach 1+(1+2)+4, three of (1+3)+(1+6), 1+1, 1+2 = 46 ms, of which 2 + 9 wait and 9 are outside.
    assert [(s.step, (s.end - s.start) / MS) for s in recorded.steps] == [(4, 46), (5, 46)]
    assert recorded.wall == pytest.approx(0.092)
    assert recorded.waiting == pytest.approx(0.022)
    assert recorded.busy == pytest.approx(2 * (0.007 - 0.002 + 0.018 + 0.003))
    assert recorded.idle == pytest.approx(22 / 92)


def simple(stage: int, offset_ms: float = 0.0) -> StageTimeline:
    """One step of 100 ms: forward of 40, a wait of 30, exits of 20."""
    start = 10**18 + round(offset_ms * MS)
    spans = [("ForwardPass", 0, 40), ("SendActivation", 40, 70), ("TrainExits", 70, 90)]
    events = [Event(name, start + a * MS, start + b * MS, 1, 0, 0, 0) for name, a, b in spans]
    return StageTimeline(stage, 10 * stage, "host", events, [Event("step", start, start + 100 * MS, 1)])


def test_another_clock_is_shifted_back():
    assert simple(1, offset_ms=250).shifted(250 * MS) == simple(1)


def test_chrome_trace(recorded):
    trace = json.loads(json.dumps(chrome_trace([simple(0), simple(1, 2.5)], "a clock"), allow_nan=False))
    rows = trace["traceEvents"]
    assert trace["otherData"] == {"clock": "a clock"}
    assert {(row["ph"], row["pid"]) for row in rows} == {("M", 0), ("M", 1), ("X", 0), ("X", 1)}
    names = {row["pid"]: row["args"]["name"] for row in rows if row["name"] == "process_name"}
    assert names == {0: "stage 0 (rank 0, host)", 1: "stage 1 (rank 10, host)"}
    spans = [(r["pid"], r["tid"], r["name"], r["cat"], r["ts"], r["dur"]) for r in rows if r["ph"] == "X"]
    assert spans[:4] == [
        (0, 0, "ForwardPass", "forward", 0, 40_000),
        (0, 0, "SendActivation", "wait", 40_000, 30_000),
        (0, 0, "TrainExits", "exits", 70_000, 20_000),
        (0, 1, "step 1", "step", 0, 100_000),
    ]
    assert [span[4] for span in spans[4:]] == [2_500, 42_500, 72_500, 2_500]
    assert rows[-2]["args"] == {"step": 1, "micro_batch": 0, "buffer": 0}
    kinds = Counter(row["cat"] for row in chrome_trace([recorded], "")["traceEvents"] if row["ph"] == "X")
    assert kinds == {"teacher": 2, "wait": 8, "forward": 6, "reduce": 2, "optimizer": 2, "step": 2}


def test_the_picture_shows_each_kind_for_as_long_as_it_lasted(tmp_path):
    plot_timeline(tmp_path / "timeline.png", [simple(0), simple(1)])
    image = imread(tmp_path / "timeline.png")[..., :3]
    shares = {}
    lanes = image[: int(0.8 * len(image))]  # without the legend
    for kind in ("forward", "wait", "exits", "optimizer"):
        close = abs(lanes - to_rgb(COLOURS[kind])).max(-1) < 0.02
        shares[kind] = close.sum(1).max()  # pixels of the row that has most of the colour
    assert shares["optimizer"] == 0
    assert shares["wait"] / shares["forward"] == pytest.approx(30 / 40, abs=0.05)
    assert shares["exits"] / shares["forward"] == pytest.approx(20 / 40, abs=0.05)
    assert shares["forward"] > 0.3 * image.shape[1]
