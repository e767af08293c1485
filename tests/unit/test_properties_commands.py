"""Properties of what reads command lines, and data: a value, or one line that says why not."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from helpers.hostile import DEEP, as_json, damaged, examples, json_files, mutated, refused
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ee_scale.cli.main import main
from ee_scale.config.compose import compose_config, known_keys, to_yaml
from ee_scale.config.schema import VERBS
from ee_scale.data.corpora import file_pieces
from ee_scale.data.labelled import read_labelled
from ee_scale.data.readers import file_kind

KEYS = {verb: known_keys(schema) for verb, schema in VERBS.items()}
NEEDED = {"tune": ["model=tiny", "data=python"], "supernet": ["model=tiny", "data=python"]}
ODD_WORDS = (
    *("", "null", "nan", "inf", "-1", "0", "1e999", "1" * 400, "true", "[", "[]", "[[]]", "{", "{}", "{a:1}", "'", '"'),
    *(
        "${",
        "${x}",
        "${out}",
        "${oc.env:HOME}",
        "[1,2",
        "a,b",
        "a=b",
        "=",
        "~",
        "#",
        "\\",
        "\ud800",
        "../..",
        "x" * 600,
    ),
    *("x" * 600, "[1,-1]", "[0.5,1e400]", "[nan]", "é", "\n", "\x00", "choice(1,2)", "range(1,9)", "int(x)"),
)
values = st.sampled_from(ODD_WORDS) | st.text(max_size=6) | st.text("[]{}(),:'\"$\\ ", max_size=12)


@st.composite
def command_lines(draw: Any) -> tuple[str, list[str]]:
    verb = draw(st.sampled_from(sorted(VERBS)))
    key = draw(st.sampled_from([*KEYS[verb], "nothing", "", "+x", "~out", "++out", "a.b", "prompt"]))
    word = draw(st.sampled_from((f"{key}=", f"+{key}=", f"--{key}=", f"{key}", "")))
    return verb, [*NEEDED.get(verb, []), word + draw(values)]


@given(command_lines())
@example(("tune", [*NEEDED["tune"], "exits.layers=" + "[" * 300]))
@example(("tune", [*NEEDED["tune"], "out=${out}"]))
@example(("tune", [*NEEDED["tune"], "out=\ud800"]))
@examples(30)
def test_command_lines(case) -> None:
    verb, words = case
    config = refused(lambda: compose_config(verb, words))
    if config is not None:
        refused(lambda: to_yaml(config))


# --- data

ROW = {"text": "one two", "label": "yes", "pair": "three"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@given(st.one_of(json_files(ROW), mutated(ROW).map(as_json), damaged(b'text,label,pair\nx,y,z\n"a\nb",c,d\n')))
@example(b"[" * DEEP)
@example(b'{"text": ' + b"9" * 10_000 + b"}")
@example(as_json({**ROW, "label": 10**4000}))
@example(b'text,label,pair\n"' + b"x" * 200_000)
@examples(80)
def test_labelled_data(folder, content) -> None:
    for name in ("rows.jsonl", "rows.csv", "rows.tsv"):
        (folder / name).write_bytes(content)
        found = refused(lambda path=folder / name: read_labelled(path, pair_key="pair"), megabytes=30)
        for row in found or ():
            assert row.text.strip()
            assert row.label == row.label.strip()
            assert row.text.encode("utf-8")


@given(st.one_of(json_files({"text": "one\ntwo"}), damaged("x\r\ny\u2028z".encode())))
@example(b"[" * DEEP)
@example(b'{"text": "\\ud800"}')
@examples(80)
def test_text_data(folder, content) -> None:
    for name in ("text.jsonl", "text.txt"):
        (folder / name).write_bytes(content)
        found = refused(
            lambda path=folder / name: list(file_pieces(path, file_kind(path, str(path)), "text")), megabytes=30
        )
        for piece in found or ():
            assert piece.text.encode("utf-8") is not None


def test_a_path_that_is_too_long(capsys, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    assert main(["generate", f"model={'x' * 600}", "prompt=hi"]) == 2
    assert capsys.readouterr().err.startswith("error: File name too long: 'xxx")


def test_a_config_comes_back() -> None:
    config = compose_config("tune", [*NEEDED["tune"], "exits.layers=[1,2]", "optim.lr=3e-4", "out=runs/x"])
    assert asdict(config) == OmegaConf.to_object(OmegaConf.create(to_yaml(config)))
