"""What a model's generation_config.json says is kept by `generate`, on one device and on a grid, or refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import run_cli
from transformers import AutoModelForCausalLM, AutoTokenizer

from ee_scale.cli.main import main
from ee_scale.evaluation.probe import own_text
from ee_scale.inference.model import open_model

PROMPTS = ["one token reads", "an"]
NEW = 12
POLICIES = [["policy=off"], ["policy=lossless"], ["policy=threshold", "threshold=1.1"]]


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("settings") / "model"
    assert main(["export", f"src={finished_run}", f"out={folder}"]) == 0
    return folder


def _says(exported: Path, folder: Path, **settings: Any) -> Path:
    """A copy of the model with these lines in its generation config."""
    shutil.copytree(exported, folder)
    file = folder / "generation_config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(config | settings))
    return folder


def _texts(folder: Path) -> dict[str, tuple[str, int]]:
    """Text and number of new tokens that transformers makes of each prompt alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    texts = {}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        new = model.generate(ids, max_new_tokens=NEW, do_sample=False, tokenizer=tokenizer)[0, ids.shape[1] :]
        texts[prompt] = (tokenizer.decode(new, skip_special_tokens=True), len(new))
    return texts


def _settings(exported: Path, name: str) -> dict[str, Any]:
    """Settings that change the text, found from the text itself."""
    tokenizer, model = AutoTokenizer.from_pretrained(exported), AutoModelForCausalLM.from_pretrained(exported)
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    new = model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :].tolist()
    pieces = [tokenizer.decode(token) for token in new]
    return {
        "stop_strings": {"stop_strings": [pieces[3].strip() or pieces[3]]},
        "eos": {"eos_token_id": [new[5], new[2]]},
        "min": {"eos_token_id": new[2], "min_new_tokens": 7},
        "min_length": {"eos_token_id": new[2], "min_length": 9},
        "bad words": {"bad_words_ids": [[new[1]], new[3:5]]},
        "suppress": {"suppress_tokens": [new[0]], "begin_suppress_tokens": [new[1]], "renormalize_logits": True},
        "penalty": {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2},
        "forced": {"forced_bos_token_id": None, "forced_eos_token_id": new[1]},
        "bias": {"sequence_bias": [[[new[0]], -9.0]]},
        "max_length": {"max_length": 5},
        "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 5},
    }[name]


NAMES = ["stop_strings", "eos", "min", "min_length", "bad words", "suppress", "penalty", "forced", "bias"]


def _rows(out: Path) -> dict[str, tuple[str, int]]:
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return {row["prompt"]: (row["text"], row["tokens"]) for row in rows}


@pytest.mark.parametrize("name", [*NAMES, "max_length", "sampling"])
def test_kept_on_one_device(exported, tmp_path, name):
    folder = _says(exported, tmp_path / "model", **_settings(exported, name))
    want = _texts(folder)
    assert name in ("max_length", "sampling") or want != _texts(exported)
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    for number, policy in enumerate(POLICIES):
        for size in (1, 2):
            out = tmp_path / f"{number}{size}.jsonl"
            given = [f"model={folder}", "device=cpu", f"max_new_tokens={NEW}", f"prompts={tmp_path / 'p.txt'}"]
            assert main(["generate", *given, f"out={out}", f"batch_size={size}", *policy]) == 0
            assert _rows(out) == want, (policy, size)


def test_stop_strings_of_a_streamed_answer(exported, tmp_path, capsys):
    folder = _says(exported, tmp_path / "model", **_settings(exported, "stop_strings"))
    want = _texts(folder)[PROMPTS[0]]
    for policy in POLICIES:
        capsys.readouterr()
        given = [f"model={folder}", "device=cpu", f"max_new_tokens={NEW}", f"prompt={PROMPTS[0]}"]
        assert main(["generate", *given, *policy]) == 0
        said = capsys.readouterr()
        assert said.out == want[0] + "\n"
        assert f"\n{want[1]} tokens in" in f"\n{said.err}"


@pytest.mark.parametrize(
    ("names", "grid"), [(["stop_strings"], "parallel.tp=2"), (["min", "bad words"], "parallel.pp=2")]
)
def test_kept_on_a_grid(exported, tmp_path, names, grid):
    settings = {key: value for name in names for key, value in _settings(exported, name).items()}
    folder = _says(exported, tmp_path / "model", **settings)
    want = _texts(folder)
    assert want != _texts(exported)
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    given = [f"model={folder}", "device=cpu", f"max_new_tokens={NEW}", f"prompts={tmp_path / 'p.txt'}"]
    finished = run_cli(["generate", *given, f"out={tmp_path / 'out.jsonl'}", "policy=off", grid], tmp_path, 2)
    assert finished.codes == [0, 0], finished.output
    assert _rows(tmp_path / "out.jsonl") == want


@pytest.mark.parametrize(
    ("settings", "given", "says"),
    [
        ({"num_return_sequences": 3, "do_sample": True}, ["policy=off"], "num_return_sequences=3 "),
        ({"num_return_sequences": 3, "do_sample": True}, ["policy=lossless"], "num_return_sequences=3 "),
        ({"token_healing": True}, ["policy=off"], "token_healing=True "),
        ({"num_return_sequences": 3}, ["policy=off"], "generation_config.json: Greedy methods"),
        ({"num_beams": 2}, ["policy=lossless"], "num_beams=2 "),
        ({"num_beams": 2}, ["policy=off", "parallel.pp=2"], "num_beams=2 "),
        ({"prompt_lookup_num_tokens": 1}, ["policy=off", "parallel.tp=2"], "prompt_lookup_num_tokens=1 "),
        ({"guidance_scale": 1.5}, ["policy=off", "parallel.tp=2"], "guidance_scale=1.5 "),
        ({"guidance_scale": 1.5}, ["policy=lossless"], "guidance_scale=1.5 "),
        ({"max_time": 1.0}, ["policy=off", "parallel.tp=2"], "max_time=1.0 "),
    ],
)
def test_refused_before_anything_runs(exported, tmp_path, capsys, settings, given, says):
    folder = _says(exported, tmp_path / "model", **settings)
    capsys.readouterr()
    command = ["generate", f"model={folder}", "device=cpu", f"prompt={PROMPTS[0]}", f"out={tmp_path / 'x'}", *given]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert not (tmp_path / "x").exists()


def test_beams_and_time_of_one_device(exported, tmp_path, capsys):
    for number, settings in enumerate(({"num_beams": 3}, {"max_time": 1e-6})):
        folder = _says(exported, tmp_path / str(number), **settings)
        want = _texts(folder)[PROMPTS[0]]
        capsys.readouterr()
        given = [f"model={folder}", "device=cpu", f"max_new_tokens={NEW}", f"prompt={PROMPTS[0]}"]
        assert main(["generate", *given, "policy=off"]) == 0
        row = capsys.readouterr()
        text = json.loads(row.out)["text"] if "num_beams" in settings else row.out[:-1]
        assert text == want[0]


def test_probed_text_ends_where_answers_end(exported, tmp_path):
    folder = _says(exported, tmp_path / "model", **_settings(exported, "stop_strings"))
    model, tokenizer = open_model(folder).eval(), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    passage = own_text(model, prompt, NEW, None, 0, tokenizer)
    assert int(passage.kept.sum()) == _texts(folder)[PROMPTS[0]][1]
    assert not bool(passage.kept[0, : prompt.shape[1] - 1].any())
    assert torch.equal(passage.ids[:, : prompt.shape[1]], prompt)
