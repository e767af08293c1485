"""A model that is stored in another way is the same model in every command and every export."""

import json
from pathlib import Path

import pytest
import torch
from helpers.cli import run_cli
from helpers.folders import EMBEDDING, HEAD, Tensors, bare, rewritten
from transformers import AutoModelForCausalLM, AutoTokenizer

import ee_scale
from ee_scale.cli.main import main


def two(tensors: Tensors) -> Tensors:
    head = torch.randn(tensors[EMBEDDING].shape, generator=torch.Generator().manual_seed(3))
    return tensors | {HEAD: 0.1 * head}


def renamed(tensors: Tensors) -> Tensors:
    return {HEAD if name == EMBEDDING else name: tensor for name, tensor in tensors.items()}


# How it is stored, and the same model as transformers itself saves it: (tensors, tie_word_embeddings).
KINDS = {
    "two": ((two, True), (two, False)),
    "head": ((renamed, True), (lambda tensors: tensors, True)),
    "bare": ((lambda tensors: bare(two(tensors)), True), (two, False)),
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, model_dir, tmp_path_factory) -> tuple[Path, Path]:
    """(the folder, its plain twin)."""
    root = tmp_path_factory.mktemp(request.param)
    found = []
    for name, (change, tied) in zip(("folder", "twin"), KINDS[request.param], strict=True):
        found.append(rewritten(model_dir, root / name, change, tie_word_embeddings=tied))
    return found[0], found[1]


@pytest.fixture(scope="module")
def ids(model_dir) -> torch.Tensor:
    return AutoTokenizer.from_pretrained(model_dir)("one token reads what comes", return_tensors="pt").input_ids


def stock(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_they_are_the_same_model(pair, ids):
    assert torch.equal(stock(pair[0])(ids).logits, stock(pair[1])(ids).logits)


def test_conversion_there_and_back(pair, ids, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", f"src={pair[0]}", "to=megatron_core", "tp=2", "pp=2", "verify=true", "out=core"]) == 0
    assert main(["convert", "src=core", "to=hf", "verify=true", "out=back"]) == 0
    assert main(["convert", f"src={pair[0]}", "to=hf", "verify=true", "out=plain"]) == 0
    for name in ("back", "plain"):
        assert torch.equal(stock(tmp_path / name)(ids).logits, stock(pair[1])(ids).logits)


@pytest.mark.parametrize("parallel", [["parallel.tp=2"], ["parallel.pp=2"]], ids=lambda words: words[0])
def test_a_grid_writes_the_text_of_transformers(pair, tmp_path, parallel):
    tokenizer, prompt = AutoTokenizer.from_pretrained(pair[1]), "one token reads"
    given = tokenizer(prompt, return_tensors="pt").input_ids
    new = stock(pair[1]).generate(given, max_new_tokens=8, do_sample=False)[0, given.shape[1] :]
    arguments = ["generate", f"model={pair[0]}", "policy=off", f"prompt={prompt}", "max_new_tokens=8", "device=cpu"]
    finished = run_cli([*arguments, *parallel, "out=answer.jsonl"], tmp_path, world_size=2)
    assert finished.code == 0, finished.output
    answer = json.loads((tmp_path / "answer.jsonl").read_text())
    assert answer["text"] == tokenizer.decode(new, skip_special_tokens=True)


@pytest.fixture(scope="module")
def exports(pair, tune_arguments, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Folders of a frozen run ('model', 'sidecar', 'exit') and of one that trains all ('full'), for both."""
    found: dict[str, list[Path]] = {}
    changed = ["exits.head=low_rank", "train.steps=2", "train.save_every=2", "out=run"]
    for base in pair:
        folder = tmp_path_factory.mktemp("exports")
        given = [word for word in tune_arguments if not word.startswith("model=")]
        for mode, kinds in {"frozen": ("early_exit", "sidecar", "submodel"), "full": ("early_exit",)}.items():
            place = folder / mode
            place.mkdir()
            words = [*given, f"model={base}", *changed, f"backbone={mode}"]
            finished = run_cli(words, place)
            assert finished.code == 0, finished.output
            for kind in kinds:
                extra = ["exit=3"] if kind == "submodel" else []
                assert main(["export", f"src={place / 'run'}", f"out={place / kind}", f"kind={kind}", *extra]) == 0
                found.setdefault(f"{mode} {kind}", []).append(place / kind)
    return {name: (mine, twin) for name, (mine, twin) in found.items()}


def test_exports_are_those_of_the_twin(pair, exports, ids):
    opened = {name: stock(folders[0])(ids).logits for name, folders in exports.items() if "sidecar" not in name}
    for name, logits in opened.items():
        assert torch.equal(logits, stock(exports[name][1])(ids).logits), name
    assert torch.equal(opened["frozen early_exit"], stock(pair[1])(ids).logits)
    assert not torch.equal(opened["full early_exit"], stock(pair[1])(ids).logits)
    exits = {}
    for name in ("frozen early_exit", "frozen sidecar", "full early_exit"):
        mine, twin = (ee_scale.EarlyExitForCausalLM.from_pretrained(folder)(ids) for folder in exports[name])
        assert torch.equal(mine.logits, twin.logits), name
        exits[name] = mine.exit_logits[3]
        assert torch.equal(exits[name], twin.exit_logits[3]), name
    assert torch.equal(exits["frozen early_exit"], exits["frozen sidecar"])
    assert (opened["frozen submodel"] - exits["frozen early_exit"]).abs().max() < 1e-5
