"""Exits on the language model of a model that reads images: trained, exported in every kind, and decoded."""

from pathlib import Path

import pytest
import torch
from helpers.cli import run_cli
from helpers.wrapped import write_wrapped
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

import ee_scale
from ee_scale.cli.main import main

KINDS = ("early_exit", "sidecar", "submodel")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, tune_arguments: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("wrapped")
    write_wrapped(folder / "base", "gemma3", vocab_size=301)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder / "base")
    (folder / "base" / "preprocessor_config.json").write_text("{}")
    tune = [f"model={folder / 'base'}" if text.startswith("model=") else text for text in tune_arguments]
    own = ["data.own_text=0.25", "data.own_text_prompt=4", "data.own_text_tokens=60"]
    finished = run_cli([*tune, *own, "exits.head=full", "train.steps=2", "out=run"], folder)
    assert finished.code == 0, finished.output
    for kind in KINDS:
        more = ["exit=3"] if kind == "submodel" else []
        assert main(["export", f"src={folder / 'run'}", f"out={folder / kind}", f"kind={kind}", *more]) == 0
    return folder


def test_the_rest_travels_untouched(root: Path) -> None:
    base = load_file(root / "base" / "model.safetensors")
    stored = {}
    for path in (root / "early_exit").glob("*.safetensors"):
        stored |= load_file(path)
    assert all(torch.equal(stored[name], value) for name, value in base.items())
    assert {name for name in stored if name not in base} == {n for n in stored if n.startswith("exit_heads.")} != set()
    assert (root / "early_exit" / "preprocessor_config.json").read_text() == "{}"
    assert "stock = AutoModelForImageTextToText" in (root / "early_exit" / "README.md").read_text()


@torch.no_grad()
def test_every_kind_says_the_same(root: Path) -> None:
    ids = torch.arange(5, 35)[None]
    expected = AutoModelForImageTextToText.from_pretrained(root / "base").eval()(ids).logits
    stock = AutoModelForImageTextToText.from_pretrained(root / "early_exit").eval()
    assert torch.equal(stock(ids).logits, expected)
    models = [
        AutoModelForCausalLM.from_pretrained(root / "early_exit", trust_remote_code=True).eval(),
        ee_scale.EarlyExitForCausalLM.from_pretrained(root / "early_exit"),
        ee_scale.EarlyExitForCausalLM.from_pretrained(root / "sidecar"),
    ]
    outputs = [model(ids) for model in models]
    for output in outputs:
        torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(output.exit_logits[3], outputs[0].exit_logits[3])
    small = AutoModelForCausalLM.from_pretrained(root / "submodel").eval()
    assert (small.config.model_type, small.config.num_hidden_layers) == ("gemma3_text", 3)
    assert not hasattr(small.config, "language_model_of")
    torch.testing.assert_close(small(ids).logits, outputs[0].exit_logits[3], atol=1e-5, rtol=1e-5)
    settings = {"max_new_tokens": 8, "do_sample": False}
    plain = stock.generate(ids[:, :6], **settings)
    found = models[1].generate(ids[:, :6], **settings, exit_policy="lossless")
    assert torch.equal(found, plain)
