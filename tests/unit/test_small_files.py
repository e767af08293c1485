"""What goes with the weights of a model folder: by transformers' own names, and nothing else."""

import fnmatch
import json
from pathlib import Path

import pytest
from helpers.clutter import BELONG, STALE, clutter
from huggingface_hub.utils import filter_repo_objects
from transformers import processing_utils, tokenization_utils_base, utils
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

from ee_scale.backbone import hub
from ee_scale.backbone.loading import weight_files
from ee_scale.backbone.small_files import CHAT_TEMPLATES, SMALL_FILES, has_vocabulary, small_files
from ee_scale.errors import UserError


def declared() -> set[str]:
    """Every file that a tokenizer of the installed transformers names, and those of templates and processors."""
    constants = {
        name: value
        for module in (utils, processing_utils, tokenization_utils_base)
        for name, value in vars(module).items()
        if isinstance(value, str)
    }
    found = {
        constants[name]
        for name in (
            *("CHAT_TEMPLATE_FILE", "LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE", "SPECIAL_TOKENS_MAP_FILE"),
            *("ADDED_TOKENS_FILE", "TOKENIZER_CONFIG_FILE", "FULL_TOKENIZER_FILE", "FEATURE_EXTRACTOR_NAME"),
            *("IMAGE_PROCESSOR_NAME", "PROCESSOR_NAME", "GENERATION_CONFIG_NAME"),
        )
    }
    for name in {name for name in TOKENIZER_MAPPING_NAMES.values() if isinstance(name, str)}:
        files = vars(tokenizer_class_from_name(name)).get("vocab_files_names", {})
        found |= {file for file in files.values() if isinstance(file, str)} if isinstance(files, dict) else set()
    return found


def test_every_name_that_transformers_declares():
    names = declared()
    assert {"merges.txt", "sentencepiece.bpe.model", "tokenizer.json"} <= names
    assert [name for name in sorted(names) if not any(fnmatch.fnmatch(name, p) for p in SMALL_FILES)] == []
    assert utils.CHAT_TEMPLATE_DIR == CHAT_TEMPLATES


def test_a_cluttered_folder(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    found = [name.as_posix() for name in small_files(clutter(tmp_path))]
    assert sorted(found) == sorted(BELONG)
    assert not set(found) & set(STALE)


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model", "vocab.txt", "tekken.json", "qwen.tiktoken"])
def test_a_tokenizer_of_any_kind(tmp_path: Path, name: str):
    for other in ("special_tokens_map.json", "chat_template.jinja", "generation_config.json", "LICENSE"):
        (tmp_path / other).write_text("{}")
    assert not has_vocabulary(tmp_path)
    (tmp_path / name).write_text("{}")
    assert has_vocabulary(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model-00001-of-00002.safetensors", "x.py"])
def test_weights_config_and_code_are_not_small_files(name: str):
    assert not any(fnmatch.fnmatch(name, pattern) for pattern in SMALL_FILES)


# -- the hub -----------------------------------------------------------------------------------------------------------


class Repository:
    """The hub's client without a network: its own filter of names, over files that lie here."""

    def __init__(self, folder: Path, files: dict[str, str]):
        self.folder, self.files = folder / "0123abcd", files
        self.folder.mkdir()

    def download(self, name: str, revision: str | None = None, **patterns: list[str]) -> str:
        assert revision in (None, self.folder.name)
        for path in filter_repo_objects(self.files, **patterns):
            (self.folder / path).parent.mkdir(exist_ok=True)
            (self.folder / path).write_text(self.files[path])
        return str(self.folder)

    @property
    def there(self) -> set[str]:
        return {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()}


SHARDS = {
    "model.safetensors.index.json": json.dumps({"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}})
}
SHARDS |= {"part-1.safetensors": "", "part-2.safetensors": ""}


@pytest.mark.parametrize("weights", [{"model.safetensors": ""}, SHARDS], ids=["single", "shards"])
def test_what_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: dict[str, str]):
    """What transformers would read: no second copy of the weights, no folder of another library."""
    other = ("consolidated.safetensors", "pytorch_model.bin", "original/tokenizer.model", "original/params.json")
    other += ("onnx/model.onnx", "onnx/config.json", "tf_model.h5", "model.fp16.safetensors")
    files = dict.fromkeys([*BELONG, *STALE, *other], "") | weights | {"config.json": "{}"}
    repository = Repository(tmp_path, files)
    monkeypatch.setattr(hub, "snapshot_download", repository.download)
    assert hub.find_model("org/model") == repository.folder
    assert repository.there == {"config.json", *weights, *BELONG}


def test_a_name_with_pickled_weights_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    repository = Repository(tmp_path, {"config.json": "{}", "pytorch_model.bin": ""})
    monkeypatch.setattr(hub, "snapshot_download", repository.download)
    with pytest.raises(
        UserError, match=r"org/model: no model.safetensors .* on the hub; .*save_pretrained\(<folder>\)"
    ):
        hub.find_model("org/model")
    (repository.folder / "pytorch_model.bin").write_text("")
    with pytest.raises(UserError, match=r"neither model.safetensors .* in it; .*pytorch_model.bin.*save_pretrained"):
        weight_files(repository.folder)
