"""The sweep: figures of hand-made records, groups, and timing with a clock that is ours."""

import csv
import json

import pytest
import torch

from ee_scale.errors import UserError
from ee_scale.evaluation.per_exit import agreement_gap, exit_qualities, largest_gap
from ee_scale.evaluation.quality_report import match_gap_sentence, write_report
from ee_scale.evaluation.records import Records
from ee_scale.evaluation.sweep import PLAIN, calibrated_point, match_gap, sweep, sweep_limits, time_points

CALIBRATION = {
    "policy": "threshold",
    "thresholds": {"1": 0.9, "2": None},
    "tags": {"b": {"thresholds": {"1": None, "2": 0.5}}},
}


@pytest.fixture
def records() -> Records:
    """Four tokens, two of tag a and two of tag b; exits after layers 1 and 2 of 4."""
    scores = torch.tensor([[0.92, 0.4, 0.95, 0.1], [0.6, 0.99, 0.7, 0.3]])
    return Records(
        (1, 2),
        4,
        {"threshold": scores, "margin": scores, "entropy": 1 - scores},
        torch.tensor([[7, 5, 5, 5], [7, 7, 7, 5]]).int(),
        torch.tensor([[2.0, 3.0, 4.0, 5.0], [1.5, 2.0, 2.0, 3.0]]),
        torch.tensor([7, 7, 7, 7]).int(),
        torch.tensor([1.0, 1.0, 1.0, 2.0]),
        torch.tensor([0, 0, 1, 1]),
        ("a", "b"),
    )


def test_every_limit_of_the_sweep(records):
    points = sweep(records, "threshold", CALIBRATION)
    assert [point.limit for point in points[:21]] == pytest.approx([1 - i / 20 for i in range(21)])
    assert [point.name for point in points[21:]] == ["calibrated", "lossless", PLAIN]
    first, half, last = points[0], points[10], points[20]
    assert (first.match_rate, first.loss, first.mean_depth) == (1.0, 1.25, 4.0)
    # At 0.5: tokens 0 and 2 leave at 1 (7 right, 5 wrong), token 1 at 2 (right), token 3 nowhere.
    assert (half.match_rate, half.loss, half.mean_depth) == (0.75, (2 + 2 + 4 + 2) / 4, (1 + 2 + 1 + 4) / 4)
    assert half.tags["a"] == {"match_rate": 1.0, "loss": 2.0, "mean_depth": 1.5}
    assert half.tags["b"] == {"match_rate": 0.5, "loss": 3.0, "mean_depth": 2.5}
    assert (last.match_rate, last.mean_depth) == (0.25, 1.0)
    assert half.settings == {"exit_policy": "threshold", "exit_threshold": 0.5}
    lossless, plain = points[-2:]
    assert (lossless.match_rate, lossless.loss, lossless.mean_depth) == (1.0, 1.25, None)
    assert plain.settings == {}


def test_calibrated_limits_of_each_tag(records):
    point = calibrated_point(records, CALIBRATION)
    # Tag a: only token 0 reaches 0.9 at exit 1. Tag b has limits of its own: token 2 passes 0.5 at exit 2.
    assert point.tags["a"]["mean_depth"] == (1 + 4) / 2
    assert point.tags["b"]["mean_depth"] == (2 + 4) / 2
    assert point.match_rate == 1.0
    assert point.settings == {"exit_policy": "threshold"}


def test_entropies_are_swept_over_what_was_seen(records):
    limits = sweep_limits(records, "entropy")
    assert len(limits) == 21
    assert limits == sorted(limits)
    assert (limits[0], limits[-1]) == pytest.approx((0.01, 0.9))
    assert sweep(records, "entropy")[20].mean_depth == 1.0


def test_the_largest_gap_is_named(records):
    by_tag = {tag: exit_qualities(own) for tag, own in records.by_tag().items()}
    assert [row.agreement for row in by_tag["a"]] == [0.5, 1.0, 1.0]
    assert [row.agreement for row in by_tag["b"]] == [0.0, 0.5, 1.0]
    k, gap = agreement_gap(by_tag)
    assert (k, gap.high, gap.low, gap.size) == (1, "a", "b", 0.5)
    assert largest_gap({"x": 0.2, "y": 0.9, "z": 0.5}).size == pytest.approx(0.7)
    assert largest_gap({"x": 0.2}) is None
    points = sweep(records, "threshold")
    point, gap = match_gap(points)
    assert gap.size == max(abs(p.tags["a"]["match_rate"] - p.tags["b"]["match_rate"]) for p in points)
    assert f"{point.limit:.3g}" in match_gap_sentence(points)
    assert "'a'" in match_gap_sentence(points)
    assert match_gap_sentence(sweep(records.by_tag()["a"], "threshold")) == ""


class Decoder:
    """`generate` on a clock of its own: a batch takes a second, times a share that the limit sets."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def generate(self, **settings):
        self.calls.append(settings)
        limit = settings.get("exit_threshold", 1.0)
        drift = 2.0 if len(self.calls) % 7 == 0 else 1.0  # other work on the machine, now and then
        self.now += {"lossless": 0.5}.get(settings.get("exit_policy"), 0.25 + 0.75 * limit) * drift

    def clock(self):
        return self.now


def test_speeds_are_ratios_to_decoding_without_exits(records):
    decoder, points = Decoder(), sweep(records, "threshold", CALIBRATION)
    prompts = torch.arange(16 * 5).view(16, 5)
    tags = ["a", "b"] * 8
    time_points(points, decoder.generate, prompts, 3, 5, tags=tags, clock=decoder.clock)
    by_limit = {point.limit: point for point in points}
    assert points[-1].speed == {1: 1.0, 8: 1.0}
    assert by_limit[0.0].speed[8] == pytest.approx(4.0, rel=0.1)
    assert by_limit[0.5].speed[1] == pytest.approx(1 / 0.625, rel=0.2)
    assert points[-2].speed[8] == pytest.approx(2.0, rel=0.1)
    assert points[-1].tokens_per_second == {1: 3.0, 8: 24.0}  # 3 new tokens per row and second
    assert all(call["max_new_tokens"] == call["min_new_tokens"] == 3 for call in decoder.calls)
    assert not any(call["do_sample"] for call in decoder.calls)
    assert {len(call["input_ids"]) for call in decoder.calls} == {1, 8}
    assert {int(call["input_ids"][0, 0]) for call in decoder.calls if len(call["input_ids"]) == 8} == {0, 40}
    own = [call for call in decoder.calls if call.get("exit_tags")]
    assert own
    assert all(call["exit_policy"] == "threshold" and "exit_threshold" not in call for call in own)
    assert {tuple(call["exit_tags"]) for call in own} == {("a",), ("b",), ("a", "b") * 4}


def test_every_round_times_every_point_in_turn(records):
    decoder, points = Decoder(), sweep(records, "threshold")
    time_points(points, decoder.generate, torch.zeros(1, 4, dtype=torch.long), 2, 3, clock=decoder.clock)
    names = [(call.get("exit_policy"), call.get("exit_threshold")) for call in decoder.calls]
    rounds = [names[start : start + 23] for start in range(0, len(names), 23)]
    assert len(rounds) == 4  # one to warm up
    assert all(len(set(one)) == 23 for one in rounds)
    assert rounds[1] != rounds[2]
    assert list(points[0].speed) == [1]  # one prompt is no batch of 8


def test_what_the_model_refuses_is_said_in_one_line(records):
    def generate(**_):
        raise ValueError("exit_policy: not with these exits\nand more")

    with pytest.raises(UserError, match=r"^sweep: threshold at 1: exit_policy: not with these exits$"):
        time_points(sweep(records, "threshold"), generate, torch.zeros(1, 4), 2, 1)


@pytest.mark.parametrize("timed", [False, True])
def test_files(records, tmp_path, timed):
    points = sweep(records, "threshold", CALIBRATION)
    if timed:
        decoder = Decoder()
        time_points(points, decoder.generate, torch.zeros(8, 4), 2, 1, clock=decoder.clock)
    write_report(tmp_path / "out", exit_qualities(records), {"model": "m"}, points)
    report = json.loads((tmp_path / "out" / "evaluate.json").read_text())
    assert len(report["sweep"]) == 24
    assert report["sweep"][10]["match_rate"] == 0.75
    assert ("speed_batch_8" in report["sweep"][10]) == timed
    with (tmp_path / "out" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[10]["match_rate[b]"] == "0.5"
    assert rows[22]["mean_depth"] == rows[22]["mean_depth[a]"] == ""
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
