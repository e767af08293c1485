"""`ee-scale probe`: on a plain model and on one with trained exits, its files, and what it refuses."""

import json

import pytest

from ee_scale.cli.main import main
from ee_scale.evaluation.cost_model import threshold_speedup
from ee_scale.modeling.costs import Costs, best_draft_length

QUICK = ["context=16", "max_tokens=200", "prompts=3", "prompt_tokens=8", "new_tokens=12", "seconds=0.05", "device=cpu"]


def _numbers(values):
    return {int(key): value for key, value in values.items()}


def _check_predictions(report):
    """Every predicted speed is the cost model's for the measured times and readings in the same file."""
    seconds = report["seconds"]
    costs = Costs(4, _numbers(seconds["layer"]), _numbers(seconds["head"]), _numbers(seconds["checks"]))
    for row in report["exits"]:
        k, read = row["layer"], row["readings"]
        assert row["cost"] == pytest.approx(
            (k * costs.layer[1] + costs.checks[k]) / (4 * costs.layer[1] + costs.head[1])
        )
        assert tuple(row["greedy"]) == best_draft_length(costs, k, read["greedy"]["agreement"])
        assert tuple(row["sampled"]) == best_draft_length(costs, k, read["sampled"]["acceptance"])
        assert row["threshold"] == threshold_speedup(costs, {k: read["sampled"]["leaving"]})
        assert read["text"]["tokens"] >= 200


def test_plain_model(model_dir, corpus, tmp_path, capsys):
    given = [f"model={model_dir}", f"data={corpus}", f"cache_dir={tmp_path}", f"out={tmp_path / 'out'}"]
    assert main(["probe", *given, *QUICK]) == 0
    shown = capsys.readouterr().out
    assert "untrained exits, 4 layers" in shown
    assert "on this machine as it is" in shown
    assert "lower bound" in shown
    report = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert [row["layer"] for row in report["exits"]] == [1, 2, 3]
    assert report["verdict"][0] in " ".join(shown.split())
    _check_predictions(report)
    assert (tmp_path / "out" / "probe.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("form", ["early_exit", "sidecar"])
def test_trained_exits(finished_run, corpus, tmp_path, capsys, form):
    folder = tmp_path / "model"
    assert main(["export", f"src={finished_run}", f"out={folder}", f"kind={form}"]) == 0
    given = [f"model={folder}", f"data={corpus}", f"cache_dir={tmp_path}", f"out={tmp_path / 'out'}"]
    assert main(["probe", *given, *QUICK]) == 0
    assert "its exits, 4 layers" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert [row["layer"] for row in report["exits"]] == [1, 3]
    _check_predictions(report)
    assert main(["probe", *given, *QUICK, "layers=[1]"]) == 2
    assert "has exits already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("temperature=0", "temperature=0"),
        ("agreement=1.5", "agreement=1.5"),
        ("new_tokens=0", "new_tokens=0"),
        ("context=60", "context: 76 positions are needed, the model has max_position_embeddings=64"),
        ("new_tokens=60", "prompt_tokens + new_tokens: 68 positions"),
        ("layers=[4]", "4 is the final layer"),
        ("layers=[9]", "9 is not in 1..4"),
        ("model=nowhere", "no such folder"),
    ],
)
def test_bad_input(model_dir, corpus, tmp_path, capsys, wrong, said):
    given = [f"model={model_dir}", f"data={corpus}", f"cache_dir={tmp_path}"]
    assert main(["probe", *given, *QUICK, wrong]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines
    assert said in lines[0]
