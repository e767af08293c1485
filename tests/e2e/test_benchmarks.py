"""The benchmarks run, lose nothing to a time limit, and measure nothing twice; their numbers are not looked at."""

import json
from argparse import Namespace
from pathlib import Path

import _bench_models
import ablate_drafter
import bench_decode
import bench_gpu
import bench_llama_cpp
import bench_pipeline_decode
import bench_tune
import pytest
import torch
from _profile import busy_time, profile
from helpers.llama_cpp import needs_llama_cpp
from helpers.spawn import spawn
from transformers import AutoModelForCausalLM

from ee_scale import EarlyExitForCausalLM
from ee_scale.cli.main import main
from ee_scale.config.checks import check_tune
from ee_scale.config.compose import compose_config

SMALL = ["--small", "--device", "cpu"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a whole small run."""
    path = tmp_path_factory.mktemp("bench") / "gpu.json"
    bench_gpu.main([*SMALL, "--json", str(path)])
    return path


def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is measured from now on, beside the machine; each is answered by an error."""
    found: list[str] = []

    def run(target: str, *given: object, **options: object) -> dict:
        name = target.partition(":")[2]
        if name == "measure_machine":
            return {"device": "cpu", "flops": {"bfloat16": 1e12, "float32": 1e12}, "bytes_per_second": 1e9}
        found.append(name)
        raise RuntimeError("CUDA error: something\nbroke")

    monkeypatch.setattr(bench_gpu, "run_timed", run)
    return found


def test_a_small_run(measured: Path):
    found = json.loads(measured.read_text())
    assert list(found["tune"]) == ["frozen", "full"]
    for row in found["tune"].values():
        assert row["step"] > 0
        assert row["foretold_gib"] > 0
        assert row["profile"]["host_ms"]
        assert row["profile"]["attention"]
    table = found["decode"]["batch 1"]["tables"]["greedy, batch 1"]
    assert {"transformers generate", "our loop, exits off", "lossless", "threshold, all exits"} <= {
        row["name"] for row in table
    }
    for row in table:
        if row["name"].startswith(("our loop", "lossless")):
            assert row["same"] == 1.0  # fp32 on a CPU
    assert found["machine"]["models"]["agreement"]["4"] >= bench_gpu.AGREEMENT


def test_what_is_there_is_not_measured_again(measured: Path, monkeypatch: pytest.MonkeyPatch):
    calls = asked(monkeypatch)
    bench_gpu.main([*SMALL, "--json", str(measured)])
    assert calls == []


def test_what_failed_is_written_and_measured_again(measured: Path, tmp_path: Path, monkeypatch, capsys):
    found, path = json.loads(measured.read_text()), tmp_path / "gpu.json"
    del found["tune"]["full"]
    path.write_text(json.dumps(found))
    models = tmp_path / "models"
    (models / "exits").mkdir(parents=True)
    (models / "exits" / "config.json").touch()
    for _ in range(2):
        calls = asked(monkeypatch)
        bench_gpu.main([*SMALL, "--json", str(path), "--models", str(models), "--parts", "tune"])
        assert calls == ["measure_tune"]
        assert "broke" in json.loads(path.read_text())["tune"]["full"]["error"]
    assert "broke" in capsys.readouterr().out


def test_no_time_is_left(tmp_path: Path, monkeypatch):
    """The machine is measured, and a clock that jumps leaves nothing for the rest."""
    calls, now = asked(monkeypatch), iter([0.0, 0.0, *[1e6] * 99])
    monkeypatch.setattr(bench_gpu.time, "monotonic", lambda: next(now))
    (tmp_path / "exits").mkdir()
    (tmp_path / "exits" / "config.json").touch()
    bench_gpu.main([*SMALL, "--json", str(tmp_path / "gpu.json"), "--models", str(tmp_path)])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert calls == []
    assert {row["error"] for part in ("tune", "decode") for row in found[part].values()} == {"no time left"}


def test_numbers_of_two_sizes_do_not_mix(measured: Path, monkeypatch):
    asked(monkeypatch)
    with pytest.raises(SystemExit, match="another size or device"):
        bench_gpu.main(["--device", "cpu", "--json", str(measured)])


def test_a_fork_that_cuda_does_not_like_becomes_a_fresh_process(tmp_path: Path, monkeypatch):
    ways = []

    def run(target: str, *given: object, forks: bool, **options: object) -> dict:
        ways.append(forks)
        if forks:
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
        if target.endswith("measure_tune"):
            raise RuntimeError("another")
        return {"device": "cpu", "flops": {}, "bytes_per_second": 1.0}

    monkeypatch.setattr(bench_gpu, "run_timed", run)
    bench_gpu.main([*SMALL, "--json", str(tmp_path / "gpu.json"), "--parts", "tune"])
    assert ways == [True, False, False, False, False, False]  # the machine twice, models, and two lines


def test_steps_are_written_head_by_head(tmp_path: Path, monkeypatch, capsys):
    path, seen = tmp_path / "bench.json", []

    def run(target: str, job: object, **environment: str) -> dict:
        if target.endswith("save_model"):
            Path(job.folder).mkdir()
            return {}
        seen.append(len(json.loads(path.read_text())["results"][0]["rows"]) if path.exists() else 0)
        times = dict.fromkeys(("ours", "ideal", "ideal_forward", "ideal_exits", "naive"), 0.1)
        ratios = dict.fromkeys(("over_ideal", "over_naive", "over_ideal_fastest", "over_naive_fastest"), 1.0)
        return {"head": job.head, "seconds": times, "tokens_per_second": 1.0, **ratios}

    monkeypatch.setattr(bench_tune, "run_child", run)
    monkeypatch.setattr("sys.argv", ["bench_tune.py", "--parts", "a", "--device", "cpu", "--json", str(path)])
    bench_tune.main()
    assert seen == [0, 1]
    assert "head low_rank: ours 100.0 ms" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["bench_tune.py", "--parts", "a", "--device", "cpu", "--heads", "full"])
    bench_tune.main()
    assert len(seen) == 3


def measure_stage(rank: int, arguments: list[tuple]) -> list[dict]:
    return bench_pipeline_decode.measure_rank(*arguments[rank])


def test_decoding_over_stages(tmp_path: Path, monkeypatch, capsys):
    """In ranks of the fork server, which start at once."""
    monkeypatch.setattr(bench_pipeline_decode, "run_children", lambda _, ranks, **__: spawn(measure_stage, 2, ranks))
    words = ["--stages", "2", "--agreements", "0.6", "--rows", "1", "2", "--new-tokens", "12", "--stage-ms", "1"]
    bench_pipeline_decode.main([*words, "--json", str(tmp_path / "x.json")])
    alone, both = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert alone["same"]
    assert both["same"]
    assert alone["drafted"] > 0
    assert both["drafted"] == 0  # two rows keep two stages busy
    assert both["predicted"] is None
    assert 1 <= alone["predicted"] <= 2
    assert "60%" in capsys.readouterr().out


def test_a_model_whose_exits_agree_as_often_as_wanted(tmp_path: Path):
    _bench_models.write_model(tmp_path / "plain", _bench_models.llama(6, 64, 256), "cpu", torch.bfloat16)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    assert plain.dtype == torch.bfloat16
    found = {
        wanted: _bench_models.write_exits(tmp_path / f"{wanted}", tmp_path / "plain", (2, 3), wanted, "cpu")
        for wanted in (0.3, 0.8)
    }
    for wanted, agreed in found.items():
        assert wanted <= agreed[2] < wanted + 0.1
        model = EarlyExitForCausalLM.from_pretrained(tmp_path / f"{wanted}", dtype="auto")
        ids = torch.randint(256, (4, 128), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            out = model(ids, use_cache=False)
        share = (out.exit_logits[2].argmax(-1) == out.logits.argmax(-1)).double().mean()
        assert float(share) == pytest.approx(agreed[2], abs=0.02)  # as it was written


def test_what_a_call_does_inside():
    query = torch.randn(1, 2, 8, 16)
    found = profile(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query), torch.device("cpu"))
    assert found.attention == {"flash_attention_for_cpu": 1}
    assert (found.busy, found.kernels, found.waits) == (None, 0, 0)
    assert busy_time([(0, 4), (5, 6), (1, 2), (3, 5.5)]) == 6
    assert busy_time([]) == 0


@pytest.mark.parametrize("words", [["--random", "big"], ["--random", "4x64", "--peers", "x"], ["--model", "x"]])
def test_words_that_decoding_does_not_understand(words, capsys):
    with pytest.raises(SystemExit) as left:
        bench_decode.main(words)
    assert left.value.code not in (0, None)


def test_the_ablation_of_drafters_trains_reads_and_does_nothing_twice(model_dir, corpus, tmp_path, monkeypatch, capsys):
    words = ["--model", str(model_dir), "--data", str(corpus), "--held", f"a={corpus}", f"b={corpus}"]
    words += ["--work", str(tmp_path), "--tokens", "256", "--seq-length", "32", "--prompts", "2"]
    words += ["--prompt-tokens", "8", "--new-tokens", "8", "--arms", "epochs"]
    ablate_drafter.main(words)
    results = json.loads((tmp_path / "ablation.json").read_text())
    assert list(results) == ["epochs 4"]
    (row,) = results["epochs 4"]["exits"]
    assert row["exit"] == 1
    assert set(row["agreement"]) == {f"{text}, {kind}" for text in "ab" for kind in ("text", "greedy", "sampled")}
    assert row["speed"]["weights"]["cost"] > 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "epochs-4" / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 4 * 256 // 32 // 2
    capsys.readouterr()
    monkeypatch.setattr(ablate_drafter, "train", None)  # whatever is trained again now fails
    ablate_drafter.main(words)
    assert "drafting exits" in capsys.readouterr().out


def test_every_run_of_the_ablation_has_settings_that_tune_takes():
    options = Namespace(tokens=150_000, seq_length=256, small=("small.txt", "more.txt"))
    for settings in ablate_drafter.arms(options).values():
        config = compose_config("tune", ["model=m", "data.path=[a,b]", "train.steps=9", "exits=drafter", *settings])
        check_tune(config)
        assert config.exits.layers[0] < 0.2


@needs_llama_cpp
def test_llama_cpp(model_dir: Path, tmp_path: Path):
    """Here the model drafts for itself, so that all its drafts are accepted."""
    file, text, found = tmp_path / "m.gguf", tmp_path / "text.txt", tmp_path / "found.json"
    assert main(["export", "format=gguf", f"src={model_dir}", f"out={file}"]) == 0
    text.write_text("<|endoftext|>".join(["one token reads what comes next " * 4] * 2))
    words = ["--model", file, "--drafter", file, "--data", text, "--json", found, "--drafts", 2, "--rounds", 1]
    words += ["--prompt-tokens", 12, "--new-tokens", 8]
    bench_llama_cpp.main([str(word) for word in words])
    rows = {row["name"]: row for row in json.loads(found.read_text())["rows"]}
    assert list(rows) == ["alone", "drafter, 2", "n-grams, 2", "n-grams, then drafter, 2"]
    assert rows["alone"]["ratio"] == 1
    assert rows["drafter, 2"]["accepted"] > 0.8
