"""Each file is read as what it is; lines end where they end; what is left out is said."""

import bz2
import csv
import gzip
import json
import lzma
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from ee_scale.data.corpora import open_source
from ee_scale.data.labelled import read_labelled
from ee_scale.errors import UserError
from ee_scale.evaluation.tags import tagged_windows
from ee_scale.inference.prompts import read_prompts

# Ends of lines that Unicode knows, and a file's mark: all of them stand inside of texts.
ODD = "one\u2028two\u2029three\u0085four\x0cfive\x1csix\x0bseven \ufeff"
RECORDS = [{"text": ODD, "n": [1.5, {"a": "]}"}]}, {"text": "second \U0001f642", "n": None}, {"text": "", "n": 0}]


def texts(source: Path | str, text_key: str = "text") -> list[str]:
    found: list[str] = []
    for piece in open_source(str(source), text_key).pieces():
        if piece.starts_document:
            found.append("")
        found[-1] += piece.text
    return found


def message(call, *args, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


LAYOUTS = {
    "a.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in RECORDS),
    "b.JSONL": "\r\n\r\n".join(json.dumps(row) for row in RECORDS) + "\r\n",
    "c.ndjson": "\ufeff" + "\n".join(json.dumps(row, ensure_ascii=False) for row in RECORDS),
    "d.json": json.dumps(RECORDS, ensure_ascii=False),
    "e.json": "\ufeff \n" + json.dumps(RECORDS, indent=2) + "\n",
    "f.json": "\n".join(json.dumps(row, ensure_ascii=False) for row in RECORDS),
    "g.Json": "\n".join(json.dumps(row, indent=1) for row in RECORDS),
}


@pytest.mark.parametrize("pack", [None, gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("name", LAYOUTS)
def test_records_in_every_layout(tmp_path, name, pack):
    path = tmp_path / (name + {None: "", gzip.compress: ".gz", bz2.compress: ".bz2", lzma.compress: ".XZ"}[pack])
    content = LAYOUTS[name].encode()
    path.write_bytes(pack(content) if pack else content)
    wanted = [row["text"] for row in RECORDS]
    assert texts(path) == wanted
    assert texts(path.parent) == wanted


def test_a_list_longer_than_what_is_read_at_once(tmp_path):
    rows = [{"text": f"{i} " * (i % 700)} for i in range(1500)] + [{"text": "x" * 300_000}, {"text": "end"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert texts(tmp_path / "a.json") == [row["text"] for row in rows]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
def test_columns_of_any_length(tmp_path, name):
    long = "word " * 40_000
    rows = [["id", "text"], ["1", long], ["2", "b\u2028c"], ["3", "ä"]]
    content = (
        "\ufeff" + "".join("\t".join(row) + "\r\n" for row in rows)
        if "tsv" in name
        else _csv([*rows, ["4", 'x,"y"\nz']])
    )
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    wanted = [row[1] for row in rows[1:]] + ([] if "tsv" in name else ['x,"y"\nz'])
    assert texts(tmp_path / name) == wanted
    labelled = read_labelled(tmp_path / name, label_key="id")
    assert [example.text for example in labelled] == wanted


def _csv(rows: list[list[str]]) -> str:
    import io

    stream = io.StringIO(newline="")
    csv.writer(stream).writerows(rows)
    return "\ufeff" + stream.getvalue()


def test_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,label,text\na,b,c\n")
    assert message(read_labelled, tmp_path / "a.csv").endswith("line 1: the header names 'text' twice")


def test_columns_without_a_name_may_be_several(tmp_path):
    """As spreadsheets write them."""
    (tmp_path / "a.csv").write_text(",text,,\n0,a,,\n")
    assert texts(tmp_path / "a.csv") == ["a"]


def test_a_file_of_two_names_is_read_once(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jsonl").write_text('{"text": "a"}')
    (tmp_path / "latest.jsonl").symlink_to("sub/a.jsonl")
    (tmp_path / "twice").symlink_to("sub")
    assert texts(tmp_path) == ["a"]
    told = [line.partition(": ")[2] for line in open_source(str(tmp_path), "text").told]
    assert told == ["read as JSON lines: latest.jsonl", "left out (the same file again, by a link): a.jsonl, a.jsonl"]


def test_what_a_folder_holds_is_said(tmp_path):
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (folder / "sub").mkdir(parents=True)
    elsewhere.mkdir()
    record = json.dumps({"text": "%s"})
    for name in ("a.jsonl", "b.JSONL", "c.ndjson", "sub/d.json"):
        (folder / name).write_text(record % Path(name).stem)
    (folder / "e.jsonl.gz").write_bytes(gzip.compress((record % "e").encode()))
    (folder / "f.txt").write_text("f")
    (elsewhere / "g.jsonl").write_text(record % "g")
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(folder)
    (folder / "lost.jsonl").symlink_to(tmp_path / "nowhere")
    for name in ("README.md", "loader.py", "dataset_infos.json", "x.parquet", "picture.png", ".hidden.jsonl"):
        (folder / name).write_text('{"splits": 3}')
    source = open_source(str(folder), "text")
    assert texts(folder) == ["a", "b", "c", "e", "f", "g", "d"]
    here = f"data.path='{folder}': "
    assert {line.removeprefix(here) for line in source.told} == {
        "read as JSON lines: a.jsonl, b.JSONL, c.ndjson, e.jsonl.gz, g.jsonl",
        "read as text: f.txt",
        "read as JSON: d.json",
        "left out (hidden): .hidden.jsonl",
        "left out (about the data or its loader, beside data): README.md, loader.py",
        "left out (its first record has no text 'text'): dataset_infos.json",
        "left out (.parquet files are not read; write it as .jsonl first (pandas: read_parquet(...).to_json("
        "'data.jsonl', orient='records', lines=True))): x.parquet",
        "left out (no kind of text that is known): picture.png",
        "left out (a link to nothing): lost.jsonl",
        "left out (a link to a folder that it lies in): round",
    }


def test_a_folder_of_prose_and_code_is_text(tmp_path):
    for name in ("notes.md", "code.py", "b.rst", "package.json"):
        (tmp_path / name).write_text('{"name": "x"}')
    assert len(texts(tmp_path)) == 3
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "LICENSE.txt").write_text("about")
    assert len(texts(tmp_path)) == 3


def test_a_folder_of_what_cannot_be_read_names_it(tmp_path):
    for name in ("README.md", "train.parquet"):
        (tmp_path / name).write_text("x")
    said = message(open_source, str(tmp_path), "text")
    assert "left out (.parquet files are not read; write it as .jsonl first" in said


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.parquet", b"PAR1", ".parquet files are not read; write it as .jsonl first"),
        ("a.jsonl.zst", b"x", ".zst files are not read; unpack it first (zstd -d)"),
        ("a.tar.gz", b"x", ".tar files are not read; unpack it first"),
        ("a.jsonl.gz", b"no gzip", "cannot read (Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-12], "cannot read ("),
        ("a.txt.bz2", bz2.compress(os.urandom(9999))[:-50], "cannot read ("),
        ("a.txt.xz", lzma.compress(b"text" * 99)[:-30], "cannot read ("),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "UTF-16 text; write it as UTF-8 first"),
        ("a.json", b'[{"text": "a"}, {"text": 3}]', "line 1: field 'text' is not text but int"),
        ("a.json", b'[{"text": "a"},\n 7]', "line 2: not a JSON object but int"),
        ("a.json", b'[{"text": "a"},\n {"text": "b"}', "line 2: not valid JSON (the list has no end)"),
        ("a.json", b'{"text": "a"}\n{"text": }', "line 2: not valid JSON (Expecting value: column 10)"),
        ("a.json", b'[{"text": "a"}] more', "line 1: not valid JSON (text behind the end of the list)"),
        ("a.json", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "line 1: not valid JSON (Exceeds the limit"),
        ("a.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "line 1: not valid JSON (Exceeds the limit"),
        ("a.json", b'{"data": [{"text": "a"}]}', "line 1: no field 'text' (fields: data); set data.text_key"),
        ("a.csv", b"a,b\n1,2\n", "line 2: no field 'text' (fields: a, b); set data.text_key"),
        ("a.txt", b"caf\xe9", "not UTF-8 text (byte 0xe9: unexpected end of data), at byte 3"),
        ("a.txt", b"x" * 70_000 + b"\xff", "not UTF-8 text (byte 0xff: invalid start byte), at byte 70000"),
        ("a.bin.txt", b"\x7fELF\0\0", "byte 4 is NUL, so this is no text"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    assert message(texts, tmp_path / name).startswith(f"data.path='{tmp_path / name}'")
    assert said in message(texts, tmp_path / name)


def test_labelled_data_in_every_layout(tmp_path):
    rows = [{"text": ODD, "label": i % 2} for i in range(3)]
    for name, content in (
        ("a.ndjson", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)),
        ("a.json", json.dumps(rows)),
        ("A.JSONL", "\n".join(json.dumps(row) for row in rows)),
    ):
        (tmp_path / name).write_text(content)
        assert [example.text for example in read_labelled(tmp_path / name)] == [ODD] * 3
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.ndjson").read_bytes()))
    assert [example.label for example in read_labelled(tmp_path / "b.jsonl.gz")] == ["0", "1", "0"]


def test_tags_in_every_layout(tmp_path):
    class Letters:
        eos_token_id = 0

        def __call__(self, text, **_):
            return SimpleNamespace(input_ids=[ord(letter) for letter in text])

    rows = [{"text": ODD, "tag": "a"}, {"text": "more", "tag": "b"}]
    for name in ("a.json", "a.ndjson", "a.JSONL"):
        content = json.dumps(rows) if name == "a.json" else "\n".join(json.dumps(row) for row in rows)
        (tmp_path / name).write_text(content)
        windows = tagged_windows([str(tmp_path / name)], Letters(), "text", "tag", 512)
        assert {window.tag: len(window.tokens) for window in windows} == {"a": len(ODD) + 1, "b": 5}
    (tmp_path / "a.txt").write_text("x")
    assert "is read as text; tags are fields" in message(
        tagged_windows, [str(tmp_path / "a.txt")], Letters(), "text", "tag", 8
    )


def test_prompts_end_with_lines(tmp_path):
    def prompts(name: str, content: str) -> list[str]:
        (tmp_path / name).write_bytes(content.encode())
        return read_prompts(SimpleNamespace(prompt=None, prompts=str(tmp_path / name)))

    assert prompts("a.txt", f"\ufefffirst\r\n\n{ODD}\n last \n") == ["first", ODD, " last "]
    rows = "\n".join(json.dumps({"prompt": text}, ensure_ascii=False) for text in ("first", ODD))
    assert prompts("a.jsonl", "\ufeff" + rows) == prompts("a.ndjson", rows) == ["first", ODD]
    assert prompts("a.json", json.dumps([{"prompt": ODD}])) == [ODD]
    assert "line 2 is no JSON object with a field 'prompt'" in message(prompts, "a.jsonl", '{"prompt": "a"}\n{"q": 1}')
    assert "line 1: not valid JSON" in message(prompts, "b.jsonl", "{oops}")
    assert "is NUL" in message(prompts, "b.txt", "a\0b")
