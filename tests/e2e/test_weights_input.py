"""Weights that are encoded, missing or misshapen: every command names them, with exit code 2, at once."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.folders import HEAD, UP, Tensors, as_4bit, as_fp8, as_int8, rewritten, scaled, without
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ee_scale import EarlyExitForCausalLM
from ee_scale.cli.main import main
from ee_scale.errors import UserError
from ee_scale.inference.model import open_model, untrained_exits
from ee_scale.log import log
from ee_scale.modeling.heads import ExitSpec

TUNE = ["exits.layers=[1,3]", "data.seq_length=32", "train.micro_batch_size=2", "train.global_batch_size=8", "out=run"]
SUPERNET = ["data.seq_length=32", "train.micro_batch_size=2", "train.global_batch_size=8", "out=run"]
COMMANDS = {
    "tune": ["tune", *TUNE],
    "tune on a grid": ["tune", *TUNE, "parallel.pp=2"],
    "check tune": ["check", "tune", *TUNE],
    "trace tune": ["trace", "tune", *TUNE],
    "launch tune": ["launch", "tune", *TUNE, "--dry-run"],
    "joint": ["tune", *TUNE, "backbone=full"],
    "supernet": ["supernet", *SUPERNET],
    "check supernet": ["check", "supernet", *SUPERNET],
    "generate": ["generate", "policy=off", "prompt=a layer"],
    "generate on a grid": ["generate", "policy=off", "prompt=a layer", "parallel.tp=2"],
    "evaluate": ["evaluate", "seq_length=32"],
    "evaluate untrained": ["evaluate", "seq_length=32", "exits=[2]"],
    "probe": ["probe", "context=8", "prompt_tokens=8", "new_tokens=8"],
    "calibrate": ["calibrate"],
    "convert": ["convert", "to=megatron_core", "out=run"],
    "export": ["export", "format=onnx", "out=run"],
}


@pytest.fixture
def no_ranks(tmp_path, monkeypatch):
    """An empty working directory, where nothing may start."""
    monkeypatch.chdir(tmp_path)
    for module in ("launching.job", "cli.trace"):
        for name in ("run_ranks", "join_grid"):
            monkeypatch.setattr(f"ee_scale.{module}.{name}", lambda *_: pytest.fail("a rank was started"))


def refused(arguments: list[str], capsys) -> str:
    """The one line that the command leaves, which makes no folder."""
    before = sorted(Path().iterdir())
    assert main(arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert sorted(Path().iterdir()) == before
    return errors[0].removeprefix("error: ")


def given(command: str, folder: str, corpus: Path) -> list[str]:
    """A command on a folder."""
    words = COMMANDS[command]
    model = {"convert": "src", "export": "src"}.get(words[0], "model")
    data = [] if words[0] in ("generate", "convert", "export") else [f"data={corpus}"]
    return [*words, f"{model}={folder}", *data]


def narrow(tensors: Tensors) -> Tensors:
    return tensors | {UP: tensors[UP][:-2]}


BROKEN = {
    "int8": (as_int8, {}, UP),
    "fp8": (as_fp8, {}, UP),
    "4 bits": (as_4bit, {}, "mlp.up_proj.qweight"),
    "a scale": (scaled, {}, f"{UP}_scale_inv"),
    "declared": (
        lambda tensors: tensors,
        {"quantization_config": {"quant_method": "fp8"}},
        "quantization_config (fp8)",
    ),
    "missing": (without(UP), {}, UP),
    "narrow": (narrow, {}, UP),
    "no head": (without(HEAD), {"tie_word_embeddings": False}, HEAD),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_what_is_wrong(no_ranks, model_dir, corpus, capsys, command):
    for name, (change, config, words) in BROKEN.items():
        folder = rewritten(model_dir, Path(name.replace(" ", "_")), change, **config)
        line = refused(given(command, str(folder), corpus), capsys)
        assert words in line, (name, line)
        assert str(folder) in line


def in_shards(model_dir: Path, folder: Path) -> Path:
    """The same model in several files."""
    shutil.copytree(model_dir, folder)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(model_dir).save_pretrained(folder, max_shard_size="400KB")
    return folder


@pytest.mark.parametrize("command", ["check tune", "tune", "supernet", "generate on a grid", "evaluate", "convert"])
def test_shards_and_their_index(no_ranks, model_dir, corpus, capsys, command):
    torn = in_shards(model_dir, Path("torn"))
    index = torn / "model.safetensors.index.json"
    index.write_text(index.read_text()[:-40])
    assert refused(given(command, "torn", corpus), capsys).startswith(f"{index}: not valid JSON (")
    cut = sorted(in_shards(model_dir, Path("cut")).glob("model-*.safetensors"))[1]
    cut.write_bytes(cut.read_bytes()[:-100])
    assert refused(given(command, "cut", corpus), capsys).startswith(f"{cut}: not a whole safetensors file")
    gone = sorted(in_shards(model_dir, Path("gone")).glob("model-*.safetensors"))[1]
    gone.unlink()
    assert f"names {gone.name}, which is not there" in refused(given(command, "gone", corpus), capsys)


@pytest.mark.parametrize("verb", [["supernet"], ["check", "supernet"]], ids=["supernet", "check"])
def test_encoders_too(no_ranks, bert_dir, labelled, capsys, verb):
    weight = "encoder.layer.0.intermediate.dense.weight"
    changes = {
        "int8": lambda tensors: tensors | {weight: tensors[weight].to(torch.int8)},
        "scaled": lambda tensors: tensors | {f"{weight}_scale": torch.ones(1)},
        "missing": without(weight),
        "narrow": lambda tensors: tensors | {weight: tensors[weight][:-1]},
    }
    for name, change in changes.items():
        folder = rewritten(bert_dir, Path(name), change)
        line = refused([*verb, *SUPERNET, f"model={folder}", f"data={labelled['train']}", "data.seq_length=24"], capsys)
        assert weight in line, (name, line)


def test_the_base_of_a_sidecar_and_of_a_run(no_ranks, model_dir, finished_run, capsys):
    """Its fingerprint sees config.json too: an encoded base is another one, or is named."""
    assert main(["export", f"src={finished_run}", "kind=sidecar", "out=sidecar"]) == 0
    path = model_dir / "config.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(before) | {"quantization_config": {"load_in_4bit": True}}))
        for kind in (["early_exit"], ["submodel", "exit=3"]):
            words = ["export", f"src={finished_run}", f"kind={kind[0]}", *kind[1:], "out=new"]
            assert "changed since the exits were trained" in refused(words, capsys)
        for words in (["generate", "prompt=a"], ["generate", "prompt=a", "parallel.pp=2"]):
            told = refused([*words, "policy=off", "model=sidecar"], capsys)
            assert "not the base model that these exits were trained on" in told
        with pytest.raises(UserError, match="not the base model that these exits were trained on"):
            EarlyExitForCausalLM.from_pretrained("sidecar")
    finally:
        path.write_text(before)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_adapter_beside_the_weights(no_ranks, model_dir, corpus, capsys, command):
    """transformers adds it to them where peft is installed."""
    folder = Path(shutil.copytree(model_dir, "adapted"))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    line = refused(given(command, str(folder), corpus), capsys)
    assert f"{folder}: adapter_config.json: an adapter of peft lies beside the weights" in line


def test_an_export_that_was_encoded_later(no_ranks, finished_run, capsys):
    assert main(["export", f"src={finished_run}", "out=model"]) == 0
    for weights in Path("model").glob("model-0*.safetensors"):
        save_file(scaled(load_file(weights)), weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{UP}_scale_inv"):
        EarlyExitForCausalLM.from_pretrained("model")
    for words in (["generate", "prompt=a"], ["generate", "prompt=a", "parallel.pp=2"]):
        assert f"{UP}_scale_inv" in refused([*words, "policy=off", "model=model"], capsys)


def test_what_transformers_leaves_out_is_left_out_with_a_word(no_ranks, model_dir, corpus, monkeypatch):
    said = []
    monkeypatch.setattr(log, "warning", lambda text, *values: said.append(text % values))
    others = {"score.weight": torch.ones(2, 128), UP.replace(".0.", ".9."): torch.ones(1)}
    folder = rewritten(model_dir, Path("folder"), lambda tensors: tensors | others)
    assert main(given("check tune", str(folder), corpus)) == 0
    assert "does not have these tensors, which are left out: model.layers.9." in said[0]


def test_python_names_it_too(no_ranks, model_dir):
    for name, (change, config, words) in BROKEN.items():
        folder = rewritten(model_dir, Path(name.replace(" ", "_")), change, **config)
        with pytest.raises(UserError) as caught:
            open_model(folder)
        assert words in str(caught.value)
        with pytest.raises(UserError):
            untrained_exits(folder, ExitSpec((2,), "norm", "tied"))
