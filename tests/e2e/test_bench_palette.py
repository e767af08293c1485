"""scripts/bench_palette.py from the command line to its tables, on a tiny encoder."""

import json
from dataclasses import replace
from pathlib import Path

import _palette_latency
import bench_palette
import pytest
import torch
from _palette_bench import Bench, Case, Steps
from rich.console import Console

from ee_scale.backbone.loading import read_config
from ee_scale.elastic.architecture import ElasticMap
from ee_scale.grid import Layout, join_grid, leave_grid


@pytest.fixture(autouse=True)
def _as_before():
    """The script sets torch's threads and joins a grid."""
    threads = torch.get_num_threads()
    yield
    leave_grid()
    torch.set_num_threads(threads)


@pytest.fixture
def case(bert_dir, labelled, tmp_path) -> Case:
    """Two sizes, a few steps; a third of the held-out texts stands for another domain."""
    settings = [f"model={bert_dir}", f"data={labelled['train']}", f"data.valid={labelled['valid']}"]
    settings += ["space={hidden: [1.0], ffn: [1.0, 0.5], depth: [4, 2]}", "data.seq_length=16"]
    settings += ["train.micro_batch_size=2", "train.global_batch_size=4", "importance={samples: 8, batch_size: 4}"]
    settings += ["train.precision=fp32", "train.verify_frozen=false"]
    tweets = tmp_path / "tweets.jsonl"
    tweets.write_text("".join(labelled["valid"].read_text().splitlines(keepends=True)[:30]))
    return Case("tiny", settings, ((64, 4), (64, 2)), Steps(2, 3, 2), 1e-2, 0, 2, True, tweets)


def test_from_the_command_line(case, monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(bench_palette, "cases", lambda _: [case])
    path = tmp_path / "bench.json"
    words = ["bench_palette.py", "--seeds", "2", "--polish", "2", "--threads", "1", "--no-latency"]
    monkeypatch.setattr("sys.argv", [*words, "--json", str(path), "--plot", str(tmp_path / "plot.png")])
    bench_palette.main()
    (report,) = json.loads(path.read_text())["reports"]
    assert [way["name"] for way in report["ways"]] == ["sliced", "supernet", "polished, 2 steps", "separate"]
    for way in report["ways"]:
        assert way["seconds"] == pytest.approx(way["apart"] + report["teacher_seconds"])
    for judged, name, texts in zip(report["judged"], ("held out", "tweets"), (90, 30), strict=True):
        assert (judged["name"], judged["texts"]) == (name, texts)
        assert [len(judged["seeds"][way]) for way in ("sliced", "supernet", "separate")] == [1, 2, 2]
        for way, spreads in judged["minus_separate"].items():
            pairs = zip(judged["quality"][way], judged["quality"]["separate"], strict=True)
            assert [spread["mean"] for spread in spreads] == pytest.approx([a["mean"] - b["mean"] for a, b in pairs])
    assert (tmp_path / "plot.png").stat().st_size > 1000
    said = capsys.readouterr().out
    for text in ("minutes for this case", "tiny, tweets", "supernet - separate", "polished, 2 steps: "):
        assert text in said


def test_the_supernet_on_the_way_to_a_polished_one_is_the_supernet(case) -> None:
    bench = Bench(case, join_grid(Layout(), torch.device("cpu")), Console(quiet=True))
    bench.train_teacher()
    bench.polished(1, "train.seed=3")
    bench.supernet("alone", *bench.recipe(2), "train.seed=3")
    ours, theirs = (bench.results[name].runs[0] for name in ("supernet", "alone"))
    assert bench.results["supernet"].trained == bench.results["alone"].trained
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one["held out"].sums, other["held out"].sums)


def test_latency(bert_dir, monkeypatch) -> None:
    monkeypatch.delitem(_palette_latency.ONNX, "onnx fp32")  # an export takes seconds
    elastic_map = ElasticMap(read_config(bert_dir), "classify")
    full = elastic_map.shape.full
    latency = _palette_latency.measure_latency(elastic_map, [replace(full, ffn=32, layers=(0,))], 8)
    assert latency.tokens == 8
    assert list(latency.full) == list(latency.sizes) == ["torch", "onnx int8"]
    for runtime, ms in latency.full.items():
        assert ms > 0
        assert latency.ratios(runtime) == [latency.sizes[runtime][0] / ms]
