"""Tokenizers as they lie in folders: what lacks is named, and what the ids depend on is in every key."""

import base64
import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from ee_scale.data import inputs
from ee_scale.data.builtin import train_tokenizer
from ee_scale.data.corpora import open_tokens
from ee_scale.data.encode import tokenizer_digest
from ee_scale.data.inputs import load_tokenizer
from ee_scale.data.text import prepare_text
from ee_scale.errors import UserError

TEXTS = [f"The early exit at layer {i} reads the hidden state." for i in range(100)]


@pytest.fixture(scope="module")
def base() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300)


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def token(content: str, number: int, **options: bool) -> dict[str, object]:
    shape = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True} | options
    return {"id": number, "content": content, **shape}


def added(folder: Path) -> None:
    values = json.loads((folder / "tokenizer_config.json").read_text())
    values.setdefault("added_tokens_decoder", {})["300"] = {
        key: value for key, value in token("early exit", 300).items() if key != "id"
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


def prefix_space(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    values["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(values))


CHANGES = {
    "tokenizer_config.json: a token": added,
    "tokenizer_config.json: special tokens are text": lambda folder: edit(
        folder / "tokenizer_config.json", split_special_tokens=True
    ),
    "tokenizer_config.json: the end mark": lambda folder: edit(folder / "tokenizer_config.json", eos_token="x"),
    "tokenizer.json": prefix_space,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_does_not_survive_a_change_of_the_tokenizer(base, tmp_path, change):
    base.save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("The early exit <|end|> of a layer")

    def ids() -> list[int]:
        tokenizer = load_tokenizer(tmp_path / "model")
        given = (tokenizer, tmp_path / "model", tmp_path / "cache", "text", False)
        (prefix,) = prepare_text([str(tmp_path / "a.txt")], *given)
        dataset = open_tokens(prefix)
        found = dataset[0].tolist()
        text = (tmp_path / "a.txt").read_text()
        assert found == [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        return found

    before = ids()
    assert ids() == before
    CHANGES[change](tmp_path / "model")
    assert ids() != before


def test_what_ids_do_not_depend_on_keeps_the_cache(base, tmp_path):
    base.save_pretrained(tmp_path)
    before = tokenizer_digest(load_tokenizer(tmp_path), tmp_path)
    edit(tmp_path / "tokenizer_config.json", chat_template="{{ messages }}", model_max_length=7)
    assert tokenizer_digest(load_tokenizer(tmp_path), tmp_path) == before


def test_a_tokenizer_without_a_backend_is_known_by_its_files(tmp_path, base):
    class Slow:
        eos_token_id = 0

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    (tmp_path / "merges.txt").write_text("a b")
    (tmp_path / "merges.txt").touch()
    before = tokenizer_digest(Slow(), tmp_path)
    assert tokenizer_digest(Slow(), tmp_path) == before
    (tmp_path / "merges.txt").write_text("b a")
    assert tokenizer_digest(Slow(), tmp_path) != before


def test_another_version_of_the_library_is_another_key(base, tmp_path, monkeypatch):
    before = tokenizer_digest(base, tmp_path)
    monkeypatch.setattr("ee_scale.data.encode._version", lambda name: "0.0.1")
    assert tokenizer_digest(base, tmp_path) != before


# What lacks


def message(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"model.path={folder}: ")


def test_the_package_that_lacks_is_named(tmp_path, monkeypatch):
    # transformers tries one after the other, and speaks of the last: so do files that neither can read.
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.model").write_bytes(b"\n\xff\x05 no protobuf")
    assert message(tmp_path).startswith("no tokenizer in it (")
    monkeypatch.setattr(inputs, "_is_there", lambda package: False)
    assert message(tmp_path) == "its tokenizer needs the package sentencepiece; pip install sentencepiece"
    ranks = b"".join(base64.b64encode(bytes([i])) + f" {i}\n".encode() for i in range(256))
    (tmp_path / "tokenizer.model").write_bytes(ranks + b"broken")
    assert message(tmp_path) == "its tokenizer needs the package tiktoken; pip install tiktoken"


def test_a_package_that_an_error_names(tmp_path, monkeypatch):
    def fail(*_, **__):
        try:
            raise ModuleNotFoundError("No module named 'sacremoses'", name="sacremoses")
        except ModuleNotFoundError as error:
            raise ValueError("cannot make one") from error

    monkeypatch.setattr(inputs.AutoTokenizer, "from_pretrained", fail)
    monkeypatch.setattr(inputs, "_is_there", lambda package: False)
    assert message(tmp_path) == "its tokenizer needs the package sacremoses; pip install sacremoses"


def test_no_tokenizer_is_said_as_before(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert message(tmp_path).startswith("no tokenizer in it (")


def test_sentencepiece_alone_opens(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs the package sentencepiece")
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=120, model_type="bpe",
        minloglevel=2,
    )  # fmt: skip
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    right = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).encode(TEXTS[0])
    assert load_tokenizer(tmp_path)(TEXTS[0], add_special_tokens=False)["input_ids"] == right
