"""The data path from text to batches: sources, cache, errors, sample order."""

import json
import logging
import os
import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from ee_scale.data import corpora, encode, text
from ee_scale.data.corpora import num_tokens, open_tokens, python_documents, read_tokens
from ee_scale.data.dataset import build_gpt_dataset, check_tokens
from ee_scale.data.loader import batches, num_windows, windows
from ee_scale.data.text import prepare_text
from ee_scale.errors import UserError

HINT = "; data.errors=replace reads U+FFFD there"
LINES = [f"The early exit at layer {i} reads the hidden state of token {i * 7}." for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=400, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture
def prepare(tokenizer, tmp_path):
    """prepare(*sources) with a cache of its own."""

    def call(*sources, tokenizer=tokenizer, text_key="text", **options):
        names = [str(source) for source in sources]
        return prepare_text(names, tokenizer, tmp_path, tmp_path / "cache", text_key, progress=False, **options)

    return call


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """Every text that is tokenised from here on."""
    texts: list[str] = []
    cut = encode.windows

    def spy(pieces, size):
        for window in cut(pieces, size):
            texts.append(window.text)
            yield window

    monkeypatch.setattr(encode, "windows", spy)
    return texts


def documents(prefix: str, tokenizer) -> list[str]:
    """The texts at a prefix; each must end with EOS and hold no other."""
    dataset = open_tokens(prefix)
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    ids = [dataset[i].tolist() for i in range(len(dataset))]
    assert all(tokens[-1] == tokenizer.eos_token_id for tokens in ids)
    assert all(tokenizer.eos_token_id not in tokens[:-1] for tokens in ids)
    return [tokenizer.decode(tokens[:-1], clean_up_tokenization_spaces=False) for tokens in ids]


def write_prefix(prefix: Path, sequences: list[list[int]], dtype=np.uint16) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequence in sequences:
        builder.add_document(sequence, [len(sequence)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def message(call, *args, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Sources


def test_text_file_is_one_document(prepare, tokenizer, tmp_path):
    content = "\ufeffFirst line\r\n\nzweite Zeile: äöü, 漢字, 🙂\n"
    (tmp_path / "a.txt").write_bytes(content.encode())
    (tmp_path / "notes.org").write_text("any suffix will do")
    prefixes = prepare(tmp_path / "a.txt", tmp_path / "notes.org")
    assert documents(prefixes[0], tokenizer) == [content[1:]]
    assert documents(prefixes[1], tokenizer) == ["any suffix will do"]
    assert open_tokens(prefixes[0]).index.dtype == np.uint16


@pytest.mark.parametrize("separator", ["\n", " ", "äß"])
def test_large_file_stays_one_document_and_whole(prepare, tokenizer, tmp_path, encoded, separator):
    content = separator.join(LINES * 40)
    assert len(content) > 2 * encode.WINDOW
    (tmp_path / "big.txt").write_text(content)
    assert documents(prepare(tmp_path / "big.txt")[0], tokenizer) == [content]
    assert len(encoded) >= 3
    assert max(map(len, encoded)) <= encode.WINDOW


def test_jsonl_is_a_document_per_line(prepare, tokenizer, tmp_path, caplog):
    large = "\n".join(LINES * 20)
    rows = [{"body": "one"}, {"body": " \n"}, {"body": "two\nlines", "id": 2}, {"body": large}, {"body": ""}]
    lines = [json.dumps(row) for row in rows]
    lines.insert(1, "")
    lines.append(r'{"body": "half \ud83d pair"}')
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with caplog.at_level(logging.INFO, logger="ee_scale"):
        (prefix,) = prepare(tmp_path / "a.jsonl", text_key="body")
    assert documents(prefix, tokenizer) == ["one", "two\nlines", large, "half ? pair"]
    assert "4 documents" in caplog.text
    assert "(2 empty documents skipped)" in caplog.text


def test_folder_is_read_sorted_and_recursive(prepare, tokenizer, tmp_path):
    folder = tmp_path / "texts"
    files = {"b.md": "b", "a/z.py": "z", "a/k.txt": "k", "c.rst": "c", "d.txt": "d"}
    files |= {".hidden/x.txt": "no", "image.png": "no", "empty.txt": ""}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    assert documents(prepare(folder)[0], tokenizer) == ["k", "z", "b", "c", "d"]


def test_existing_prefix_is_returned_as_it_is(prepare, tmp_path, encoded):
    prefix = write_prefix(tmp_path / "mine", [[1, 2, 0], [3, 0]])
    assert prepare(prefix) == [prefix]
    assert encoded == []


def test_python_sources_have_a_held_out_part(prepare, tokenizer, monkeypatch):
    train, valid = dict(python_documents()), dict(python_documents("valid"))
    assert list(python_documents("valid")) == list(python_documents("valid"))
    assert not train.keys() & valid.keys()
    assert "dataclasses.py" in train | valid
    assert 0.05 < len(valid) / (len(train) + len(valid)) < 0.2
    folders = {part for name in train | valid for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idlelib", "site-packages", "encodings", "pydoc_data"}
    monkeypatch.setattr(corpora, "python_documents", lambda split: [("x", f"the {split} part")])
    prefixes = prepare("python", "python:valid")
    assert [documents(prefix, tokenizer) for prefix in prefixes] == [["the train part"], ["the valid part"]]


def test_python_sources_come_by_name_and_installed_packages_are_not_looked_into(tmp_path, monkeypatch):
    for name in ("b.py", "a/c.py", "a.py", "a/.d.py", "a/note.txt", "site-packages/e/f.py", "a/tests/g.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    looked, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looked.append(str(path)) or scandir(path))
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda _: str(tmp_path))
    files = corpora._python_files.__wrapped__()
    assert files == [(name, tmp_path / name) for name in ("a/.d.py", "a/c.py", "a.py", "b.py")]
    assert sorted(looked) == [str(tmp_path), str(tmp_path / "a")]


# Cache


def test_second_call_does_not_tokenise_but_an_edited_file_does(prepare, tokenizer, tmp_path, encoded):
    file = tmp_path / "a.txt"
    file.write_text("first")
    before = prepare(file)
    assert prepare(file) == before
    assert encoded == ["first"]
    file.write_text("other")
    os.utime(file, ns=(1, 1))
    after = prepare(file)
    assert after != before
    assert documents(after[0], tokenizer) == ["other"]


def test_key_depends_on_tokenizer_and_settings(prepare, tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "body": "two"}\n')
    other_eos = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<pad>")
    keys = {
        prepare(tmp_path / "a.jsonl")[0],
        prepare(tmp_path / "a.jsonl", text_key="body")[0],
        prepare(tmp_path / "a.jsonl", tokenizer=other_eos)[0],
        prepare(tmp_path / "a.jsonl", errors="replace")[0],
    }
    assert len(keys) == 4


def test_default_cache_follows_xdg(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    (tmp_path / "a.txt").write_text("text")
    (prefix,) = prepare_text([str(tmp_path / "a.txt")], tokenizer, tmp_path, None, "text", progress=True)
    assert Path(prefix).parent.parent == tmp_path / "xdg" / "ee_scale" / "data"


def test_failed_or_killed_writer_leaves_nothing_that_counts(prepare, tokenizer, tmp_path, encoded, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("some text")

    def die(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(text.Writer, "finish", die)
        with pytest.raises(KeyboardInterrupt):
            prepare(file)
    assert list((tmp_path / "cache").iterdir()) == []

    (prefix,) = prepare(file)
    folder = Path(prefix).parent
    shutil.copytree(folder, folder.parent / f".{folder.name}.killed")
    Path(f"{prefix}.bin").write_bytes(b"\0")  # torn by hand: no longer what the index describes
    encoded.clear()
    assert prepare(file) == [prefix]
    assert encoded == ["some text"]
    assert documents(prefix, tokenizer) == ["some text"]


def test_writer_that_comes_second_uses_the_first_one_s_folder(tmp_path):
    folder = tmp_path / "final"
    with text.published(folder) as outer:
        (outer / "name").write_text("second")
        with text.published(folder) as inner:
            (inner / "name").write_text("first")
    assert (folder / "name").read_text() == "first"
    assert list(tmp_path.iterdir()) == [folder]


# Errors of sources


def test_errors_of_paths(prepare, tmp_path):
    assert message(prepare, "x.txt") == "data.path='x.txt': no such file or folder"
    assert message(prepare, "x.txt", fields="") == "data='x.txt': no such file or folder"
    (tmp_path / "empty").mkdir()
    assert message(prepare, tmp_path / "empty").endswith(
        "/empty': no .txt, .md, .rst, .py, .jsonl, .csv, .tsv, .ndjson, .json, .jsonlines, .parquet file in it"
    )
    prefix = write_prefix(tmp_path / "p", [[1, 2, 3]])
    assert message(prepare, f"{prefix}.bin").endswith("p.bin': give a Megatron dataset as its prefix, without .bin")
    Path(f"{prefix}.idx").unlink()
    assert message(prepare, prefix) == f"data.path='{prefix}': p.bin is there, p.idx is missing"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{oops}", "line 3: not valid JSON (Expecting property name enclosed in double quotes: column 2)"),
        ('{"id": 1, "body": "x"}', "line 3: no field 'text' (fields: body, id); set data.text_key"),
        ('{"text": 5}', "line 3: field 'text' is not text but int"),
        ("[1]", "line 3: not a JSON object but list"),
        (
            '{"text": "caf\udce9"}',
            "line 3: not UTF-8 text (byte 0xe9: invalid continuation byte), at byte 31; "
            "data.errors=replace reads U+FFFD there",
        ),
    ],
)
def test_errors_of_jsonl(prepare, tmp_path, content, expected):
    file = tmp_path / "a.jsonl"
    file.write_bytes(('{"text": "good"}\n\n' + content + "\n").encode("utf-8", "surrogateescape"))
    assert message(prepare, file) == f"data.path='{file}' {expected}"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", ": no text in it"),
        (b" \n\t\n", ": no text in it"),
        (b"caf\xe9 au lait", f" line 1: not UTF-8 text (byte 0xe9: invalid continuation byte), at byte 3{HINT}"),
        (b"cut off\n\xe2\x82", f" line 2: not UTF-8 text (byte 0xe2: unexpected end of data), at byte 8{HINT}"),
        (b"text\0and more", f" line 1: byte 4 is NUL, so this is no text{HINT}"),
        ("text".encode("utf-16"), ": UTF-16 text; write it as UTF-8 first (iconv -f UTF-16 -t UTF-8)"),
    ],
)
def test_errors_of_text(prepare, tmp_path, content, expected):
    file = tmp_path / "e.txt"
    file.write_bytes(content)
    assert message(prepare, file) == f"data.path='{file}'{expected}"
    assert list((tmp_path / "cache").iterdir()) == []


def test_errors_of_tokenizer_and_cache(prepare, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    no_end = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    expected = f"tokenizer of {tmp_path}: no eos_token; documents need an end mark"
    assert message(prepare, tmp_path / "a.txt", tokenizer=no_end) == expected
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert message(prepare, tmp_path / "a.txt") == f"data.cache_dir='{tmp_path}/cache': cannot write (File exists)"


def test_errors_of_damaged_prefixes(prepare, tmp_path):
    prefix = write_prefix(tmp_path / "p", [[1, 2, 3], [4, 5]])
    whole = {end: Path(prefix + end).read_bytes() for end in (".bin", ".idx")}

    def damaged(end: str, content: bytes) -> str:
        for name, data in {**whole, end: content}.items():
            Path(prefix + name).write_bytes(data)
        return message(prepare, prefix).removeprefix(f"data.path='{prefix}': ")

    assert damaged(".bin", whole[".bin"][:-2]) == "its .bin has 8 bytes, its .idx describes 10"
    assert damaged(".bin", b"") == "no tokens in it"
    assert damaged(".idx", whole[".idx"][:-1]) == "its .idx is cut off (81 bytes, 82 expected)"
    assert damaged(".idx", b"text") == "its .idx is not a Megatron index"
    assert damaged(".idx", whole[".idx"][:9] + b"\x02" + whole[".idx"][10:]).startswith("its .idx has version 2")


# Checks of tokens


def test_check_tokens(tmp_path):
    prefix = write_prefix(tmp_path / "p", [list(range(20)), [399] * 17])
    check_tokens([prefix], vocab_size=400, seq_length=36)
    here = f"data.path='{prefix}'"
    assert message(check_tokens, [prefix], 400, 512) == (
        f"{here}: 37 tokens, one sequence needs data.seq_length + 1 = 513"
    )
    assert message(check_tokens, [prefix], 400, 512, names=["a.txt"], fields="") == (
        "data='a.txt': 37 tokens, one sequence needs seq_length + 1 = 513"
    )
    expected = "token id 399 is outside the model's vocabulary of 399; was it tokenised for another model?"
    assert message(check_tokens, [prefix], 399, 8) == f"{here}: {expected}"
    negative = write_prefix(tmp_path / "n", [[1, -2, 3, 4]], dtype=np.int32)
    assert "token id -2 is outside" in message(check_tokens, [negative], 400, 2)


# Datasets


def build(prefixes: list[str], cache: Path, *, weights=None, num_samples=64, seed=1, pad_id=None) -> Dataset:
    return build_gpt_dataset(prefixes, weights, 8, num_samples, seed, 0, pad_id, 1000, cache)


def samples(dataset: Dataset, count: int | None = None) -> list[list[int]]:
    return [dataset[i]["tokens"].tolist() for i in range(count or len(dataset))]


@pytest.fixture
def counted(tmp_path) -> str:
    """200 tokens that all differ, in documents of 20."""
    return write_prefix(tmp_path / "counted", [list(range(i, i + 20)) for i in range(1, 201, 20)])


def test_items(counted, tmp_path):
    item = build([counted], tmp_path / "cache")[3]
    assert set(item) == {"tokens", "labels", "loss_mask", "position_ids"}
    assert all(value.shape == (8,) for value in item.values())
    assert item["tokens"].dtype == item["labels"].dtype == torch.int64
    assert item["loss_mask"].dtype == torch.float32
    assert item["loss_mask"].tolist() == [1.0] * 8
    assert item["tokens"][1:].tolist() == item["labels"][:-1].tolist()


def test_epochs_cover_all_data_in_a_seeded_order(counted, tmp_path):
    cache = tmp_path / "cache"
    data = build([counted], cache, num_samples=70)
    assert len(data) >= 70
    assert {token for sample in samples(data) for token in sample} >= set(range(1, 200))
    assert samples(data) == samples(build([counted], cache, num_samples=70))
    assert samples(data) == samples(build([counted], tmp_path / "elsewhere", num_samples=70))
    assert samples(data) != samples(build([counted], cache, num_samples=70, seed=2))


def test_padding_is_masked_without_touching_tokens(tmp_path):
    prefix = write_prefix(tmp_path / "padded", [[5, 6, 1, 1, 7, 8, 1, 1, 9, 3, 4, 2, 2, 2, 2, 2, 0]])
    data = build([prefix], tmp_path / "cache", pad_id=1, num_samples=2)
    for i in range(2):
        item = data[i]
        assert item["loss_mask"].tolist() == [float(label != 1) for label in item["labels"]]
    assert sorted(token for sample in samples(data, 2) for token in sample).count(1) == 4
    all_counted = build([prefix], tmp_path / "cache", pad_id=0, num_samples=2)
    assert all(all_counted[i]["loss_mask"].all() for i in range(2)), "EOS as pad must still be learned"


def test_replaced_data_does_not_meet_a_stale_index(tmp_path):
    prefix = write_prefix(tmp_path / "p", [list(range(100))])
    build([prefix], tmp_path / "cache")
    write_prefix(tmp_path / "p", [list(range(500, 530))])
    data = build([prefix], tmp_path / "cache")
    assert {token for sample in samples(data) for token in sample} <= set(range(500, 530))


def test_killed_index_build_is_ignored(counted, tmp_path):
    cache = tmp_path / "cache"
    before = samples(build([counted], cache))
    (folder,) = cache.iterdir()
    torn = folder.rename(folder.parent / f".{folder.name}.killed")
    for file in torn.glob("*.npy"):
        file.write_bytes(b"")
    assert samples(build([counted], cache)) == before


@pytest.mark.parametrize(("weights", "share"), [([1.0, 3.0], 0.75), (None, 0.5)])
def test_blend(counted, tmp_path, weights, share):
    other = write_prefix(tmp_path / "other", [list(range(500, 700))])
    data = build([counted, other], tmp_path / "cache", weights=weights, num_samples=400)
    assert len(data) >= 400, "more epochs are drawn when one is not enough"
    drawn = samples(data, 400)
    assert sum(sample[0] >= 500 for sample in drawn) / 400 == pytest.approx(share, abs=0.01)
    assert drawn == samples(build([counted, other], tmp_path / "again", weights=weights, num_samples=400), 400)
    assert set(data[0]) == {"tokens", "labels", "loss_mask", "position_ids"}


def test_blend_of_many_small_datasets_does_not_run_dry(tmp_path):
    prefixes = [write_prefix(tmp_path / f"p{i}", [list(range(9))]) for i in range(12)]
    weights = [0.89] + [0.01] * 11
    for num_samples in (1, 7, 50):
        assert len(build(prefixes, tmp_path / "cache", weights=weights, num_samples=num_samples)) >= num_samples


def test_errors_of_weights(counted, tmp_path):
    assert message(build, [counted], tmp_path, weights=[1.0, 2.0]) == "data.weights=[1.0, 2.0]: 2 weights for 1 paths"
    expected = "data.weights=[1.0, 0.0]: every weight must be larger than 0"
    assert message(build, [counted, counted], tmp_path, weights=[1.0, 0.0]) == expected


# Batches


class Numbered(Dataset):
    """Sample i is full of i."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {
            "tokens": torch.full((4,), index),
            "labels": torch.full((4,), index + 1),
            "loss_mask": torch.ones(4),
            "position_ids": torch.arange(4),
        }


def steps(size: int, dp_size: int, *, global_batch: int = 8, micro: int = 2, consumed=0, workers=0) -> list[list[int]]:
    """Sample numbers of each step over all replicas, in the order replica, micro-batch, row."""
    count = global_batch // (micro * dp_size)
    per_rank = []
    for rank in range(dp_size):
        stream = batches(
            Numbered(size),
            micro_batch_size=micro,
            num_micro_batches=count,
            dp_rank=rank,
            dp_size=dp_size,
            consumed_samples=consumed,
            num_workers=workers,
        )
        rows = [batch["tokens"][:, 0].tolist() for batch in stream]
        assert all(len(row) == micro for row in rows)
        per_rank.append([list(chain(*rows[i : i + count])) for i in range(0, len(rows), count)])
    return [list(chain(*parts)) for parts in zip(*per_rank, strict=True)]


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_global_batches_do_not_depend_on_the_grid(dp_size):
    assert steps(43, dp_size) == [list(range(first, first + 8)) for first in range(0, 40, 8)]
    assert steps(43, dp_size, micro=1) == steps(43, dp_size)


def test_resume_continues_the_same_batches(counted, tmp_path):
    assert steps(43, 2, consumed=16) == steps(43, 2)[2:]
    assert steps(43, 4, consumed=16) == steps(43, 1)[2:]
    assert steps(7, 1) == []
    assert steps(40, 1, consumed=40) == []
    data = build([counted], tmp_path / "cache", num_samples=32)
    grid = {"micro_batch_size": 2, "num_micro_batches": 2, "dp_rank": 0, "dp_size": 1}
    whole = [batch["tokens"] for batch in batches(data, **grid)]
    rest = [batch["tokens"] for batch in batches(data, **grid, consumed_samples=12)]
    assert all(torch.equal(a, b) for a, b in zip(whole[6:], rest, strict=True))


def test_batch_content_workers_and_random_state(counted, tmp_path):
    data = build([counted], tmp_path / "cache", num_samples=16)
    grid = {"micro_batch_size": 2, "num_micro_batches": 1, "dp_rank": 1, "dp_size": 2}
    state = torch.get_rng_state()
    plain = list(batches(data, **grid))
    assert torch.equal(torch.get_rng_state(), state)
    assert {key: (value.shape, value.dtype) for key, value in plain[0].items()} == {
        "tokens": ((2, 8), torch.int64),
        "labels": ((2, 8), torch.int64),
        "loss_mask": ((2, 8), torch.float32),
    }
    for a, b in zip(plain, batches(data, **grid, num_workers=2), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_replica_number_is_checked():
    with pytest.raises(ValueError, match="dp_rank=2 is not in"):
        batches(Numbered(8), micro_batch_size=1, num_micro_batches=1, dp_rank=2, dp_size=2)


# Windows


def test_windows_follow_the_data(tmp_path):
    first = write_prefix(tmp_path / "a", [list(range(10)), list(range(10, 23))])
    second = write_prefix(tmp_path / "b", [list(range(100, 112))])
    got, counted = zip(*windows([first, second], seq_length=4, batch_size=4), strict=True)
    assert [tuple(learned.shape) for learned in counted] == [(4, 4), (2, 4)]
    assert all(learned.all() for learned in counted)
    assert [tuple(batch.shape) for batch in got] == [(4, 5), (2, 5)]
    assert got[0].dtype == torch.int64
    assert torch.cat(got).flatten().tolist() == [*range(20), *range(100, 110)]
    assert num_windows([first, second], 4) == 6


@pytest.mark.parametrize(("max_tokens", "count"), [(0, 6), (4, 1), (3, 1), (19, 4), (20, 5), (1000, 6)])
def test_windows_stop_at_max_tokens(tmp_path, max_tokens, count):
    prefixes = [write_prefix(tmp_path / name, [list(range(size))]) for name, size in (("a", 23), ("b", 12))]
    assert num_windows(prefixes, 4, max_tokens) == count
    assert sum(len(batch) for batch, _ in windows(prefixes, 4, 3, max_tokens)) == count


def test_windows_of_little_text(tmp_path):
    prefixes = [write_prefix(tmp_path / name, [list(range(size))]) for name, size in (("a", 1), ("b", 3))]
    ((batch, _),) = windows(prefixes, seq_length=8, batch_size=4)
    assert batch.tolist() == [[0, 1, 2]]
    assert num_windows(prefixes, 8) == 1
    assert "1 token, a prediction needs 2" in message(num_windows, prefixes[:1], 8)


def test_text_to_batch(prepare, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(LINES))
    prefixes = prepare(tmp_path / "a.txt")
    check_tokens(prefixes, len(tokenizer), 32)
    ids = (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer))
    data = build_gpt_dataset(prefixes, None, 32, 20, 1, *ids, tmp_path / "cache")
    batch = next(batches(data, micro_batch_size=4, num_micro_batches=1, dp_rank=0, dp_size=1))
    stream = tokenizer.decode(read_tokens(open_tokens(prefixes[0]), 0, num_tokens(open_tokens(prefixes[0]))))
    assert all(tokenizer.decode(row) in stream for row in batch["tokens"])
