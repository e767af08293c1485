"""scripts/bench_palette.py from the command line to its tables, on a tiny encoder."""

import json
from pathlib import Path

import bench_palette
import pytest
import torch
from _palette_bench import Case


@pytest.fixture(autouse=True)
def _threads():
    """The script sets torch's."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def case(bert_dir, labelled) -> Case:
    """Two sizes, a few steps."""
    settings = [f"model={bert_dir}", f"data={labelled['train']}", f"data.valid={labelled['valid']}"]
    settings += ["space={hidden: [1.0], ffn: [1.0, 0.5], depth: [4, 2]}", "data.seq_length=16"]
    settings += ["train.micro_batch_size=2", "train.global_batch_size=4", "importance={samples: 8, batch_size: 4}"]
    settings += ["train.precision=fp32", "train.verify_frozen=false", "sampling.randoms=1"]
    return Case("tiny", settings, ((64, 4), (64, 2)), (3, 2, 3), 1e-2, 0, 2, False, True)


def test_ways_of_an_encoder(case, monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(bench_palette, "cases", lambda _: [case])
    path = tmp_path / "bench.json"
    words = ["bench_palette.py", "--seeds", "2", "--polish", "2", "--threads", "1", "--json", str(path)]
    monkeypatch.setattr("sys.argv", [*words, "--plot", str(tmp_path / "plot.png")])
    bench_palette.main()
    (report,) = json.loads(path.read_text())["reports"]
    assert [len(result["quality"]) for result in report["results"]] == [2] * len(report["results"])
    assert len(report["results"][1]["seeds"]) == 2
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert "supernet - separate" in capsys.readouterr().out
