"""What was typed is the name: every path, name and tag of every command, whatever it looks like."""

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from ee_scale.cli.main import main
from ee_scale.config.compose import compose_config, find_setting, from_yaml, known_keys, to_yaml
from ee_scale.config.schema import VERBS
from ee_scale.config.words import is_text, quote, read_list, write_word
from ee_scale.errors import UserError
from ee_scale.launching.multirun import expand
from ee_scale.launching.scripts import Task, job_script

NUMBERS = [
    "1",
    "007",
    "1_000",
    "0x10",
    "1e5",
    "1e-4",
    "12e5",
    "5e12345",
    "1.10",
    ".5",
    "-3",
    "+1",
    ".inf",
    "nan",
    "1:30",
]
WORDS = [
    "true",
    "Off",
    "yes",
    "None",
    "~",
    "2026-11-27",
    "choice(1,2)",
    "range(3)",
    "str(1)",
    "a: b",
    "- a",
    "&a",
    "*a",
]
GRAMMAR = [
    "a=b",
    "a#b",
    "数据.txt",
    "${HOME}",
    "a ${x} b",
    "${",
    "\\${x}",
    "a,b",
    "a b",
    " a ",
    "~/x",
    "C:\\x\\",
    "50%",
    "x(1)",
]
BRACKETS = [
    "[a]b",
    "a[1]",
    "{a}",
    "a'b",
    'a"b',
    "'a",
    "'a'b'",
    "a'",
    "\\",
    "a\\'b",
    "!x",
    "@x",
    "a\tb",
    "a\nb",
    "👍",
    "é",
]
NAMES = NUMBERS + WORDS + GRAMMAR + BRACKETS
NEEDED = {"src": "s", "out": "o", "model": "m", "data": "d", "log": "l", "to": "hf"}


def given(verb: str) -> list[str]:
    rules = {field.name: field.metadata.get("rule") for field in fields(VERBS[verb])}
    fits = {key: value for key, value in NEEDED.items() if key in rules and (not rules[key] or rules[key].holds(value))}
    return [f"{key}={value}" for key, value in fits.items()]


def text_keys(verb: str) -> list[str]:
    """Every setting that holds a name or a text of the user's choice."""
    found = [(key, find_setting(verb, key)[1]) for key in known_keys(VERBS[verb])]
    return [key for key, field in found if field and is_text(field) and "rule" not in field.metadata]


def value_of(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("verb", VERBS)
def test_what_was_typed_is_the_name(verb):
    lists = {key for key in text_keys(verb) if find_setting(verb, key)[1].type == list[str]}
    keys = [key for key in text_keys(verb) if key not in lists]
    assert keys
    names = NAMES
    for number in range(0, len(names), len(keys) if verb in ("tune", "export", "generate") else 8):
        typed = {key: names[(number + at) % len(names)] for at, key in enumerate(keys)}
        config = compose_config(verb, [*given(verb), *(f"{key}={value}" for key, value in typed.items())])
        assert {key: value_of(config, key) for key in keys} == typed
        assert from_yaml(VERBS[verb], to_yaml(config)) == config
        typed = {key: [names[number], names[number - 1]] for key in lists}
        if lists:
            words = [f"{key}=[{','.join(quote_item(item) for item in value)}]" for key, value in typed.items()]
            config = compose_config(verb, [*given(verb), *words])
            assert {key: list(value_of(config, key)) for key in lists} == typed


def quote_item(item: str) -> str:
    """As a person would: quotes only where commas, brackets, quotes, or spaces at the ends are part of the name."""
    return quote(item) if set(item) & set(",[]{}'\"\\()\n") or item != item.strip() or "${" in item else item


@pytest.mark.parametrize(
    ("verb", "key"), [("tune", "data"), ("generate", "tag"), ("report", "log"), ("palette", "data")]
)
def test_lists_of_names(verb, key):
    def read(value: str) -> Any:
        found = value_of(compose_config(verb, [*given(verb), f"{key}={value}"]), "data.path" if verb == "tune" else key)
        return found if isinstance(found, str) else list(found)

    assert read("[1e5,007,true, a=b ,数据#1,${HOME},it's,null]") == [
        *["1e5", "007", "true", "a=b", "数据#1", "${HOME}", "it's", "null"]
    ]
    assert read("""['a, b',"c d",e\\,f,a[1]]""") == ["a, b", "c d", "e,f", "a[1]"]
    assert read("[a] and [b]") == "[a] and [b]"
    assert read("[x]/y.txt") == "[x]/y.txt"
    assert read("['a]', b]") == ["a]", "b"]


@pytest.mark.parametrize(
    ("word", "name"),
    [
        *[
            ("out='a b'", "a b"),
            ('out="a b"', "a b"),
            ("out='a\\'b'", "a'b"),
            ("out='1e5'", "1e5"),
            ("out='null'", "null"),
        ],
        *[
            ("++out=1e5", "1e5"),
            ("--out=1e5", "1e5"),
            ("out='\\${x}'", "${x}"),
            ("out='${x}'", "${x}"),
            ("out=null", "null"),
        ],
        *[("out='a','b'", "'a','b'"), ("out='a' b", "'a' b")],
    ],
)
def test_quotes_do_not_belong_to_the_name(word, name):
    assert compose_config("tune", ["model=m", "data=d", word]).out == name


def test_none_is_none_and_null_in_quotes_a_name():
    config = compose_config("evaluate", ["model=m", "data=d", "out=null", "tag_key='null'"])
    assert (config.out, config.tag_key) == (None, "null")
    assert compose_config("generate", ["model=m", "tag=null", "prompt=null"]).tag is None
    assert compose_config("generate", ["model=m", "prompt=null"]).prompt == "null"


@pytest.mark.parametrize("word", ["out=", "out=''", "model=", "logging.wandb_name=", "data="])
def test_an_empty_name_is_refused(word, capsys):
    assert main(["tune", "model=m", "data=d", word]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "=: empty; give a name" in said


@pytest.mark.parametrize(
    "word",
    [
        "a\udcffb",
        "out=a\udcffb",
        "exits.layers=[1",
        "exits.layers='1",
        "数=1",
        "=x",
        "exits.rank=a=b",
        "exits.rank=${x}",
        "train=a#b",
    ],
)
def test_bad_words_are_one_line_of_our_own(word, capsys):
    assert main(["tune", "model=m", "data=d", word]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert not any(
        words in said for words in ("^", "token recognition", "mismatched", "viable", "hydra.cc", "Traceback")
    )


def test_a_path_is_no_way_into_the_groups(tmp_path, monkeypatch):
    assert compose_config("tune", ["model=../tune", "data=x/../text"]).model.path == "../tune"
    assert compose_config("tune", ["model=tiny", "data=python"]).data.path == "python"
    assert compose_config("tune", ["model=./tiny", "data=python"]).model.path == "./tiny"


def test_what_omegaconf_takes_for_missing_is_refused():
    with pytest.raises(UserError, match=r"missing value: out \(give key=value\)"):
        compose_config("tune", ["model=m", "data=d", "out=???"])


def test_names_of_stages():
    stages = "stages=[{name: 1e5, axes: [], steps: 3},{name: '007', axes: [hidden], steps: 1e1}]"
    with pytest.raises(UserError, match="steps"):
        compose_config("supernet", ["model=m", "data=d", stages])
    config = compose_config("supernet", ["model=m", "data=d", stages.replace("1e1", "10")])
    assert [stage.name for stage in config.stages] == ["1e5", "007"]
    assert [list(stage.axes) for stage in config.stages] == [[], ["hidden"]]


def test_sweeps_of_names():
    words = ["model=m", "data=1e5,'a, b',[c,d e],数据.txt", "logging.wandb_project=1.10,1.1", "out=1e-4"]
    found = expand("tune", words)
    assert [one.config.data.path for one in found[::2]] == ["1e5", "a, b", ["c", "d e"], "数据.txt"]
    assert [one.config.logging.wandb_project for one in found[:2]] == ["1.10", "1.1"]
    assert found[0].name == "0_data=1e5_wandb_project=1.10"
    assert {one.config.logging.wandb_group for one in found} == {"1e-4"}
    assert found[0].config.out == "1e-4/0_data=1e5_wandb_project=1.10"
    assert len({one.config.out for one in found}) == 8
    assert [one.config.model.path for one in expand("tune", ["model=choice(1e5, b)", "data=d"])] == ["1e5", "b"]
    for one in found:  # what a run of the sweep is started with says the same
        assert compose_config("tune", one.overrides) == one.config


@pytest.mark.parametrize("out", ["null", "'x'", "[a]", "${HOME}", "."])
def test_the_group_of_a_sweep_is_its_folder(out):
    found = expand("tune", ["model=m", "data=d", "exits.rank=4,8", f"out={out}"])[1]
    assert found.config.logging.wandb_group == Path(found.config.out).parent.absolute().name


@pytest.mark.parametrize("name", NAMES)
def test_words_survive_scripts(name):
    """What `ee-scale launch` writes is what was typed, and a written word is read as its text."""
    config = compose_config("tune", ["model=m", "data=d", write_word("out", name)])
    assert config.out == name
    task = Task(["tune", f"data={name}"], Path("/x") / "o", 1)
    config.launcher.kind = "torchrun"
    script = job_script(config.launcher, [task], Path("/x/o"), "cpu")
    call = script.partition("set -- ")[2].partition("\n\n# launch/")[0]
    assert shlex.split(call) == task.words


def test_lists_as_people_write_them():
    assert read_list("[INST] hi [/INST]") is None
    assert read_list("[[a],b]") is None
    assert read_list("[a,]") is None
    assert read_list("[]") == []
    sbatch = compose_config(
        "tune", ["model=m", "data=d", "launcher.sbatch=[qos=high]", 'launcher.setup=["a, b","export X=${HOME}/a"]']
    )
    assert list(sbatch.launcher.sbatch) == ["qos=high"]
    assert list(sbatch.launcher.setup) == ["a, b", "export X=${HOME}/a"]
