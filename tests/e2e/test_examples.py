"""The scripts in docs/examples, one after the other in this process: each prints what it says it does."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import ee_scale

EXAMPLES = Path(ee_scale.__file__).parents[1] / "docs" / "examples"


@pytest.fixture
def example(monkeypatch, tmp_path, capsys):
    """Run one by its name; returns what it printed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_exits(example, model_dir, corpus):
    said = example("tune_exits.py", model_dir, corpus, "tuned")
    assert len(re.findall(r"^exit [13]: loss \d\.\d+ after 20 steps$", said, flags=re.M)) == 2
    assert "16 tokens, " in said
    assert AutoModelForCausalLM.from_pretrained("tuned/model").config.num_hidden_layers == 4

    said = example("convert_calibrate.py", "tuned/model", corpus, "converted")
    assert float(re.search(r"logits, relative: (.*)", said)[1]) < 1e-4
    assert re.search(r"limits \(.*\): \d+\.\d% of the tokens unchanged, mean depth [1-4]", said)
    assert len(re.findall(r"^layer \d: loss ", said, flags=re.M)) == 3
    assert "exit_calibration" in Path("converted/model/generation_config.json").read_text()


def test_a_palette(example, model_dir, corpus):
    said = example("cut_palette.py", model_dir, corpus, corpus, "small")
    folders = re.findall(r"^(\S+): [\d,]+ parameters, prompt ", said, flags=re.M)
    assert folders
    assert AutoModelForCausalLM.from_pretrained(Path("small/palette", folders[0]))


def test_they_are_short():
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert len(lengths) == 3
    assert max(lengths.values()) <= 40
