"""Each file is read as what it is; lines end where they end; what is left out is said."""

import bz2
import csv
import gzip
import json
import lzma
import os
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pyarrow
import pytest
from pyarrow import parquet

from ee_scale.data.corpora import open_source
from ee_scale.data.folders import find_files
from ee_scale.data.labelled import read_labelled
from ee_scale.errors import UserError
from ee_scale.evaluation.tags import tagged_windows
from ee_scale.inference.prompts import read_prompts

# Ends of lines that Unicode knows, and a file's mark: all of them stand inside of texts.
ODD = "one\u2028two\u2029three\u0085four\x0cfive\x1csix\x0bseven \ufeff"
RECORDS = [{"text": ODD, "n": [1.5, {"a": "]}"}]}, {"text": "second \U0001f642", "n": None}, {"text": "", "n": 0}]


def texts(source: Path | str, text_key: str = "text", **options) -> list[str]:
    found: list[str] = []
    for piece in open_source(str(source), text_key, **options).pieces():
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


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize("pack", [None, gzip.compress, bz2.compress, lzma.compress, zstd])
@pytest.mark.parametrize("name", LAYOUTS)
def test_records_in_every_layout(tmp_path, name, pack):
    ends = {None: "", gzip.compress: ".gz", bz2.compress: ".bz2", lzma.compress: ".XZ", zstd: ".zst"}
    path = tmp_path / (name + ends[pack])
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
    (tmp_path / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith("gz") else data)
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
    for name in ("README.md", "loader.py", "dataset_infos.json", "x.feather", "picture.png", ".hidden.jsonl"):
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
        "left out (.feather files are not read; write it as .jsonl first (pandas: read_feather(...).to_json("
        "'data.jsonl', orient='records', lines=True))): x.feather",
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
    for name in ("README.md", "train.feather"):
        (tmp_path / name).write_text("x")
    said = message(open_source, str(tmp_path), "text")
    assert "left out (.feather files are not read; write it as .jsonl first" in said


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.parquet", b"PAR1", "cannot read (Parquet file size is 4 bytes"),
        ("a.parquet", b"", "cannot read (Parquet file size is 0 bytes)"),
        ("a.parquet", b'{"text": "a"}', "cannot read (Parquet magic bytes not found"),
        ("a.parquet.gz", b"x", "a .parquet file is packed inside; unpack the .gz around it"),
        ("a.feather", b"x", ".feather files are not read; write it as .jsonl first"),
        ("a.jsonl", b"PAR1\0\0", "begins as a .parquet file does, whatever its name says; call it .parquet"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "begins as a .gz file does, whatever its name says; call it .gz"),
        ("a.txt", zstd(b"text"), "begins as a .zst file does, whatever its name says; call it .zst"),
        ("a.jsonl.zst", b"no zstd", "cannot read (ZSTD decompress failed"),
        ("a.jsonl.zst", zstd(b'{"text": "a"}\n' * 9999)[:-9], "cannot read (Truncated compressed stream)"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 9999, mtime=0)[:-9],
            "cannot read (Compressed file ended before",
        ),
        ("a.tar.gz", b"x", ".tar files are not read; unpack it first"),
        ("a.jsonl.gz", b"no gzip", "cannot read (Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-12], "cannot read ("),
        ("a.txt.bz2", bz2.compress(Random(0).randbytes(9999))[:-50], "cannot read ("),
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
        ("a.txt", b"caf\xe9", "line 1: not UTF-8 text (byte 0xe9: unexpected end of data), at byte 3; data.errors=rep"),
        (
            "a.txt",
            b"x\n" * 35_000 + b"\xff",
            "line 35001: not UTF-8 text (byte 0xff: invalid start byte), at byte 70000",
        ),
        # The first chunk ends within a character, which the next one does not end.
        (
            "a.txt",
            b"\n" * 65_535 + b"\xc3" + b"x",
            "line 65536: not UTF-8 text (byte 0xc3: invalid continuation byte), at",
        ),
        ("a.txt", b"\xef\xbb\xbfcaf\xe9", "line 1: not UTF-8 text (byte 0xe9: unexpected end of data), at byte 6"),
        (
            "a.bin.txt",
            b"\x7fELF\0\0",
            "line 1: byte 4 is NUL, so this is no text; data.errors=replace reads U+FFFD there",
        ),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\xff"}',
            "line 2: not UTF-8 text (byte 0xff: invalid start byte), at byte 24",
        ),
        ("a.jsonl", b'{"text": "a"}\r\n{"text": "\0"}', "line 2: byte 25 is NUL"),
        (
            "a.json",
            b'[{"text": "a"},\n{"text": "\xff"}]',
            "line 2: not UTF-8 text (byte 0xff: invalid start byte), at byte 26",
        ),
        ("a.csv", b"text\na\nb\xe9,\n", "line 3: not UTF-8 text (byte 0xe9: invalid continuation byte), at byte 8"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "b\\u0000"}',
            "line 2: field 'text': character 1 is NUL; data.errors=replace",
        ),
    ],
)
def test_what_cannot_be_read(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    assert message(texts, tmp_path / name).startswith(f"data.path='{tmp_path / name}'")
    assert said in message(texts, tmp_path / name)


def test_bad_bytes_may_be_replaced(tmp_path):
    bad = b"a\xffb\0c \xe2\x82"
    for name, content, wanted in (
        ("a.txt", b"\xef\xbb\xbf" + bad + b"\r\n", "a\ufffdb\ufffdc \ufffd\r\n"),
        ("a.csv", b"text\n" + bad + b"\r\n", "a\ufffdb\ufffdc \ufffd"),
        ("a.json", b'[{"text": "a\xffb\\u0000c"}]', "a\ufffdb\ufffdc"),
        ("a.jsonl", b'{"text": "a\xffb\\u0000c"}', "a\ufffdb\ufffdc"),
    ):
        (tmp_path / name).write_bytes(content)
        assert texts(tmp_path / name, errors="replace") == [wanted]
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a\xff", "label": "x"}')
    assert read_labelled(tmp_path / "b.jsonl", errors="replace")[0].text == "a\ufffd"
    assert "data.errors=replace" in message(read_labelled, tmp_path / "b.jsonl")


def test_line_ends_stay_as_they_are(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert texts(tmp_path / "a.txt") == ["one\r\ntwo\rthree\n"]
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbftext,n\r\n"one\r\ntwo",1\r\n')
    assert texts(tmp_path / "a.csv") == ["one\r\ntwo"]


# -- parquet ----------------------------------------------------------------------------------------------------------


def write_parquet(path: Path, columns: dict, **options) -> Path:
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def raw_strings(*values: bytes) -> pyarrow.Array:
    """A string column of any bytes, as careless writers make them."""
    return pyarrow.Array.from_buffers(
        pyarrow.string(),
        len(values),
        pyarrow.array(values, pyarrow.binary()).buffers(),
    )


def test_rows_of_parquet(tmp_path):
    rows = [f"row {i}" for i in range(1000)] + [ODD]
    columns = {"n": range(len(rows)), "text": rows, "label": [i % 2 for i in range(len(rows))]}
    path = write_parquet(tmp_path / "a.PARQUET", columns, row_group_size=300)
    assert texts(path) == texts(tmp_path) == rows
    source = open_source(str(path), "text")
    assert sum(piece.num_bytes for piece in source.pieces()) == source.num_bytes
    examples = read_labelled(path)
    assert [example.text for example in examples] == rows
    assert {example.label for example in examples} == {"0", "1"}
    assert read_prompts(
        SimpleNamespace(prompt=None, prompts=str(write_parquet(tmp_path / "p.parquet", {"prompt": ["a"]})))
    )


def test_a_file_is_not_read_at_once(tmp_path):
    """Row groups come one after the other: the first rows are there although the last group is torn."""
    path = write_parquet(
        tmp_path / "a.parquet", {"text": [os.urandom(50).hex() for _ in range(2000)]}, row_group_size=500
    )
    column = parquet.ParquetFile(path).metadata.row_group(3).column(0)
    content = bytearray(path.read_bytes())
    place = column.data_page_offset
    content[place : place + 40] = b"\xff" * 40
    path.write_bytes(content)
    pieces = open_source(str(path), "text").pieces()
    assert [next(pieces).starts_document for _ in range(1000)]
    assert "cannot read (" in message(lambda: list(pieces))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"body": ["a"]}, "row 1: no field 'text' (fields: body); set data.text_key"),
        ({"text": ["a", None]}, "row 2: field 'text' is not text but NoneType"),
        ({"text": [1]}, "row 1: field 'text' is not text but int"),
        ({"text": ["a", "b\0"]}, "row 2: field 'text': character 1 is NUL; data.errors=replace"),
        (
            {"text": raw_strings(b"a", b"b\xff")},
            "row 2: field 'text': not UTF-8 text (byte 0xff: invalid start byte), at byte 1",
        ),
    ],
)
def test_errors_of_parquet(tmp_path, columns, said):
    path = write_parquet(tmp_path / "a.parquet", columns)
    assert message(texts, path).startswith(f"data.path='{path}' ")
    assert said in message(texts, path)


def test_bad_bytes_of_parquet_may_be_replaced(tmp_path):
    parts = pyarrow.StructArray.from_arrays([raw_strings(b"a\xff", b"user")], ["role"])
    columns = {
        "text": raw_strings(b"b\xff", b"c\0"),
        "n": [1, 2],
        "deep": pyarrow.ListArray.from_arrays([0, 1, 2], parts),
    }
    assert texts(write_parquet(tmp_path / "a.parquet", columns), errors="replace") == ["b\ufffd", "c\ufffd"]


def test_a_cut_off_parquet_in_a_folder_is_not_left_out(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"text": ["a"]})
    whole = write_parquet(tmp_path / "b.parquet", {"text": ["b"]}).read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[:-20])
    assert f"data.path='{tmp_path / 'b.parquet'}': cannot read (" in message(texts, tmp_path)


def test_columns_of_one_name_in_parquet_are_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], ["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    assert message(texts, tmp_path / "a.parquet").endswith("two columns of the name 'text'")


def test_folders_are_read_in_one_order(tmp_path):
    for name in ("b/2.parquet", "a/1.parquet", "b/10.parquet", "c.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_parquet(tmp_path / name, {"text": [name]})
    (tmp_path / "b" / "x.jsonl.zst").write_bytes(zstd(b'{"text": "x"}'))
    assert texts(tmp_path) == ["a/1.parquet", "b/10.parquet", "b/2.parquet", "x", "c.parquet"]


def test_a_table_without_the_field_is_told_in_a_folder_of_tables(tmp_path):
    """Of `.json` and `.csv` files some are about the data; the conversations among them are data."""
    (tmp_path / "a.csv").write_text("prompt,completion\na,b\n")
    (tmp_path / "b.json").write_text('[{"messages": []}]')
    (tmp_path / "c.json").write_text('{"version": 3}')
    assert [path.name for path, _ in find_files(str(tmp_path), "text").files] == ["a.csv", "b.json"]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst"])
def test_without_pyarrow(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    said = message(texts, tmp_path / name)
    assert ": .parquet and .zst files need pyarrow: pip install 'ee-scale[data]' (" in said


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
