"""A GGUF file wherever a model folder works: tuned by two ranks, resumed, exported, decoded, converted."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from helpers.cli import run_cli
from helpers.gguf_files import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

import ee_scale
from ee_scale.backbone import model_path
from ee_scale.cli.main import main
from ee_scale.config.schema import GenerateConfig

PROMPT = "one token reads"


@pytest.fixture(scope="module")
def file(model_dir, tmp_path_factory) -> Path:
    """The suite's small model in blocks of 8 bits, its head dimension included; vocabulary of 301."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf", model_dir, Kind.Q8_0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache, monkeypatch) -> None:
    monkeypatch.setenv("EE_SCALE_CACHE", str(cache))


@pytest.fixture(scope="module")
def theirs(file) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def use_cache(folder: Path, rank: int) -> None:
    """In a rank of `run_cli`: its cache, and a line there for each conversion."""
    os.environ["EE_SCALE_CACHE"] = str(folder)
    write = model_path._write

    def counted(*args: object) -> None:
        with (folder / "conversions").open("a") as counts:
            counts.write(f"{rank}\n")
        write(*args)

    model_path._write = counted


@pytest.fixture(scope="module")
def run(file, cache, tune_arguments, tmp_path_factory) -> Path:
    """Two ranks that both find the cache empty; then one that goes on, and finds it empty again."""
    folder = tmp_path_factory.mktemp("run")
    words = [f"model={file}" if word.startswith("model=") else word for word in tune_arguments]
    words += ["train.save_every=1", "out=run"]
    inject = partial(use_cache, cache)
    finished = run_cli([*words, "parallel.pp=2", "train.steps=2"], folder, world_size=2, inject=inject)
    assert finished.code == 0, finished.output
    assert "M weights in Q8_0, F32, 8." in finished.output
    assert "bits per weight" in finished.output
    assert len((cache / "conversions").read_text().splitlines()) == 1
    shutil.rmtree(cache / "gguf")
    finished = run_cli([*words, "train.steps=3"], folder, inject=inject)
    assert finished.code == 0, finished.output
    assert "continuing from" in finished.output
    return folder / "run"


def test_a_run_names_the_file(run, file):
    identity = json.loads((run / "run.json").read_text())
    assert identity["base_model"] == str(file)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("kind", ["early_exit", "sidecar"])
def test_exports_are_of_the_file(kind, run, cache, theirs, tmp_path):
    shutil.rmtree(cache / "gguf", ignore_errors=True)
    assert main(["export", f"src={run}", f"kind={kind}", f"out={tmp_path / 'out'}"]) == 0
    ids = torch.randint(0, 301, (2, 16), generator=torch.Generator().manual_seed(0))
    model = ee_scale.EarlyExitForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, theirs(ids).logits)
        if kind == "early_exit":
            stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
            assert torch.equal(stock(ids).logits, theirs(ids).logits)


def test_a_file_that_is_gone(run, file, tmp_path, capsys):
    moved = file.rename(file.with_suffix(".away"))
    try:
        assert main(["export", f"src={run}", f"out={tmp_path / 'out'}"]) == 2
        line = f"error: src={run}: its base model {file} is not there any more"
        assert capsys.readouterr().err.splitlines()[-1] == line
    finally:
        moved.rename(file)


def test_generate_says_what_transformers_says(file, theirs, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    given = tokenizer(PROMPT, return_tensors="pt").input_ids
    new = theirs.generate(given, max_new_tokens=12, do_sample=False)[0, given.shape[1] :]
    expected = tokenizer.decode(new, skip_special_tokens=True)
    assert main(["generate", f"model={file}", "policy=off", f"prompt={PROMPT}", "max_new_tokens=12", "device=cpu"]) == 0
    assert expected in capsys.readouterr().out
    config = GenerateConfig(model=str(file.parent), policy="off", prompt=PROMPT, max_new_tokens=12, device="cpu")
    assert ee_scale.generate(config)[0].text == expected


def test_convert_writes_the_plain_folder(file, theirs, tmp_path, capsys):
    model_path._tell.cache_clear()
    assert main(["convert", f"src={file}", "to=hf", f"out={tmp_path / 'plain'}"]) == 0
    told = capsys.readouterr().err
    assert "bits per weight" in told
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert model.dtype == torch.float32
    wanted = theirs.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    tokenizers = [AutoTokenizer.from_pretrained(tmp_path / "plain")]
    tokenizers.append(AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name))
    assert tokenizers[0](PROMPT).input_ids == tokenizers[1](PROMPT).input_ids
    assert main(["convert", f"src={file}", "to=hf", "dtype=bf16", f"out={tmp_path / 'half'}"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_the_other_commands(file, corpus, tmp_path, capsys):
    data = [f"data={corpus}", f"cache_dir={tmp_path}"]
    assert main(["check", "tune", f"model={file}", f"data={corpus}", "data.seq_length=32", "parallel.device=cpu"]) == 0
    assert main(["evaluate", f"model={file}", *data, "exits=[2]", "seq_length=16", "max_tokens=160", "device=cpu"]) == 0
    capsys.readouterr()
    assert main(["calibrate", f"model={file}", *data, "device=cpu"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("it has no exits; tune some and export them first")
