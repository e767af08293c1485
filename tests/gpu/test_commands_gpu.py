"""What reads a model, on the device: evaluate, calibrate, probe, convert and check."""

import json

import pytest
import torch
from helpers.device import DEVICE
from transformers import AutoModelForCausalLM, AutoTokenizer

from ee_scale.cli.main import main

pytestmark = pytest.mark.gpu

ON = f"device={DEVICE}"


@torch.no_grad()
def test_evaluate(exported, corpus, tmp_path, capsys):
    """Losses are those of transformers on a CPU."""
    words = ["seq_length=16", "max_tokens=320", f"cache_dir={tmp_path}", f"out={tmp_path / 'out'}", ON]
    assert main(["evaluate", f"model={exported}", f"data={corpus}", *words]) == 0
    found = {row["layer"]: row for row in json.loads((tmp_path / "out" / "evaluate.json").read_text())["exits"]}
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    ids = AutoTokenizer.from_pretrained(exported)(corpus.read_text()).input_ids
    windows = torch.tensor(ids[: 17 * 20]).view(20, 17)
    output = model(windows[:, :-1])
    for k, logits in {**output.exit_logits, 4: output.logits}.items():
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
        assert found[k]["loss"] == pytest.approx(float(loss), abs=1e-3)


def test_sweep_and_timing(exported, corpus, tmp_path, capsys):
    few = ["seq_length=16", "max_tokens=320", "prompts=8", "prompt_tokens=4", "new_tokens=2", "rounds=1"]
    out = tmp_path / "out"
    words = [f"data={corpus}", "sweep=true", f"cache_dir={tmp_path}", f"out={out}", ON, *few]
    assert main(["evaluate", f"model={exported}", *words]) == 0
    points = json.loads((out / "evaluate.json").read_text())["sweep"]
    assert len(points) > 20


def test_calibrate(tuned, corpus, tmp_path, capsys):
    folder = tmp_path / "model"
    assert main(["export", f"src={tuned}", f"out={folder}"]) == 0
    words = [f"data={corpus}", "agreement=0.5", "seq_length=16", f"cache_dir={tmp_path}", ON]
    assert main(["calibrate", f"model={folder}", *words]) == 0
    stored = json.loads((folder / "generation_config.json").read_text())
    assert "early_exit" in json.dumps(stored)
    answer = ["prompt=the layer", "policy=threshold", "max_new_tokens=4", ON]
    assert main(["generate", f"model={folder}", *answer]) == 0


def test_probe(exported, corpus, tmp_path, capsys):
    quick = ["context=16", "max_tokens=200", "prompts=3", "prompt_tokens=8", "new_tokens=12", "seconds=0.05"]
    words = [f"data={corpus}", f"cache_dir={tmp_path}", f"out={tmp_path / 'out'}", ON, *quick]
    assert main(["probe", f"model={exported}", *words]) == 0
    found = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert [row["layer"] for row in found["exits"]] == [1, 3]
    assert all(seconds > 0 for seconds in found["seconds"]["layer"].values())


def test_convert_and_verify(exported, tmp_path, capsys):
    """Readers and writers work in threads of their own, with fake tensors, where a build of torch for CUDA is."""
    out = tmp_path / "legacy"
    assert main(["convert", f"src={exported}", "to=megatron_legacy", f"out={out}", "verify=true", "trust=true"]) == 0
    assert "same top token 100.0%" in capsys.readouterr().out


def test_check(tune_arguments, capsys):
    assert main(["check", *tune_arguments, f"parallel.device={DEVICE}"]) == 0
    told = capsys.readouterr().out
    assert ("driver" in told) == ("NCCL" in told) == (DEVICE == "cuda")
