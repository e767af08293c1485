"""Ids of long documents: those that transformers gives for the whole text."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Encoding, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ee_scale.data import encode
from ee_scale.data.corpora import document_pieces, open_tokens
from ee_scale.data.encode import DocumentEncoder, own_backend, tokenizer_digest
from ee_scale.data.text import prepare_text
from ee_scale.errors import UserError

WORDS = "the early exit of a layer reads hidden states, e\u0301 äöü ﬁne 漢字 カタカナ 12 3456 don't it's \t x=1;\n so"
SPECIAL = ["<s>", "</s>", "<unk>", "<|cut|>"]


def prose(seed: int, length: int) -> str:
    pick = random.Random(seed)
    return " ".join(pick.choices([*WORDS.split(" "), ""], k=length // 4))[:length]


def trained(tokenizer: Tokenizer, trainer: type, size: int = 320, **options: object) -> Tokenizer:
    texts = [prose(i, 2000) for i in range(8)]
    tokenizer.train_from_iterator(
        texts, trainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False, **options)
    )
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(
        Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), "isolated"
    )
    whole = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
    tokenizer.decoder = decoders.ByteLevel()
    return trained(tokenizer, trainers.BpeTrainer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def llama_2() -> Tokenizer:
    """The space in front comes from the normaliser, and nothing is split: a document is one word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trained(tokenizer, trainers.BpeTrainer, 600, limit_alphabet=40)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in bytes_])
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def metaspace(scheme: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=scheme == "always")
    return trained(tokenizer, trainers.BpeTrainer, limit_alphabet=60)


def word_pieces() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return trained(tokenizer, trainers.WordPieceTrainer)


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    squeeze = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip(), squeeze])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return trained(tokenizer, trainers.UnigramTrainer, unk_token="<unk>")


def unigram_without_words() -> Tokenizer:
    tokenizer = unigram()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(split=False)])
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "llama 2": llama_2,
    "metaspace first": lambda: metaspace("first"),
    "metaspace always": lambda: metaspace("always"),
    "word pieces": word_pieces,
    "unigram": unigram,
    "unigram without words": unigram_without_words,
}
TEXTS = {
    "prose": prose(1, 30_000),
    "no spaces": prose(2, 30_000).replace(" ", ""),
    "CJK": "".join(random.Random(3).choices("漢字カタナ、。", k=20_000)),
    "digits": prose(4, 5000) + "".join(random.Random(5).choices("0123456789", k=9001)) + prose(6, 5000),
    "white space": prose(7, 5000) + " " * 5000 + "\n" * 3001 + prose(8, 5000),
    "endless word": prose(9, 5000) + "reads" * 2001 + " " + prose(10, 5000),
    "one letter": "a" * 20_001,
    "unknown": prose(11, 4000) + "\u2603\U0001f642" * 4000 + prose(12, 4000),
    "special tokens": "</s><|cut|> of".join(prose(i, 150) for i in range(150)),
    "accents": "e\u0301\u0323a\u0308" * 4000,
    "blank": " \n" * 6000,
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return {kind: PreTrainedTokenizerFast(tokenizer_object=make(), **names) for kind, make in KINDS.items()}


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(encode, "WINDOW", 1500)
    monkeypatch.setattr(encode, "OVERLAP", 400)
    monkeypatch.setattr(encode, "MIDDLE", (100, 300))


def ids_of(tokenizer, *texts: str) -> list[list[int]]:
    """Ids of documents through the encoder."""
    found: list[list[int]] = []
    for part in DocumentEncoder(tokenizer).encode(document_pieces([("", text) for text in texts])):
        if part.first:
            found.append([])
        found[-1] += part.ids.tolist()
    return found


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_long_document_has_the_ids_of_the_whole(tokenizers, small_windows, kind, name):
    tokenizer, text = tokenizers[kind], TEXTS[name]
    whole = tokenizer([text, "short one", text[:5000]], add_special_tokens=False)["input_ids"]
    assert ids_of(tokenizer, text, "short one", text[:5000]) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_windows_of_prose_never_grow(tokenizers, small_windows, monkeypatch, kind):
    monkeypatch.setattr(DocumentEncoder, "_found_again", None)
    assert len(ids_of(tokenizers[kind], TEXTS["prose"])[0]) > 2000


def test_what_cannot_be_decided_in_parts_is_refused(tokenizers, small_windows, monkeypatch):
    monkeypatch.setattr(encode, "_seam", lambda *_: None)
    text, tokenizer = TEXTS["prose"], tokenizers["llama 2"]
    assert ids_of(tokenizer, text) == [tokenizer(text, add_special_tokens=False)["input_ids"]]
    with pytest.raises(UserError, match=r"data: in a document of more than 1,500 characters .* cut that document"):
        DocumentEncoder(tokenizer)._found_again(own_backend(tokenizer).encode(text), [(1, 2, 3)])


def test_ids_are_asked_for_once(tokenizers):
    """The library makes a new list of all of them each time."""

    class Counted:
        def __init__(self, found: Encoding):
            self.found, self.asked = found, 0

        def __len__(self) -> int:
            return len(self.found)

        def __getattr__(self, name: str) -> Any:
            self.asked += name == "ids"
            return getattr(self.found, name)

    counted = Counted(own_backend(tokenizers["llama 2"]).encode(prose(1, 2000)))
    _, run = encode._run(counted, (500, 1500))
    assert len(run) > 100
    assert counted.asked == 1


@pytest.mark.parametrize("kind", ["llama 2", "byte level", "unigram"])
def test_files_and_lines_above_the_window(tokenizers, tmp_path, kind):
    text = prose(13, 2 * encode.WINDOW + 1234)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + '\n{"text": "end"}\n')
    tokenizer = tokenizers[kind]
    names = [str(tmp_path / name) for name in ("a.txt", "a.jsonl")]
    file, lines = (open_tokens(p) for p in prepare_text(names, tokenizer, tmp_path, tmp_path, "text", progress=False))
    whole = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert [row.tolist() for row in (file[0], lines[0])] == [whole, whole]
    assert (len(file), len(lines)) == (1, 2)


def test_split_special_tokens_is_followed(tokenizers):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="</s>", split_special_tokens=True)
    text = "of </s> layer"
    assert ids_of(tokenizer, text) == [tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert ids_of(tokenizer, text) != ids_of(tokenizers["byte level"], text)
    assert tokenizer_digest(tokenizer, ".") != tokenizer_digest(tokenizers["byte level"], ".")


def test_a_tokenizer_with_a_call_of_its_own_is_asked(tokenizers):
    class Lower(PreTrainedTokenizerFast):
        def __call__(self, text, **options):
            return super().__call__(text.lower(), **options)

    tokenizer = Lower(tokenizer_object=byte_level(), eos_token="</s>")
    assert ids_of(tokenizer, "The LAYER") == [tokenizers["byte level"]("the layer", add_special_tokens=False).input_ids]
