"""Conversations through the commands that read text: tuned on, measured on, refused in one line."""

import json
import math
import shutil
from pathlib import Path

import pyarrow
import pytest
import torch
from helpers.chats import CHATML, MARKED, conversations
from helpers.cli import run_cli
from pyarrow import parquet
from transformers import AutoModelForCausalLM, AutoTokenizer

from ee_scale.artifact.run_folder import CONFIG
from ee_scale.cli.main import main
from ee_scale.config.compose import stored_config
from ee_scale.config.groups import DataConfig
from ee_scale.config.schema import PaletteConfig
from ee_scale.config.supernet import SupernetConfig
from ee_scale.data.inputs import check_run_text
from ee_scale.palettes.cut_out import read_supernet
from ee_scale.palettes.make import held_out, stored_plan

HELD_OUT = conversations(30, seed=1)


@pytest.fixture(scope="module")
def model(model_dir, tmp_path_factory) -> Path:
    """The model with a chat template; its marks are plain text to the tokenizer."""
    folder = shutil.copytree(model_dir, tmp_path_factory.mktemp("chat") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder of two kinds of files, and beside it one to measure on."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "train").mkdir()
    rows = [{"messages": messages} for messages in conversations(60)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train" / "a.parquet")
    lines = "".join(json.dumps({"prompt": "say it", "completion": f"it is {i}"}) + "\n" for i in range(30))
    (folder / "train" / "b.jsonl.zst").write_bytes(pyarrow.compress(lines.encode(), codec="zstd", asbytes=True))
    (folder / "valid.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in HELD_OUT))
    return folder


@pytest.fixture(scope="module")
def run(tune_arguments, model, data, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run on two stages, and what the command said."""
    folder = tmp_path_factory.mktemp("run")
    arguments = [*tune_arguments, f"model={model}", f"data={data / 'train'}", "parallel.pp=2", "out=run"]
    finished = run_cli([*arguments, "train.steps=4"], folder, 2)
    assert finished.code == 0, finished.output
    return folder / "run", finished.output


def test_tune_says_what_is_learned(run):
    said = run[1]
    assert "read as parquet: a.parquet" in said
    assert "read as JSON lines: b.jsonl.zst" in said
    assert "of them learned: of conversations the assistant's alone" in said


def test_evaluate_counts_the_assistants_tokens_alone(run, data, tmp_path):
    """Against transformers' own mask and loss."""
    folder = tmp_path / "model"
    assert main(["export", f"src={run[0]}", f"out={folder}"]) == 0
    given = [f"data={data / 'valid.jsonl'}", "seq_length=31", "max_tokens=0", f"cache_dir={tmp_path}", "device=cpu"]
    assert main(["evaluate", f"model={folder}", *given, f"out={tmp_path / 'out'}"]) == 0
    report = json.loads((tmp_path / "out" / "evaluate.json").read_text())

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template, ids, learned = MARKED, [], []
    for messages in HELD_OUT:
        found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids += found["input_ids"]
        learned += found["assistant_masks"]
    total, count = 0.0, 0
    for start in range(0, len(ids) - 31, 32):
        window, mask = torch.tensor([ids[start : start + 32]]), torch.tensor([learned[start : start + 32]])
        labels = window.masked_fill(mask == 0, -100)
        if own := int((labels[:, 1:] != -100).sum()):
            with torch.no_grad():
                total += float(model(input_ids=window, labels=labels).loss) * own
            count += own
    assert report["tokens"] == count < len(ids)
    assert report["exits"][-1]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_calibrate_and_probe(run, data, tmp_path, capsys):
    folder = tmp_path / "model"
    assert main(["export", f"src={run[0]}", f"out={folder}"]) == 0
    given = [f"model={folder}", f"data={data / 'train'}", f"cache_dir={tmp_path}", "device=cpu"]
    assert main(["calibrate", *given, "agreement=0.05", "seq_length=31", "confidence=0.8", "max_tokens=0"]) == 0
    stored = json.loads((folder / "generation_config.json").read_text())["early_exit_calibration"]
    quick = ["context=16", "max_tokens=200", "prompts=3", "prompt_tokens=8", "new_tokens=12", "seconds=0.05"]
    assert main(["probe", *given, *quick, f"out={tmp_path / 'out'}"]) == 0
    report = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert stored["data"] == [str(data / "train")]
    assert 0 < report["exits"][0]["readings"]["text"]["tokens"] < 200


def test_a_supernet_and_its_palette(supernet_arguments, model, data, tmp_path):
    arguments = [*supernet_arguments, f"model={model}", f"data={data / 'train'}", f"data.valid={data / 'valid.jsonl'}"]
    finished = run_cli([*arguments, "stages=[{name: all, axes: [ffn], steps: 1}]", "out=run"], tmp_path)
    assert finished.code == 0, finished.output
    config = PaletteConfig(src=str(tmp_path / "run"), out="none", cache_dir=str(tmp_path), samples=0)
    supernet = read_supernet(tmp_path / "run", None)
    batches = held_out(config, stored_plan(tmp_path / "run", supernet, config))
    shares = [float(batch["loss_mask"].float().mean()) for batch in batches]
    assert all(0 < share < 1 for share in shares)
    stored = stored_config(SupernetConfig, tmp_path / "run" / CONFIG, "config")
    assert stored.data.errors == "strict"
    losses = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert math.isfinite(losses["loss"]["full"])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": "a"}]}',
            "line 1: a conversation, and the tokenizer of",
        ),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}', "line 2: no field 'text' (fields: body); set data.text_key"),
        (
            "a.txt",
            b"a\nb\xff",
            "line 2: not UTF-8 text (byte 0xff: invalid start byte), at byte 3; data.errors=replace",
        ),
    ],
)
def test_one_line_before_a_process_starts(tune_arguments, tmp_path, capsys, name, content, said):
    (tmp_path / name).write_bytes(content)
    assert main([*tune_arguments, f"data={tmp_path / name}", f"out={tmp_path / 'run'}"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"data.path='{tmp_path / name}' {said}" in line
    assert not (tmp_path / "run").exists()


def test_bytes_that_are_no_text_may_be_replaced(model_dir, corpus, tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"\xff\0" + corpus.read_bytes()[:4000])
    settings = DataConfig(str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "cache"), seq_length=32, errors="replace")
    assert check_run_text(settings, model_dir, 301, progress=False)["tokens"]
    given = [f"model={model_dir}", f"data={tmp_path / 'a.txt'}", f"cache_dir={tmp_path}", "seq_length=31", "device=cpu"]
    assert main(["evaluate", *given, "max_tokens=62", "errors=replace"]) == 0
    assert main(["evaluate", *given]) == 2
    assert "at byte 0; errors=replace reads U+FFFD there" in capsys.readouterr().err
    assert main(["evaluate", *given, "errors=ignore"]) == 2
    assert "errors=ignore: choose one of strict, replace" in capsys.readouterr().err
