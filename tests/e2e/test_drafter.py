"""`exits=drafter`: the measured recipe on another model than it was measured on."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.cli import run_cli
from helpers.gguf_files import chat_model
from helpers.llama_cpp import LlamaCpp, needs_llama_cpp
from transformers import AutoModelForCausalLM, AutoTokenizer

from ee_scale.artifact.run_folder import read_run
from ee_scale.cli.main import main
from ee_scale.config.compose import compose_config
from ee_scale.errors import UserError
from ee_scale.inference.model import open_model

GIVEN = ["model=m", "data=d"]


def test_it_sets_the_optimizer_too_and_words_of_the_command_line_win():
    plain, recipe = compose_config("tune", GIVEN), compose_config("tune", [*GIVEN, "exits=drafter"])
    assert (recipe.exits.kind, recipe.exits.head) == ("layer", "shortlist")
    assert recipe.exits.kl_weight > 0
    assert recipe.optim.lr > plain.optim.lr
    assert recipe.train.global_batch_size < plain.train.global_batch_size
    words = ["optim.lr=0.5", "train.global_batch_size=8", "exits.kl_weight=0", "exits.layers=[2]"]
    mine = compose_config("tune", [*GIVEN, *words, "exits=drafter"])
    assert (mine.optim.lr, mine.train.global_batch_size) == (0.5, 8)
    assert (mine.exits.kl_weight, mine.exits.layers) == (0, [2])


@pytest.mark.parametrize("value", ["0", "1", "1.5", "-3", "many", "true"])
def test_what_no_shortlist_is_is_refused(value):
    with pytest.raises(UserError, match=r"^exits\.shortlist=\S+: give a number of tokens"):
        compose_config("tune", [*GIVEN, f"exits.shortlist={value}"])


def test_it_runs_on_a_small_model_and_drafts_losslessly(model_dir, corpus, tmp_path: Path):
    words = [
        "exits=drafter",
        f"model={model_dir}",
        f"data={corpus}",
        f"data.cache_dir={tmp_path}",
        "data.seq_length=32",
    ]
    finished = run_cli(["tune", *words, "train.steps=40", "parallel.device=cpu", "out=run"], tmp_path)
    assert finished.code == 0, finished.output
    spec = read_run(tmp_path / "run")["early_exit"]
    assert spec["layers"] == [1]  # a thirtieth of 4 layers is at least the first
    assert spec["shortlist"] == round(0.0833 * 301)
    assert main(["export", f"src={tmp_path / 'run'}", f"out={tmp_path / 'model'}"]) == 0
    model = open_model(tmp_path / "model").eval()
    ids = torch.arange(3, 11)[None]
    plain = model.generate(ids, max_new_tokens=20, do_sample=False, exit_policy="off")
    drafted = model.generate(
        ids,
        max_new_tokens=20,
        do_sample=False,
        exit_policy="lossless",
        exit_draft_length=2,
        return_dict_in_generate=True,
    )
    assert torch.equal(drafted.sequences, plain)
    assert drafted.exit_stats["drafted"] > 0


@pytest.fixture(scope="module")
def drafter(finished_run, tmp_path_factory) -> Path:
    """An exit of a run, for its base model."""
    folder = tmp_path_factory.mktemp("drafter") / "my drafter"
    assert main(["export", "kind=drafter", f"src={finished_run}", "exit=1", f"out={folder}"]) == 0
    return folder


def python_of(report: str) -> str:
    return report.split("```python\n")[1].split("```")[0]


def test_stock_transformers_writes_the_text_of_the_base_alone(drafter, model_dir, monkeypatch, capsys):
    report = (drafter / "drafter.md").read_text()
    assert "Not measured. `data=<held-out text>` measures" in report
    base, small = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (model_dir, drafter))
    assert type(small).__module__.startswith("transformers.models.")
    assert small.config.num_hidden_layers < base.config.num_hidden_layers
    ids, settings = torch.arange(3, 11)[None], {"max_new_tokens": 24, "do_sample": False}
    alone = base.generate(ids, **settings)
    calls = []
    small.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(base.generate(ids, assistant_model=small, **settings), alone)
    assert calls
    monkeypatch.chdir(drafter.parent)
    capsys.readouterr()
    exec(python_of(report), {})
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    alone = base.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=64, do_sample=False)
    assert capsys.readouterr().out.strip() == tokenizer.decode(alone[0]).strip()


@needs_llama_cpp
def test_llama_cpp_writes_the_text_of_the_base_alone(drafter, model_dir, tmp_path: Path):
    files = {path: tmp_path / f"{name}.gguf" for name, path in (("target", model_dir), ("drafter", drafter))}
    for path, file in files.items():
        assert main(["export", "format=gguf", f"src={path}", f"out={file}"]) == 0
    alone = LlamaCpp(files[model_dir]).greedy(range(3, 11), 24)
    drafted = LlamaCpp(files[model_dir], files[drafter]).greedy(range(3, 11), 24)
    assert drafted["tokens"] == alone["tokens"]
    assert drafted["timings"]["draft_n"] > 0


def test_what_it_brings_is_measured(finished_run, corpus, tmp_path: Path, capsys):
    out = tmp_path / "drafter"
    words = [f"data={corpus}", f"cache_dir={tmp_path}", "samples=4", "seconds=0.05", "device=cpu"]
    assert main(["export", "kind=drafter", f"src={finished_run}", "exit=1", f"out={out}", *words]) == 0
    (said,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"greedy [\d.]+x the speed \(\d+% accepted, \d+ drafts? per cycle\), sampling [\d.]+x .*per cycle\)", said
    )
    report = (out / "drafter.md").read_text()
    assert f"Foretold: {said}; each draft takes" in report
    drafts = re.search(r"accepted, (\d+) draft", said)[1]
    assert f"num_assistant_tokens={drafts}," in report
    assert f"--spec-draft-n-max {drafts}\n" in report


def test_a_stock_model_drafts_for_another(drafter, model_dir, tmp_path: Path):
    """As a size of a palette does."""
    out = tmp_path / "out"
    assert main(["export", "kind=drafter", f"src={drafter}", f"base={model_dir}", f"out={out}"]) == 0
    assert f"a draft model for `{model_dir}`" in (out / "drafter.md").read_text()
    ids = torch.arange(3, 11)[None]
    expected, found = (AutoModelForCausalLM.from_pretrained(path).eval()(ids).logits for path in (drafter, out))
    assert torch.equal(found, expected)


def changed(source: Path, folder: Path, **settings: object) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["src={run}"], "error: exit: missing; choose one of {run}'s exits: 1, 3"),
        (["src={run}", "exit=2"], "exit=2: {run} has exits at layers 1, 3"),
        (["src={drafter}"], "base: missing; give the model that {drafter} drafts for"),
        (["src={drafter}", "base={model}", "exit=1"], "exit=1: goes with a tune run as src; {drafter} is none"),
        (["src={drafter}", "base={model}", "format=gguf"], "kind=drafter: goes with format=hf"),
        (["src={run}", "exit=1", "type=f16"], "type=f16: goes with format=gguf"),
        (["src={short}", "base={model}"], "src={short}: max_position_embeddings is 32, but {model} reads "),
        (["src={other}", "base={model}"], "src={other}: tokenizer: id of '<more>' is "),
        (["src={ends}", "base={model}"], "src={ends}: eos_token_id is 7, but "),
        (["src={drafter}", "base={wide}"], "src={drafter}: config.vocab_size is 301, but 320 in {wide}, for which"),
    ],
)
def test_pairs_that_do_not_fit_are_one_line(arguments, text, finished_run, drafter, model_dir, tmp_path, capsys):
    folders = {"run": finished_run, "drafter": drafter, "model": model_dir}
    folders["short"] = changed(drafter, tmp_path / "short", max_position_embeddings=32)
    folders["wide"] = chat_model(tmp_path / "wide", "llama", vocab_size=320)
    folders["other"] = changed(drafter, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(drafter)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folders["other"])
    folders["ends"] = changed(drafter, tmp_path / "ends")
    settings = json.loads((drafter / "generation_config.json").read_text()) | {"eos_token_id": 7}
    (folders["ends"] / "generation_config.json").write_text(json.dumps(settings))
    capsys.readouterr()
    given = [argument.format(**folders) for argument in arguments]
    assert main(["export", f"out={tmp_path / 'out'}", "kind=drafter", *given]) == 2
    said = capsys.readouterr().err
    assert text.format(**folders) in said.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_other_kinds_take_no_data(finished_run, tmp_path: Path, capsys):
    assert main(["export", f"src={finished_run}", "data=d", f"out={tmp_path / 'out'}"]) == 2
    assert "data=d: goes with kind=drafter" in capsys.readouterr().err
