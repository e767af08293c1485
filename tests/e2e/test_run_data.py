"""A run and its data: other text under the same path is refused, and so is text with a token that has no row."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers.cli import run_cli
from transformers import AutoModelForCausalLM, AutoTokenizer

from ee_scale.cli.main import main


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def replace(path: Path, old: str, new: str) -> None:
    """Another text of the same size, with the old time of writing."""
    stat, text = path.stat(), path.read_text()
    assert old in text
    assert len(old) == len(new)
    path.write_text(text.replace(old, new))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_run_does_not_go_on_with_other_text(tune_arguments, corpus, folder):
    shutil.copy(corpus, folder / "mine.txt")
    arguments = [*tune_arguments, "data=mine.txt", "out=run"]
    assert run_cli([*arguments, "train.steps=3"], folder).code == 0
    replace(folder / "mine.txt", "hidden", "HIDDEN")
    finished = run_cli([*arguments, "train.steps=6"], folder)
    assert finished.code == 2
    assert "error: out=run: its run was trained on other data: the tokens of data.path='mine.txt'" in finished.output
    replace(folder / "mine.txt", "HIDDEN", "hidden")
    finished = run_cli([*arguments, "train.steps=6"], folder)
    assert finished.code == 0
    assert "continuing from" in finished.output


def test_a_classifier_does_not_go_on_with_other_text(classify_arguments, labelled, folder):
    shutil.copy(labelled["train"], folder / "mine.jsonl")
    arguments = [*classify_arguments, "data=mine.jsonl", "out=run"]
    finished = run_cli([*arguments, "train.max_skipped=1"], folder, inject=_stop_soon)
    assert finished.code != 2, finished.output
    replace(folder / "mine.jsonl", "wave", "gull")
    finished = run_cli(arguments, folder)
    assert finished.code == 2
    assert "the tokens of data.path='mine.jsonl' are not those of then" in finished.output


def _stop_soon(rank: int) -> None:
    from ee_scale.launching import job

    job.train_rank = lambda *_: None


@pytest.fixture
def wide_model(model_dir, folder) -> Path:
    """The model with a tokenizer of three more tokens than rows, one of which pads."""
    shutil.copytree(model_dir, folder / "wide")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "pad_token": "<|pad|>"})
    tokenizer.save_pretrained("wide")
    rows = AutoModelForCausalLM.from_pretrained("wide").config.vocab_size
    assert tokenizer.pad_token_id >= rows
    assert len(tokenizer) == rows + 3
    return folder / "wide"


def test_two_prompts_are_padded_with_a_token_that_has_a_row(wide_model, capsys):
    prompts = ["the hidden state", "a"]
    given = json.dumps(prompts)
    assert main(["generate", f"model={wide_model}", f"prompt={given}", "policy=off", "max_new_tokens=5"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(wide_model).eval(),
        AutoTokenizer.from_pretrained(wide_model),
    )
    for row, prompt in zip(rows, prompts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            answer = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert row["text"] == tokenizer.decode(answer, skip_special_tokens=True)


def test_only_text_with_a_token_without_a_row_is_refused(wide_model, tune_arguments, corpus, folder, capsys):
    arguments = [*tune_arguments, f"model={wide_model}", "train.steps=2", "out=run"]
    assert run_cli(arguments, folder).code == 0
    (folder / "chat.txt").write_text(corpus.read_text() + "<|im_end|>")
    number = AutoTokenizer.from_pretrained(wide_model).convert_tokens_to_ids("<|im_end|>")
    said = f"the text holds the token '<|im_end|>' (id {number}), which has no row: its tokenizer has 304 tokens"
    finished = run_cli([*arguments, "data=chat.txt", "out=other"], folder)
    assert finished.code == 2
    assert f"error: data.path='chat.txt': {said}" in finished.output
    assert not (folder / "other").exists()
    cases = [
        ["evaluate", "data=chat.txt", "exits=[2]", "seq_length=32", "cache_dir=cache"],
        ["generate", "prompt=a<|im_end|>", "policy=off", "max_new_tokens=2"],
    ]
    for case in cases:
        capsys.readouterr()
        assert main([*case, f"model={wide_model}"]) == 2
        assert said in capsys.readouterr().err
