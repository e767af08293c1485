"""Weights that are encoded, missing or misshapen: every command names them, with exit code 2, at once."""

from pathlib import Path

import pytest
from helpers.folders import HEAD, UP, Tensors, as_4bit, as_fp8, as_int8, rewritten, scaled, without

from ee_scale import EarlyExitForCausalLM
from ee_scale.cli.main import main
from ee_scale.errors import UserError
from ee_scale.inference.model import open_model

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
    for module, name in (("job", "run_ranks"), ("job", "join_grid"), ("trace", "run_ranks"), ("trace", "join_grid")):
        monkeypatch.setattr(f"ee_scale.cli.{module}.{name}", lambda *_: pytest.fail("a rank was started"))


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


def test_python_names_it_too(no_ranks, model_dir):
    for name, (change, config, words) in BROKEN.items():
        folder = rewritten(model_dir, Path(name.replace(" ", "_")), change, **config)
        with pytest.raises(UserError) as caught:
            open_model(folder)
        assert words in str(caught.value)
    assert EarlyExitForCausalLM
