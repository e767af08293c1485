"""`ee-scale evaluate`: the table's numbers are those of a plain loop over transformers' model; sweeps and groups."""

import csv
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ee_scale.cli.main import main


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "model"
    assert main(["export", f"src={finished_run}", f"out={folder}"]) == 0
    return folder


def test_numbers_files_and_table(exported, corpus, tmp_path, capsys):
    settings = ["seq_length=16", "batch_size=3", "max_tokens=160", f"cache_dir={tmp_path}", f"out={tmp_path / 'out'}"]
    assert main(["evaluate", f"model={exported}", f"data={corpus}", *settings]) == 0
    assert "4 (final)" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "evaluate.json").read_text())
    rows = {row["layer"]: row for row in report["exits"]}
    assert report["tokens"] == 160

    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    tokens = AutoTokenizer.from_pretrained(exported)(corpus.read_text()).input_ids
    losses, agreed = {1: [], 3: [], 4: []}, {1: [], 3: []}
    for start in range(0, 170, 17):
        window = torch.tensor([tokens[start : start + 17]])
        with torch.no_grad():
            output = model(window[:, :-1])
        for k, logits in {**output.exit_logits, 4: output.logits}.items():
            losses[k].append(torch.nn.functional.cross_entropy(logits[0], window[0, 1:]).item())
            if k != 4:
                agreed[k] += (logits.argmax(-1) == output.logits.argmax(-1)).flatten().tolist()
    for k, values in losses.items():
        assert rows[k]["loss"] == pytest.approx(sum(values) / len(values), rel=1e-5)
        assert rows[k]["perplexity"] == pytest.approx(torch.tensor(rows[k]["loss"]).exp().item(), rel=1e-5)
    for k, values in agreed.items():
        assert rows[k]["agreement"] == pytest.approx(sum(values) / len(values))
    with (tmp_path / "out" / "evaluate.csv").open() as file:
        assert [int(row["layer"]) for row in csv.DictReader(file)] == [1, 3, 4]
    assert (tmp_path / "out" / "evaluate.png").read_bytes().startswith(b"\x89PNG")


def test_untrained_exits_of_a_plain_model(model_dir, corpus, tmp_path, capsys):
    given = [f"model={model_dir}", f"data={corpus}", "seq_length=16", "max_tokens=160", f"cache_dir={tmp_path}"]
    assert main(["evaluate", *given, "exits=[2,4]", f"out={tmp_path / 'out'}"]) == 0
    rows = json.loads((tmp_path / "out" / "evaluate.json").read_text())["exits"]
    assert [row["layer"] for row in rows] == [2, 4, 4]
    # The logit lens after the last layer is the final layer.
    assert rows[1]["loss"] == pytest.approx(rows[2]["loss"], rel=1e-6)
    assert rows[1]["agreement"] == 1.0
    assert rows[0]["agreement"] < 1.0


@pytest.fixture(scope="module")
def calibrated(exported, corpus, tmp_path_factory):
    """A copy of the export with limits in it."""
    folder = shutil.copytree(exported, tmp_path_factory.mktemp("calibrated") / "model")
    given = [f"data={corpus}", "seq_length=16", "batch_size=64", "agreement=0.6", "device=cpu", "max_tokens=8000"]
    cache = tmp_path_factory.mktemp("cache")
    assert main(["calibrate", f"model={folder}", *given, f"cache_dir={cache}"]) == 0
    return folder


def test_sweep_with_real_decoding(calibrated, corpus, tmp_path, capsys):
    settings = ["seq_length=32", "max_tokens=640", f"cache_dir={tmp_path}", f"out={tmp_path / 'out'}", "device=cpu"]
    timing = ["sweep=true", "prompt_tokens=8", "new_tokens=3", "rounds=1"]
    assert main(["evaluate", f"model={calibrated}", f"data={corpus}", *settings, *timing]) == 0
    shown = capsys.readouterr().out
    assert "calibrated" in shown
    assert "lossless" in shown
    points = json.loads((tmp_path / "out" / "evaluate.json").read_text())["sweep"]
    assert [point["name"] for point in points] == ["threshold"] * 21 + ["calibrated", "lossless", "no exits"]
    rates, depths = ([point[key] for point in points[:21]] for key in ("match_rate", "mean_depth"))
    assert depths == sorted(depths, reverse=True)
    assert (rates[0], depths[0], depths[20]) == (1.0, 4.0, 1.0)
    assert all(point[f"tokens_per_second_batch_{size}"] > 0 for point in points for size in (1, 8))
    assert points[-1]["speed_batch_1"] == points[-1]["speed_batch_8"] == 1.0
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_figures_per_tag(calibrated, corpus, tmp_path, capsys):
    data = tmp_path / "tagged.jsonl"
    lines = corpus.read_text().splitlines()[:60]
    # One group is the model's own language, the other is not.
    rows = [{"text": text, "task": "words"} for text in lines] + [
        {"text": text.upper(), "task": "caps"} for text in lines
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    settings = ["seq_length=16", "max_tokens=0", f"cache_dir={tmp_path}", f"out={tmp_path / 'out'}", "device=cpu"]
    given = [f"model={calibrated}", f"data={data}", "tag_key=task", "sweep=true", "prompts=0"]
    assert main(["evaluate", *given, *settings]) == 0
    report = json.loads((tmp_path / "out" / "evaluate.json").read_text())
    assert set(report["tags"]) == {"words", "caps"}
    shares = {tag: report["tags"][tag]["tokens"] / report["tokens"] for tag in report["tags"]}
    assert sum(shares.values()) == pytest.approx(1)
    for index, row in enumerate(report["exits"]):
        for key in ("loss", "agreement"):
            own = sum(share * report["tags"][tag]["exits"][index][key] for tag, share in shares.items())
            assert own == pytest.approx(row[key])
    for point in report["sweep"]:
        own = sum(share * point["tags"][tag]["match_rate"] for tag, share in shares.items())
        assert own == pytest.approx(point["match_rate"])
        assert "speed_batch_1" not in point
    shown = " ".join(capsys.readouterr().out.split())
    words, caps = ([row["agreement"] for row in report["tags"][tag]["exits"]] for tag in ("words", "caps"))
    gaps = [abs(a - b) for a, b in zip(words, caps, strict=True)]
    assert f"({100 * max(gaps):.1f} points)" in shown
    assert "Largest gap between groups in use, at threshold" in shown


def test_stored_limits_are_shown_without_a_sweep(calibrated, corpus, tmp_path, capsys):
    settings = ["seq_length=16", "max_tokens=640", f"cache_dir={tmp_path}", "device=cpu"]
    assert main(["evaluate", f"model={calibrated}", f"data={corpus}", *settings]) == 0
    assert "calibrated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prompts=5", "prompts=5: give a multiple of 8"),
        ("prompts=64", "prompts=64: 40 windows of the data have prompt_tokens=8 tokens"),
        ("new_tokens=0", "new_tokens=0: must be at least 1"),
        ("new_tokens=60", "prompt_tokens=8 + new_tokens=60 is above the model's max_position_embeddings=64"),
        ("policy=patience", "policy=patience: choose one of threshold, entropy, margin"),
        ("tag_key=task", "tag_key=task: data="),
    ],
)
def test_bad_sweeps(exported, corpus, tmp_path, capsys, override, message):
    given = [f"model={exported}", f"data={corpus}", "seq_length=16", "max_tokens=640", f"cache_dir={tmp_path}"]
    assert main(["evaluate", *given, "sweep=true", "prompt_tokens=8", "new_tokens=2", override]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")


def test_no_sweep_without_exits(model_dir, corpus, capsys):
    assert main(["evaluate", f"model={model_dir}", f"data={corpus}", "sweep=true", "seq_length=16"]) == 2
    assert f"sweep=true: {model_dir} has no exits" in capsys.readouterr().err
