"""A model folder is data from strangers: it names no file out of it, runs no code, and asks for no more than it has."""

import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.models import write_model
from safetensors.torch import save_file
from transformers import AutoConfig

from ee_scale.artifact.hf_folder import copy_small_files
from ee_scale.backbone.fingerprint import fingerprint
from ee_scale.backbone.loading import INDEX_NAME, SINGLE_NAME, TensorFolder, weight_files
from ee_scale.backbone.model_folder import SIDECAR_CONFIG, SIDECAR_WEIGHTS, ModelFolder, base_path, read_sidecar
from ee_scale.cli.main import main
from ee_scale.config.compose import from_yaml, to_yaml
from ee_scale.config.schema import VERBS
from ee_scale.conversion.folders import TRACKER, iteration_folder
from ee_scale.conversion.formats.torch_dist_reader import _Files
from ee_scale.errors import UserError
from ee_scale.exits.placement import exit_spec
from ee_scale.files import file_digest, named_file, own_file
from ee_scale.inference.model import EarlyExitForCausalLM, open_model, untrained_exits
from ee_scale.reading import check_files, read_json, write_json

OUTSIDE = [
    "../secret.safetensors",
    "/etc/passwd",
    "a/../../secret.safetensors",
    "..",
    ".",
    "",
    "a\\b",
    "a\0b",
    None,
    7,
    [],
]


def find_parts(path: Path) -> ModelFolder:
    return ModelFolder.find(path).checked()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("strange") / "model", "llama")


@pytest.fixture
def folder(model, tmp_path) -> Path:
    save_file({"secret": torch.ones(2)}, tmp_path / "secret.safetensors")
    (tmp_path / "secret.txt").write_text("secret")
    return Path(shutil.copytree(model, tmp_path / "model"))


def write_index(folder: Path, name: Any) -> None:
    (folder / SINGLE_NAME).rename(folder / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": name}}
    (folder / INDEX_NAME).write_text(json.dumps(index))


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_names_files_of_its_folder(folder, name):
    write_index(folder, name)
    with pytest.raises(UserError, match=INDEX_NAME) as caught:
        weight_files(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "run.sh", "x.py"])
def test_an_index_names_safetensors(folder, name):
    (folder / name).touch()
    write_index(folder, name)
    with pytest.raises(UserError, match=f"names '{name}', which is no safetensors file"):
        weight_files(folder)


@pytest.mark.parametrize("single", [True, False])
def test_links_lead_nowhere_else(folder, single):
    target = folder.parent / "secret.safetensors"
    if single:
        (folder / SINGLE_NAME).unlink()
        (folder / SINGLE_NAME).symlink_to(target)
    else:
        write_index(folder, "model-2.safetensors")
        (folder / "model-2.safetensors").symlink_to(os.path.relpath(target, folder))
    with pytest.raises(UserError, match=r"a link to .*secret\.safetensors, out of its folder"):
        TensorFolder(folder)


def test_links_inside_a_folder_and_into_the_hubs_cache_work(folder):
    want = fingerprint(folder)
    (folder / "data").mkdir()
    (folder / SINGLE_NAME).rename(folder / "data" / "x")
    (folder / SINGLE_NAME).symlink_to("data/x")
    assert fingerprint(folder) == want
    cache = folder.parent / "hub" / "models--a--b"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate(path for path in folder.iterdir() if path.is_file()):
        shutil.copyfile(path, cache / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert fingerprint(snapshot) == want
    assert find_parts(snapshot).config.num_hidden_layers == AutoConfig.from_pretrained(folder).num_hidden_layers
    out = folder.parent / "out"
    out.mkdir()
    copy_small_files(snapshot, out)
    assert (out / "generation_config.json").is_file()
    linked = folder.parent / "linked"  # the folder itself may lie anywhere
    linked.symlink_to(snapshot)
    assert fingerprint(linked) == want


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "chat_template.jinja"])
def test_an_export_carries_no_file_from_elsewhere(folder, tmp_path, name):
    (folder / name).symlink_to("../secret.txt")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=f"{name}: a link to"):
        copy_small_files(folder, tmp_path / "out")
    assert not (tmp_path / "out" / name).exists()


@pytest.mark.parametrize("name", OUTSIDE)
def test_digests_are_of_files_of_the_folder(folder, name):
    if isinstance(name, str):
        with pytest.raises(UserError, match="no name of a file beside it"):
            check_files(folder, {name: "0"})
    with pytest.raises(UserError, match=r"names .*, which is no name of a file beside it"):
        named_file(folder, name, folder / "list.json")


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/passwd", "a/b"])
def test_an_index_of_torch_dist_names_files_of_its_folder(folder, name):
    info = SimpleNamespace(relative_path=name, offset=0, length=8)
    with _Files(folder) as files:
        for read in (files.extent, lambda info: files.item(info, False)):
            with pytest.raises(UserError, match="no name of a file beside it"):
                read(info)
        (folder / "__0_0.distcp").symlink_to("../secret.txt")
        with pytest.raises(UserError, match="a link to"):
            files.extent(SimpleNamespace(relative_path="__0_0.distcp", offset=0, length=8))


@pytest.mark.parametrize("text", ["../../secret", "/", "²", "9" * 5000, "1", "-1", "release", ""])
def test_a_tracker_names_an_iteration_that_is_there(tmp_path, text):
    (tmp_path / "iter_0000010").mkdir()
    (tmp_path / TRACKER).write_text(text)
    with pytest.raises(UserError, match="which is not there"):
        iteration_folder(tmp_path, None)


def sidecar(folder: Path, model: Path, **facts: Any) -> Path:
    """A sidecar beside a model; `facts` replace what it says."""
    folder.mkdir(parents=True)
    exits = untrained_exits(model, exit_spec(AutoConfig.from_pretrained(model), (1, 3), "mlp", "low_rank", 4))
    save_file(
        {f"exit_heads.{name}": value.contiguous() for name, value in exits.exit_heads.state_dict().items()},
        folder / SIDECAR_WEIGHTS,
    )
    said = {
        "base_model": str(model),
        "base_fingerprint": fingerprint(model),
        "early_exit": exits.exit_spec.to_dict(),
        "files": {SIDECAR_WEIGHTS: file_digest(folder / SIDECAR_WEIGHTS)},
    }
    write_json(folder / SIDECAR_CONFIG, {**said, **facts})
    return folder


def test_the_base_of_a_sidecar(folder, tmp_path, monkeypatch):
    """Absolute wherever it lies, relative beside the sidecar and not where the command runs; by fingerprint alone."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for number, name in enumerate([str(folder), "../../model"]):
        place = sidecar(tmp_path / "sidecars" / str(number), folder, base_model=name)
        assert find_parts(place).base.resolve() == folder
        assert EarlyExitForCausalLM.from_pretrained(place).exit_spec.layers == (1, 3)
    write_model(tmp_path / "other", "llama", seed=1)
    place = sidecar(tmp_path / "sidecars" / "x", folder, base_model=str(tmp_path / "other"))
    before = {path: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    for opener in (find_parts, EarlyExitForCausalLM.from_pretrained):
        with pytest.raises(UserError, match="not the base model that these exits were trained on"):
            opener(place)
    assert {path: path.read_bytes() for path in (tmp_path / "other").iterdir()} == before


@pytest.mark.parametrize("name", [None, 7, ["a"], "a\0b"])
def test_a_base_that_is_no_path(folder, name):
    with pytest.raises(UserError, match=r"its base model is .*, which is no path"):
        base_path(folder, {"base_model": name})


@pytest.mark.parametrize("files", [{}, [], None, {"../secret.safetensors": "0", SIDECAR_WEIGHTS: "0"}])
def test_a_sidecar_answers_for_its_weights(folder, tmp_path, files):
    place = sidecar(tmp_path / "sidecar", folder, files=files)
    with pytest.raises(UserError, match=r"no digest of exits\.safetensors|no name of a file beside it|files="):
        read_sidecar(place)
    facts = read_json(place / SIDECAR_CONFIG)
    for key in facts:
        write_json(place / SIDECAR_CONFIG, {other: value for other, value in facts.items() if other != key})
        with pytest.raises(UserError, match=f"no field '{key}' in it|files="):
            read_sidecar(place)


class Boom:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_no_code_of_a_folder_runs(folder, tmp_path, monkeypatch):
    """Neither files that its configs name, nor pickles beside its weights."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    mark = tmp_path / "mark"
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Evil: ...\n")
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    for name, extra in (("config.json", {}), ("tokenizer_config.json", {"tokenizer_class": "Evil"})):
        path = folder / name
        values = json.loads(path.read_text()) if path.is_file() else {}
        maps = {key: ["evil.Evil", None] if key == "AutoTokenizer" else "evil.Evil" for key in names}
        path.write_text(json.dumps({**values, **extra, "auto_map": maps}))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Boom(mark)))
    (folder / "training_args.bin").write_bytes(pickle.dumps(Boom(mark)))
    assert open_model(folder).config.model_type == "llama"
    assert find_parts(folder).exits is None
    assert main(["generate", f"model={folder}", "prompt=a", "device=cpu"]) == 2
    (folder / SINGLE_NAME).unlink()
    with pytest.raises(UserError):
        open_model(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "model_type": "unheard"}))
    with pytest.raises(UserError):
        open_model(folder)
    assert not mark.exists()


def test_a_config_of_a_run_refers_to_nothing(monkeypatch):
    monkeypatch.setenv("SECRET", "word")
    text = to_yaml(
        from_yaml(VERBS["supernet"], "out: x\nmodel: {path: '${oc.env:SECRET}'}\ndata: {path: ['${out}', b]}")
    )
    assert "word" not in text
    config = from_yaml(VERBS["supernet"], text)
    assert (config.model.path, list(config.data.path)) == ("${oc.env:SECRET}", ["${out}", "b"])


def test_a_header_longer_than_its_file(folder, monkeypatch):
    monkeypatch.setattr("ee_scale.backbone.fingerprint.READ_WHOLE", 0)
    for size in (1 << 20, 1 << 40, (1 << 64) - 1):
        (folder / SINGLE_NAME).write_bytes(size.to_bytes(8, "little") + b"{}")
        with pytest.raises(UserError, match="not a whole safetensors file"):
            fingerprint(folder)
        with pytest.raises(UserError, match="not a whole safetensors file"):
            TensorFolder(folder)


def test_own_files_are_not_links(folder):
    assert own_file(folder / "config.json") == folder / "config.json"


CLAIMS = [
    *[{"vocab_size": 10**12}, {"intermediate_size": 10**12}, {"num_hidden_layers": 10**7}, {"head_dim": 10**12}],
    *[{"num_key_value_heads": 10**9}, {"vocab_size": -1}, {"num_hidden_layers": 0}, {"early_exit": {"rank": 10**12}}],
    *[{"early_exit": 7}, {"early_exit": {"layers": [10**9]}}, {"early_exit": {"kind": "x"}}, {"hidden_size": "64"}],
]


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
@pytest.mark.parametrize("opener", [open_model, find_parts], ids=["whole", "parts"])
def test_claims_are_checked_before_anything_is_made(folder, claim, opener, monkeypatch):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    exits = exit_spec(AutoConfig.from_pretrained(folder), (1, 3), "mlp", "low_rank", 4).to_dict()
    said = claim.get("early_exit", {})
    if isinstance(said, dict):
        claim = {**claim, "early_exit": {**exits, **said}}
    path.write_text(json.dumps({**config, **claim}))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("made"))
    with pytest.raises(UserError) as caught:
        opener(folder)
    assert "\n" not in str(caught.value)
