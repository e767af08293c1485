"""Backbone and exits trained together, through the command line: another grid, exports, refusals."""

import json
from pathlib import Path

import pytest
import torch
from helpers.cli import run_cli
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import ee_scale
from ee_scale.cli.main import main


def losses(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def tied_model(model_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    model = AutoModelForCausalLM.from_pretrained(model_dir, tie_word_embeddings=True)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tune_arguments, tied_model, tmp_path_factory) -> Path:
    """full: on one rank; halves: stopped by a kill at pp=2, continued at tp=2; low_rank: on one rank."""
    folder = tmp_path_factory.mktemp("joint_runs")
    common = [*tune_arguments, f"model={tied_model}", "optim.lr=1e-3", "exits.head=tied"]
    full = [*common, "backbone=full", "backbone.activation_checkpointing=true"]
    assert run_cli([*full, "out=full"], folder).code == 0
    killed = run_cli([*full, "out=halves", "parallel.pp=2", "logging.every=1"], folder, 2, die_at_step=5)
    assert killed.codes[0] == -9
    resumed = run_cli([*full, "out=halves", "parallel.tp=2"], folder, 2)
    assert resumed.codes == [0, 0], resumed.output
    assert "continuing from" in resumed.output
    assert run_cli([*common, "backbone=low_rank", "backbone.rank=2", "out=low_rank"], folder).code == 0
    return folder


def test_a_run_that_changed_its_grid_has_the_curve_of_one_process(runs):
    whole, halves = losses(runs / "full"), losses(runs / "halves")
    assert set(whole[0]) == {"1", "3", "final"}
    for mine, theirs in zip(halves, whole, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-5)
    assert whole[-1]["final"] < whole[0]["final"] - 0.05


def test_stock_transformers_opens_the_trained_model(runs, tied_model, tmp_path):
    assert main(["export", f"src={runs / 'halves'}", f"out={tmp_path / 'model'}"]) == 0
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(tied_model)
    checkpoint = runs / "halves" / "checkpoints" / "step_00000008"
    trained = load_file(checkpoint / "backbone_000.safetensors")
    state = stock.state_dict()
    assert set(state) - {"lm_head.weight"} == set(trained)
    for name, tensor in trained.items():
        assert torch.equal(state[name], tensor)
        assert not torch.equal(tensor, base.state_dict()[name]), f"{name} did not train"
    assert stock.lm_head.weight is stock.model.embed_tokens.weight


def test_exits_of_the_exported_model_read_the_trained_backbone(runs, tied_model, tmp_path):
    assert main(["export", f"src={runs / 'full'}", f"out={tmp_path / 'model'}"]) == 0
    assert main(["export", f"src={runs / 'full'}", "kind=submodel", "exit=3", f"out={tmp_path / 'sub'}"]) == 0
    ids = AutoTokenizer.from_pretrained(tied_model)("one token reads what comes next", return_tensors="pt").input_ids
    model = ee_scale.EarlyExitForCausalLM.from_pretrained(tmp_path / "model")
    sub = AutoModelForCausalLM.from_pretrained(tmp_path / "sub")
    torch.testing.assert_close(sub(ids).logits, model(ids).exit_logits[3], rtol=1e-5, atol=1e-5)


def test_adapters_are_merged(runs, tied_model, tmp_path):
    assert main(["export", f"src={runs / 'low_rank'}", f"out={tmp_path / 'model'}"]) == 0
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    base = AutoModelForCausalLM.from_pretrained(tied_model).state_dict()
    pairs = load_file(runs / "low_rank" / "checkpoints" / "step_00000008" / "backbone_000.safetensors")
    adapted = {name.replace(".lora_A", "") for name in pairs if ".lora_A" in name}
    assert len(adapted) == 4 * 7  # layers x projections
    for name, tensor in state.items():
        expected = base[name]
        if name in adapted:
            up, down = (pairs[name.replace(".weight", f".lora_{part}.weight")] for part in "BA")
            assert up.norm() > 0
            expected = expected + up @ down
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)


def test_what_a_joint_run_refuses(runs, tune_arguments, tied_model, capsys):
    assert main(["export", f"src={runs / 'full'}", "kind=sidecar", "out=x"]) == 2
    assert "trained its backbone too" in capsys.readouterr().err
    again = [*tune_arguments, f"model={tied_model}", "exits.head=tied", "optim.lr=1e-3", f"out={runs / 'full'}"]
    assert main(again) == 2
    assert "backbone.mode=full there, frozen here" in capsys.readouterr().err
    assert main([*again, "backbone=full", "exits.kl_weight=0.5"]) == 2
    assert "exits.kl_weight=0.5" in capsys.readouterr().err
    assert main([*again, "backbone=low_rank", "backbone.targets=[mlps]"]) == 2
    assert "backbone.targets=['mlps']" in capsys.readouterr().err
