"""Every kind of bad input: one clear line that names field, value and numbers; exit code 2; before any rank starts."""

import json
import shutil
from pathlib import Path

import pytest

from ee_scale.cli.main import main

GIVEN = ["exits.layers=[1,3]", "data.seq_length=32", "train.micro_batch_size=2", "train.global_batch_size=8"]


@pytest.fixture
def given(model_dir, corpus, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ee_scale.launching.job.run_ranks", lambda *_: pytest.fail("ranks were started"))
    monkeypatch.setattr("ee_scale.launching.job.join_grid", lambda *_: pytest.fail("a rank was started"))
    return ["tune", f"model={model_dir}", f"data={corpus}", f"data.cache_dir={tmp_path}", *GIVEN, "out=run"]


def refused(arguments: list[str], capsys) -> str:
    """The one line that the command leaves."""
    assert main(arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=nowhere", "model.path=nowhere: no such folder"),
        ("model=some/where", "model.path=some/where: no such folder, and not to be had from the hub"),
        ("parallel.tp=3", "parallel.tp=3 does not divide num_attention_heads=4 of the model"),
        ("parallel.tp=4", "parallel.tp=4 does not divide num_key_value_heads=2 of the model"),
        ("parallel.pp=5", "parallel.pp=5: more stages than the model's 4 layers"),
        ("parallel.stages=[2,2]", "parallel.stages=[2, 2]: 2 stages, but parallel.pp=1"),
        ("exits.layers=[5]", "exits.layers: 5 is not in 1..4 (the model's layers)"),
        ("exits.layers=[0]", "exits.layers: 0 is not in 1..4 (the model's layers)"),
        ("exits.layers=[2,2]", "exits.layers=[2, 2]: layer 2 is named twice (of 4 layers)"),
        ("exits.layers=[3,1]", "exits.layers=[3, 1]: name the exits in order of depth"),
        ("exits.layers=stages", "exits.layers=stages: parallel.pp=1 has no stage boundary"),
        ("exits.layers=deep", "exits.layers=deep: give layer numbers"),
        ("exits.loss_weights=[1]", "exits.loss_weights=[1.0]: 1 weights for 2 exits"),
        ("data.seq_length=65", "data.seq_length=65 is above the model's max_position_embeddings=64"),
        ("data=nothing.txt", "data.path='nothing.txt': no such file or folder"),
        ("data=empty.txt", "data.path='empty.txt': no text in it"),
        ("data=short.txt", "data.path='short.txt': 4 tokens, one sequence needs data.seq_length + 1 = 33"),
        ("train.global_batch_size=7", "train.global_batch_size=7 is not a multiple of"),
        ("out=file/run", "out=file/run: cannot write there (Not a directory)"),
        ("data.cache_dir=file/cache", "data.cache_dir='file/cache': cannot write (Not a directory)"),
        ("exits.head=tied exits.kind=embedding", "exits.kind=embedding with exits.head=tied has nothing to train"),
    ],
)
def test_tune_refuses(given, tmp_path, capsys, override, message):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("a b")
    (tmp_path / "file").write_text("")
    assert refused([*given, *override.split(" ")], capsys).startswith(message)


def test_unsupported_architecture(given, model_dir, tmp_path, capsys):
    shutil.copytree(model_dir, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text()) | {"model_type": "gpt2"}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    message = refused([*given, "model=other"], capsys)
    assert message.startswith("model.path: architecture 'gpt2' is not supported: transformers has no plan")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_incomplete_model_folder(given, model_dir, tmp_path, capsys, missing):
    shutil.copytree(model_dir, tmp_path / "part")
    (tmp_path / "part" / missing).unlink()
    if missing == "tokenizer.json":
        (tmp_path / "part" / "tokenizer_config.json").unlink()
        missing = "tokenizer"
    message = refused([*given, "model=part"], capsys)
    assert message.startswith("model.path=part: ")
    assert missing in message


def test_truncated_weights_are_named(given, model_dir, tmp_path, capsys):
    shutil.copytree(model_dir, tmp_path / "torn")
    path = tmp_path / "torn" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert refused([*given, "model=torn"], capsys).startswith("torn/model.safetensors: not a whole safetensors file")


def test_vocabulary_mismatch(given, model_dir, tmp_path, capsys):
    shutil.copytree(model_dir, tmp_path / "narrow")
    config = json.loads((tmp_path / "narrow" / "config.json").read_text()) | {"vocab_size": 280}
    (tmp_path / "narrow" / "config.json").write_text(json.dumps(config))
    message = refused([*given, "model=narrow"], capsys)
    assert message.endswith("'model.embed_tokens.weight' has shape [301, 128], but the config asks for [280, 128]")


def test_world_size(given, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = refused([*given, "parallel.pp=2", "parallel.dp=2"], capsys)
    assert message == "3 processes, but tp=1 x pp=2 (stages launched) x dp=2 needs 4"


def test_a_folder_that_holds_another_run(given, tune_arguments, finished_run, capsys):
    out = f"out={finished_run}"
    assert "(exits.kind=mlp there, norm here)" in refused([*tune_arguments, out, "exits.kind=norm"], capsys)
    assert "(exits.layers=[1, 3] there, [2] here)" in refused([*tune_arguments, out, "exits.layers=[2]"], capsys)
    assert "train.resume=never" in refused([*tune_arguments, out, "train.resume=never"], capsys)


def test_export_and_evaluate_refuse(given, model_dir, finished_run, tmp_path, capsys):
    out = Path("exists")
    out.mkdir()
    for arguments, message in (
        (["export", "src=nowhere", "out=x"], "src=nowhere: no run.json in it"),
        (["export", f"src={finished_run}", "out=exists"], "out=exists: exists already"),
        (["export", f"src={finished_run}", "out=x", "step=7"], "step=7: "),
        (["evaluate", "model=nowhere", "data=a.txt"], "model=nowhere: no such folder"),
        (["evaluate", f"model={model_dir}", "data=a.txt", "seq_length=8"], "data='a.txt': no such file or folder"),
        (["evaluate", f"model={model_dir}", "data=a.txt", "seq_length=65"], "seq_length=65 is above"),
        (["evaluate", f"model={model_dir}", "data=a.txt", "exits=[9]"], "exits.layers: 9 is not in 1..4"),
    ):
        assert refused(arguments, capsys).startswith(message)
    assert not (tmp_path / "x").exists()
