"""An exit kind that the package does not have: one file, and every command knows it."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.cli import run_cli
from transformers import AutoModelForCausalLM

import ee_scale
from ee_scale.cli.main import main
from ee_scale.modeling import modeling_early_exit
from ee_scale.modeling.heads import ExitSpec
from ee_scale.modeling.kinds import KINDS, ExitKind, register

PREVIOUS = "helpers.previous_layer"
ALONE = """
import json, sys
sys.modules["ee_scale"] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM
folder, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
for copy in ("first", "second"):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    folder = folder + copy
    model.save_pretrained(folder)
torch.save(model(ids).exit_logits, sys.argv[3])
"""


def know_previous(rank: int) -> None:
    importlib.import_module(PREVIOUS)


@pytest.fixture(scope="module", autouse=True)
def known() -> Iterator[None]:
    register(importlib.import_module(PREVIOUS).Previous())
    yield
    del KINDS["previous"]


@pytest.fixture(scope="module")
def arguments(tune_arguments: list[str]) -> list[str]:
    return [*tune_arguments, "exits.kind=previous", "exits.layers=[2,3]"]


@pytest.fixture(scope="module")
def folder(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a grid, and its exports."""
    folder = tmp_path_factory.mktemp("previous")
    grid = ["out=run", "parallel.tp=2", "parallel.pp=2"]
    finished = run_cli([*arguments, *grid], folder, world_size=4, inject=know_previous)
    assert finished.code == 0, finished.output
    assert main(["export", f"src={folder / 'run'}", f"out={folder / 'model'}"]) == 0
    assert main(["export", f"src={folder / 'run'}", f"out={folder / 'stock'}", "kind=submodel", "exit=3"]) == 0
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> torch.nn.Module:
    return ee_scale.EarlyExitForCausalLM.from_pretrained(folder / "model")


IDS = torch.arange(1, 25).reshape(2, 12)


def test_no_kind_takes_anothers_name() -> None:
    class Mine(ExitKind):
        name = "norm"

    with pytest.raises(ValueError, match="an exit kind named 'norm' is there already"):
        register(Mine())


def test_it_reads_one_layer_earlier(model: torch.nn.Module) -> None:
    output = model(IDS, output_hidden_states=True)
    for k in (2, 3):
        head = model.exit_heads[str(k)]
        assert head.norm.weight.ne(model.model.norm.weight).any()  # it trained
        wanted = head.logits(head.norm(output.hidden_states[k - 1]), model.lm_head)
        assert torch.equal(output.exit_logits[k], wanted)


def test_a_stock_model_has_the_layers_it_reads(folder: Path, model: torch.nn.Module) -> None:
    stock = AutoModelForCausalLM.from_pretrained(folder / "stock")
    assert stock.config.num_hidden_layers == 2
    torch.testing.assert_close(stock(IDS).logits, model(IDS).exit_logits[3])


def test_its_folder_opens_without_the_package(folder: Path, model: torch.nn.Module, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ALONE, folder / "model", json.dumps(IDS.tolist()), tmp_path / "logits.pt"]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(tmp_path / "logits.pt")
    for k, logits in model(IDS).exit_logits.items():
        torch.testing.assert_close(found[k], logits)


def test_it_is_saved_again_into_its_folder(folder: Path, model: torch.nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / "previous_layer.py").write_text("an older one")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "previous_layer.py").read_bytes() == (folder / "model" / "previous_layer.py").read_bytes()


@pytest.mark.parametrize(
    ("name", "saved", "message"),
    [("decode.py", "out", "exported folders have a file of this name"), ("mine.py", ".", "would be written over")],
)
def test_its_file_cannot_be_mistaken(tmp_path: Path, monkeypatch, name: str, saved: str, message: str) -> None:
    home = tmp_path / name
    home.write_text("# mine")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(modeling_early_exit, "kind_file", lambda spec: home)
    with pytest.raises(ValueError, match=message):
        modeling_early_exit.copy_code(ExitSpec((2,), "previous"), tmp_path / saved)
    assert (home.read_text(), list((tmp_path / "out").iterdir())) == ("# mine", [])


def test_a_process_that_does_not_know_it_refuses_its_folder(folder: Path, tmp_path: Path) -> None:
    finished = run_cli(["generate", f"model={folder / 'model'}", "prompt=one"], tmp_path)
    assert finished.code != 0
    assert "early_exit: kind='previous' (of ('embedding', 'norm', 'mlp', 'layer'))" in finished.output.replace(
        "\n", " "
    )


def test_every_command_knows_it(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *arguments, "parallel.tp=2", "parallel.pp=2"]) == 0
    given = ["generate", f"model={folder / 'model'}", "prompt=one token", "max_new_tokens=8", "device=cpu"]
    texts = {}
    for policy in ("off", "lossless", "fixed"):
        capsys.readouterr()
        layer = ["layer=2"] if policy == "fixed" else []
        assert main([*given, f"policy={policy}", *layer]) == 0
        texts[policy] = capsys.readouterr().out
    assert texts["off"] == texts["lossless"]
    grid = ["policy=fixed", "layer=2", "parallel.pp=2", "parallel.tp=2"]
    finished = run_cli([*given, *grid], folder, world_size=4, inject=know_previous)
    assert finished.code == 0
    assert texts["fixed"].strip() in finished.output
