"""Labelled text: reading, labels, ids, batches on every grid; and the set made of docstrings."""

import importlib.util
import json
import sys
from collections import Counter
from itertools import combinations, islice, pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ee_scale.data.labelled import (
    Example,
    LabelledData,
    check_labels,
    encode,
    evaluation_batches,
    label_names,
    labelled_batches,
    read_labelled,
)
from ee_scale.errors import UserError

KEYS = ["attention_mask", "labels", "sample", "token_type_ids", "tokens"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0..w99 are the ids 4..103; [CLS] text [SEP], and a second text with type 1."""
    vocab = {name: i for i, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(100))])}
    pieces = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=pieces, model_input_names=inputs, **names)


def data_of(lengths: list[int], seq_length: int = 64) -> LabelledData:
    """Sample i is `lengths[i]` times the token i+1, type 1 from its second token on, label i; padded with 0."""
    return LabelledData(
        tokens=torch.cat([torch.full((n,), i + 1, dtype=torch.int32) for i, n in enumerate(lengths)]),
        token_types=torch.cat([(torch.arange(n) > 0).to(torch.int8) for n in lengths]),
        starts=torch.tensor([0, *lengths]).cumsum(0),
        labels=torch.arange(len(lengths)),
        pad_id=0,
        seq_length=seq_length,
    )


def message(call, *args, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Reading


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "a.jsonl",
            '\ufeff{"text": "one, \u2028two", "label": 1}\n\n{"text": "a \\"b\\" c", "label": "x", "n": [3]}\n',
        ),
        ("a.csv", '\ufefftext,n,label\r\n"one, \u2028two",0,1\r\n\r\n"a ""b"" c",0, x\r\n'),
        ("a.tsv", 'label\ttext\n1\tone, \u2028two\nx\ta "b" c\n'),
    ],
)
def test_formats(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    assert read_labelled(tmp_path / name) == [Example("one, \u2028two", None, "1"), Example('a "b" c', None, "x")]


def test_pairs_and_other_names(tmp_path):
    (tmp_path / "a.tsv").write_text('gold\tpremise\thypothesis\n0\t"open\tquote\n')
    found = read_labelled(tmp_path / "a.tsv", text_key="premise", label_key="gold", pair_key="hypothesis")
    assert found == [Example('"open', "quote", "0")]


def test_csv_text_over_lines(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"one\ntwo",0\n')
    assert read_labelled(str(tmp_path / "a.csv")) == [Example("one\ntwo", None, "0")]


def test_json_labels_and_torn_characters(tmp_path):
    rows = [r'{"text": "half \ud83d pair", "label": true}', '{"text": "b", "label": -3}', '{"text": "c", "label": "é"}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    found = read_labelled(tmp_path / "a.jsonl")
    assert [example.label for example in found] == ["true", "-3", "é"]
    assert found[0].text == "half ? pair"


GOOD = b'{"text": "a", "label": 0}\n'


@pytest.mark.parametrize(
    ("name", "content", "options", "parts"),
    [
        ("a.jsonl", None, {}, ["no such file"]),
        ("a.txt", b"a", {}, ["'.txt'", ".jsonl, .csv, .tsv"]),
        ("a.jsonl", b"", {}, ["no example in it"]),
        ("a.csv", b"text,label\n", {}, ["no example in it"]),
        ("a.jsonl", GOOD + b"\n{'text'}", {}, ["line 3", "not valid JSON", "column 2"]),
        ("a.jsonl", GOOD + b"[1]", {}, ["line 2", "not a JSON object but list"]),
        ("a.jsonl", GOOD + b'{"body": "a", "label": 0}', {}, ["line 2", "'text' (fields: body, label)", "g.text_key"]),
        ("a.jsonl", GOOD, {"label_key": "y"}, ["line 1", "no field 'y' (fields: label, text)", "set g.label_key"]),
        ("a.jsonl", GOOD, {"pair_key": "b"}, ["line 1", "no field 'b' (fields: label, text)", "set g.pair_key"]),
        ("a.csv", b"body,label\nx,1\n", {}, ["line 2", "no field 'text' (fields: body, label)", "set g.text_key"]),
        ("a.jsonl", b'{"text": " \\n", "label": 0}', {}, ["line 1", "field 'text' is empty"]),
        ("a.tsv", b"text\tb\tlabel\nx\t\t1\n", {"pair_key": "b"}, ["line 2", "field 'b' is empty"]),
        ("a.csv", b"text,label\nx, \n", {}, ["line 2", "field 'label' is empty"]),
        ("a.jsonl", b'{"text": 3, "label": 0}', {}, ["line 1", "field 'text' is not text but int"]),
        ("a.jsonl", b'{"text": "a", "label": 0.5}', {}, ["line 1", "field 'label'", "but float"]),
        ("a.jsonl", b'{"text": "a", "label": null}', {}, ["line 1", "field 'label'", "but NoneType"]),
        ("a.jsonl", GOOD + b'{"text": "\xff"}', {}, ["line 2", "not UTF-8", "0xff"]),
        ("a.csv", b"\xef\xbb\xbftext,label\n\n\xe9,1\n", {}, ["line 3", "not UTF-8", "0xe9"]),
        ("a.csv", b"text,label\na,b,0\n", {}, ["line 2", "3 values, the header names 2"]),
        ("a.tsv", b"text\tlabel\na\t0\nb\n", {}, ["line 3", "1 values, the header names 2"]),
        ("a.csv", b'text,label\n"a,0\nb,1\n', {}, ["not valid .csv"]),
    ],
)
def test_reading_errors(tmp_path, name, content, options, parts):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    text = message(read_labelled, tmp_path / name, fields="g", **options)
    assert text.startswith(f"g.path='{tmp_path / name}'")
    for part in parts:
        assert part in text


def test_a_folder_is_refused(tmp_path):
    (tmp_path / "a.csv").mkdir()
    assert message(read_labelled, tmp_path / "a.csv", fields="").startswith(f"data='{tmp_path / 'a.csv'}': cannot read")


# Labels


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["10", "9", "-1", "9"], ["-1", "9", "10"]),
        (["10", "9", "b", "B"], ["10", "9", "B", "b"]),
        (["true", "false"], ["false", "true"]),
        (["1.5", "1"], ["1", "1.5"]),
    ],
)
def test_label_order(labels, names):
    assert label_names([Example("a", None, label) for label in labels]) == names


def test_labels_are_checked():
    examples = [Example("a", None, label) for label in ("0", "1", "7", "5")]
    check_labels(["0", "1", "5", "7"], examples, "valid.csv")
    text = message(check_labels, ["0", "1"], examples, "valid.csv", fields="g")
    assert text == "g.path='valid.csv': label '5', '7' is not in the training data (2 classes: 0, 1)"
    text = message(check_labels, ["0"], examples[:1], "train.csv")
    assert text == "data.path='train.csv': 1 class (0), classification needs 2 or more"


# Token ids


def test_encode_single_texts(tokenizer):
    examples = [Example("w0 w1 oops", None, "b"), Example(" ".join(["w5"] * 50), None, "a")]
    data = encode(examples, tokenizer, ["a", "b"], 12)
    assert len(data) == 2
    assert data.tokens.tolist() == [2, 4, 5, 1, 3, 2, *[9] * 10, 3]
    assert data.lengths.tolist() == [5, 12]
    assert data.labels.tolist() == [1, 0]
    assert not data.token_types.any()
    batch = data.batch([0])
    assert batch["tokens"].tolist() == [[2, 4, 5, 1, 3, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]]


def test_encode_pairs(tokenizer):
    examples = [Example("w0 w1", "w2", "0"), Example("w1 " * 9, "w2 w2", "1")]
    data = encode(examples, tokenizer, ["0", "1"], 8)
    assert data.tokens.tolist() == [2, 4, 5, 3, 6, 3, 2, 5, 5, 5, 3, 6, 6, 3]  # the longer text is cut
    assert data.token_types.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1]


def test_encode_in_parts_and_without_types(tokenizer, monkeypatch):
    monkeypatch.setattr("ee_scale.data.labelled.ENCODE_AT_ONCE", 2)
    monkeypatch.setattr(tokenizer, "model_input_names", ["input_ids", "attention_mask"])
    data = encode([Example(f"w{i} " * (i + 1), "w9", "x") for i in range(5)], tokenizer, ["x"], 32)
    assert data.lengths.tolist() == [5, 6, 7, 8, 9]
    assert [data.tokens[start + 1].item() for start in data.starts[:-1]] == [4, 5, 6, 7, 8]
    assert data.token_types.shape == data.tokens.shape
    assert not data.token_types.any()


def test_encode_errors(tokenizer):
    one, pair = Example("w0", None, "a"), Example("w0", "w1", "a")
    assert "g.seq_length=2: the tokenizer adds 2" in message(encode, [one], tokenizer, ["a"], 2, fields="g")
    assert "seq_length=3: the tokenizer adds 3" in message(encode, [pair], tokenizer, ["a"], 3)
    assert encode([pair], tokenizer, ["a"], 4).lengths.tolist() == [4]
    bare = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.Split("\u200b", "removed")
    assert "no pad_token" in message(encode, [one], PreTrainedTokenizerFast(tokenizer_object=bare), ["a"], 8)
    padding = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="[UNK]")
    assert "makes no token" in message(encode, [Example("\u200b", None, "a")], padding, ["a"], 8)


# Batches


def seen(data: LabelledData, micro: int, count: int, dp: int, steps: int, **options) -> list[list[list[int]]]:
    """[step][micro-batch]: the samples of all replicas together, in the order of the ranks."""
    sizes = {"micro_batch_size": micro, "num_micro_batches": count, "dp_size": dp, "seed": 3} | options
    ranks = [list(islice(labelled_batches(data, dp_rank=rank, **sizes), steps * count)) for rank in range(dp)]
    rows = [[int(x) for rank in ranks for x in rank[i]["labels"]] for i in range(steps * count)]
    return [rows[i : i + count] for i in range(0, len(rows), count)]


def flat(found: list) -> list[int]:
    return [x for step in found for row in step for x in row]


def test_epochs_are_joined_and_nothing_is_lost():
    data = data_of([3] * 10)
    order = flat(seen(data, 4, 1, 1, 10))
    epochs = [order[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert sorted(range(10)) not in epochs


def test_order_depends_on_the_seed_alone():
    data = data_of([3] * 30)
    assert seen(data, 2, 2, 1, 9) == seen(data, 2, 2, 1, 9)
    assert seen(data, 2, 2, 1, 9) != seen(data, 2, 2, 1, 9, seed=4)
    torch.manual_seed(1)
    first = flat(seen(data, 2, 2, 1, 5))
    assert first == flat(seen(data, 1, 4, 1, 5)) == flat(seen(data_of([9] * 30), 4, 1, 1, 5))


@pytest.mark.parametrize(("dp", "micro", "count"), [(2, 1, 3), (2, 3, 2), (3, 2, 2), (4, 2, 1)])
def test_dealing(dp, micro, count):
    """Micro-batch m of all replicas is the m-th of one replica with larger ones; epochs end within steps here."""
    data = data_of([2] * 11)
    assert seen(data, micro, count, dp, 7) == seen(data, micro * dp, count, 1, 7)


def test_global_batch_larger_than_the_data():
    order = flat(seen(data_of([2] * 3), 4, 2, 2, 2))
    assert Counter(order[:30]) == {0: 10, 1: 10, 2: 10}


@pytest.mark.parametrize("consumed", [0, 1, 12, 24, 1001])
@pytest.mark.parametrize(("dp", "micro", "count"), [(1, 4, 3), (2, 2, 3), (3, 4, 1), (3, 1, 5)])
def test_resume_at_any_point_and_dp(consumed, dp, micro, count):
    data = data_of([2] * 7)
    whole = flat(seen(data, 1, 1, 1, consumed + 60))
    wanted = whole[consumed:][: 4 * micro * count * dp]
    assert flat(seen(data, micro, count, dp, 4, consumed_samples=consumed)) == wanted


def test_padding_and_masks():
    lengths = [1, 8, 9, 20]
    data = data_of(lengths, seq_length=20)
    for indices, length in (([0], 8), ([1, 0], 8), ([0, 2], 16), ([0, 1, 2, 3], 20)):
        batch = data.batch(indices)
        assert sorted(batch) == KEYS
        assert all(value.dtype == torch.int64 for value in batch.values())
        assert batch["labels"].tolist() == indices
        for row, i in enumerate(indices):
            rest = length - lengths[i]
            assert batch["tokens"][row].tolist() == [i + 1] * lengths[i] + [0] * rest
            assert batch["attention_mask"][row].tolist() == [1] * lengths[i] + [0] * rest
            assert batch["token_type_ids"][row].tolist() == [0] + [1] * (lengths[i] - 1) + [0] * rest


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dp_rank": 2}, "dp_rank=2"),
        ({"micro_batch_size": 0}, "micro_batch_size=0"),
        ({"num_micro_batches": 0}, "num_micro_batches=0"),
        ({"consumed_samples": -1}, "consumed_samples=-1"),
    ],
)
def test_bad_sizes_are_found_before_the_first_batch(changes, text):
    sizes = {"micro_batch_size": 1, "num_micro_batches": 1, "dp_rank": 0, "dp_size": 2}
    with pytest.raises(ValueError, match=text):
        labelled_batches(data_of([2]), **(sizes | changes))


def test_evaluation_sees_every_sample_once():
    lengths = [3, 30, 4, 30, 5, 12, 3]
    found = list(evaluation_batches(data_of(lengths), 3))
    assert [batch["labels"].tolist() for batch in found] == [[1, 3, 5], [4, 2, 0], [6]]
    assert [batch["tokens"].shape[1] for batch in found] == [32, 8, 8]


# The set made of docstrings


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "scripts" / "docstring_set.py"
    spec = importlib.util.spec_from_file_location("docstring_set", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


SHARED = "This very sentence stands in the sources of two packages."
COMMON = "Copied from file to file about the {}, number {}, see NumPy."


def write_package(site: Path, name: str, version: str, modules: int, thing: str) -> None:
    """Modules with a class, a method and a function each; the RECORD that an installer writes."""
    body = '''
class Thing:
    """{shared}"""
    def method(self):
        """The {name} way of folding the {thing} called {word}: np.fold,
        over   two lines.

        Args:
            x: is not taken.
        """
    async def waiting(self):
        """Waits until the {thing} called {word} is folded."""
    def short(self):
        """The {thing} is short."""
def function():
    """{common}"""
raise RuntimeError("nobody may import this")
'''
    package = site / name
    (package / "tests").mkdir(parents=True)
    files = [f"{name}/tests/test_x.py", f"{name}/broken.py", f"{name}/gone.py"]
    (package / "tests" / "test_x.py").write_text('def f():\n    """A docstring of a test, which is long enough."""\n')
    (package / "broken.py").write_text("def f(:\n")
    for i in range(modules):
        word = "".join(chr(97 + int(digit)) for digit in str(i))
        text = body.format(shared=SHARED, name=name.title(), thing=thing, word=word, common=COMMON.format(thing, i % 3))
        (package / f"m{i}.py").write_text(text)
        files.append(f"{name}/m{i}.py")
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


@pytest.fixture
def site(tmp_path) -> Path:
    write_package(tmp_path / "site", "numpy", "1.0", 60, "sheet")
    write_package(tmp_path / "site", "sympy", "2.0", 50, "root")
    write_package(tmp_path / "site", "unknown", "3.0", 9, "cloth")
    (tmp_path / "lib" / "json").mkdir(parents=True)
    (tmp_path / "lib" / "json" / "a.py").write_text('def f():\n    """A sentence on the standard library of Python."""')
    (tmp_path / "lib" / "site-packages").mkdir()
    (tmp_path / "lib" / "site-packages" / "b.py").write_text('def f():\n    """This one is installed, not standard."""')
    return tmp_path / "site"


@pytest.fixture
def packages(script, site):
    return script.find_packages(site, site.parent / "lib")


def test_packages_and_their_files(packages):
    assert [(package.label, len(package.files)) for package in packages] == [
        ("numpy", 61),
        ("python", 1),
        ("sympy", 51),
    ]
    assert [package.version for package in packages][::2] == ["1.0", "2.0"]
    assert [name for name, _ in packages[1].files] == ["json/a.py"]


def test_no_file_and_no_text_on_two_sides(script, packages):
    splits = script.build(packages, 2, 1000)
    assert list(splits) == ["train", "valid", "test"]
    rows = [row for found in splits.values() for row in found]
    texts = Counter(script.fingerprint(row.text) for row in rows)
    assert max(texts.values()) == 1
    # Two methods per file; the text in both packages is gone, the one in all files of a package is there once.
    assert Counter(row.label for row in rows) == {"numpy": 121, "sympy": 101}
    modules = [{row.module for row in found} for found in splits.values()]
    assert all(modules)
    assert all(one.isdisjoint(other) for one, other in combinations(modules, 2))
    assert len(modules[0]) > 2 * len(modules[1] | modules[2])


def test_names_are_masked_in_all_texts(script, packages):
    rows = [row for found in script.build(packages, 2, 1000).values() for row in found]
    texts = {row.text for row in rows if row.module == "numpy/m12.py"}
    assert texts == {
        "The pkg way of folding the sheet called bc: pkg.fold, over two lines.",
        "Waits until the sheet called bc is folded.",
    }
    assert sum("see pkg." in row.text for row in rows) == 2
    assert not any("py" in row.text.lower() for row in rows)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("PyTorch, torch_dtype and TorchScript", "pkg, pkg_dtype and pkgScript"),
        ("np.array, Np; input snap unp", "pkg.array, pkg; input snap unp"),
        ("scikit_learn scikit learn sklearn's", "pkg pkg pkg's"),
        ("RichHandler enriched richer rich", "pkgHandler enriched richer pkg"),
        ("pandas stay where they are not chosen", "pandas stay where they are not chosen"),
    ],
)
def test_name_pattern(script, text, wanted):
    assert script.name_pattern(["torch", "numpy", "scikit-learn", "rich"]).sub(script.MARK, text) == wanted


def test_duplicates(script):
    rows = [
        script.Row("Same text, 1.", "a", "m1"),
        script.Row("same text 2", "a", "m2"),
        script.Row("In both", "a", "m1"),
        script.Row("in both!", "b", "m"),
        script.Row("Only b", "b", "m"),
    ]
    assert {row.text for row in script.distinct(rows)} == {"Same text, 1.", "Only b"}
    assert {row.text for row in script.distinct(rows[:2])} == {"Same text, 1."}


def test_texts_of_a_source(script):
    source = f'''
def a():
    """Args:
        x: is no prose"""
def b():
    """{"word " * 200}"""
def c():
    """{"x" * 500}"""
def d(): pass
class E:
    """One
       paragraph.

       Two."""
'''
    found = list(script.texts(source.encode()))
    assert found == [("word " * 80).strip(), "x" * 400, "One paragraph. Two."]
    assert list(script.texts(b"a = \xff")) == list(script.texts(b"a\0")) == []


@pytest.mark.parametrize(
    "section",
    [
        "Parameters\n----------\nx : int",
        "  Returns:\n  x",
        ":param x: y",
        ":return: y",
        ".. versionadded:: 2",
        ">>> f()",
        "@param x: y",
        "<!-- internal -->",
    ],
)
def test_prose_ends_with_the_first_section(script, section):
    """A role at the start of a line, a colon and a dash are prose."""
    prose = "Note that\n:class:`.X` is: this\nargs - or that\n\nmore"
    source = f"def f():\n    '''{prose}\n\n{section}\n\nrest'''"
    assert list(script.texts(source.encode())) == [" ".join(prose.split())]


def test_set_is_balanced_and_deterministic(script, packages):
    splits = script.build(packages, 2, 8)
    assert Counter(row.label for row in splits["train"]) == {"numpy": 8, "sympy": 8}
    assert max(Counter(row.label for row in splits["valid"] + splits["test"]).values()) <= 4
    assert len({row.module for row in splits["train"]}) > 10  # 16 texts from all over
    many = script.build(packages, 2, 50)["train"]
    assert sum(one.label != other.label for one, other in pairwise(many)) > 30  # shuffled
    assert splits == script.build(packages[::-1], 2, 8)
    with pytest.raises(SystemExit, match="classes=4: docstrings of 3 packages"):
        script.build(packages, 4, 8)


@pytest.fixture
def run(script, site, monkeypatch, capsys):
    """run(*arguments): what is printed."""
    monkeypatch.setattr(script.sysconfig, "get_path", lambda name: str(site if name == "purelib" else site / "../lib"))

    def call(*arguments: str) -> str:
        script.main(list(arguments))
        return capsys.readouterr().out.replace("\n", "")

    return call


def test_folder_is_whole_cached_and_replaced(run, script, site, tmp_path, monkeypatch):
    out = tmp_path / "sets" / "docs"
    out.mkdir(parents=True)  # an empty folder is as good as none
    arguments = [f"out={out}", "classes=2", "per_class=20"]
    assert "40 train" in run(*arguments)
    assert sorted(path.name for path in out.iterdir()) == ["info.json", "test.jsonl", "train.jsonl", "valid.jsonl"]
    assert [path.name for path in out.parent.iterdir()] == ["docs"]
    info = json.loads((out / "info.json").read_text())
    assert info["counts"]["train"] == {"numpy": 20, "sympy": 20}
    assert info["versions"]["sympy"] == "2.0"
    assert label_names(read_labelled(out / "valid.jsonl")) == ["numpy", "sympy"]
    before = (out / "train.jsonl").stat().st_ino
    assert "there already" in run(*arguments)
    assert (out / "train.jsonl").stat().st_ino == before
    assert "20 train" in run(arguments[0], "classes=2", "per_class=10")
    (site / "sympy-2.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: sympy\nVersion: 2.1\n")
    assert "20 train" in run(arguments[0], "classes=2", "per_class=10")
    assert json.loads((out / "info.json").read_text())["versions"]["sympy"] == "2.1"
    (out / "test.jsonl").unlink()
    assert "20 train" in run(arguments[0], "classes=2", "per_class=10")

    def fail(*_, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(script.json, "dumps", fail)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments)
    assert len(list(out.iterdir())) == 4  # the old set, whole


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "out.*usage"),
        (["out=x", "classes=many"], "many.*usage"),
        (["out=x", "clases=3"], "clases.*usage"),
        (["out=x", "per_class=0"], "per_class=0"),
        (["out=x", "classes=1"], "classes=1"),
    ],
)
def test_bad_arguments(run, arguments, text):
    with pytest.raises(SystemExit, match=text):
        run(*arguments)


@pytest.mark.parametrize(
    "files",
    [
        {"thesis.txt": ""},
        {"info.json": '{"format": 1, "counts": {}}', "thesis.txt": ""},
        {"info.json": '{"format": 1}'},
        {"info.json": "[]"},
    ],
)
def test_other_peoples_folder_is_left_alone(run, tmp_path, files):
    (tmp_path / "mine").mkdir()
    for name, content in files.items():
        (tmp_path / "mine" / name).write_text(content)
    with pytest.raises(SystemExit, match="not a set of this script"):
        run(f"out={tmp_path / 'mine'}", "classes=2")
    assert {path.name for path in (tmp_path / "mine").iterdir()} == set(files)
