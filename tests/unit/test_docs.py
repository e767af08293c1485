"""README, pages and pictures: every command is understood, links lead somewhere, what is shown is what there is."""

import ast
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from functools import partial
from importlib.metadata import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from draw_architecture import TARGET, drawing

import ee_scale
from ee_scale.api import Exported, TrainedRun
from ee_scale.cli.main import main, split_command
from ee_scale.cli.models import grouped_rows, model_rows
from ee_scale.config.compose import checked, compose_config
from ee_scale.config.schema import PREFIXES, VERBS
from ee_scale.evaluation.evaluate import Evaluation
from ee_scale.evaluation.per_exit import ExitQuality
from ee_scale.families.registry import FAMILIES
from ee_scale.launching.multirun import expand
from ee_scale.modeling.decode import LOG_OPTIONS, OPTIONS

ROOT = Path(ee_scale.__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
WRITTEN = PAGES | {name: (ROOT / name).read_text() for name in ("CONTRIBUTING.md", "CHANGELOG.md")}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def commands(text: str) -> Iterator[str]:
    """The lines of shell blocks, and commands with settings inside a sentence or a table."""
    for block in blocks(text, "bash"):
        lines = block.replace("\\\n", " ").splitlines()
        yield from (line.split("  #")[0].strip() for line in lines if line.strip())
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    yield from re.findall(r"`(ee-scale [a-z][^`<]*[=+][^`<]*)`", prose)


COMMANDS = [(name, command) for name, text in PAGES.items() for command in dict.fromkeys(commands(text))]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_command(page: str, command: str):
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^([\w-]+ )*{words[1]}[ :]", (ROOT / "Makefile").read_text(), flags=re.M)
    elif "ee_scale" in words or words[0] == "ee-scale":
        _, verb, overrides = split_command(words[words.index("ee_scale") + 1 :] if "ee_scale" in words else words[1:])
        if "-m" in overrides:
            overrides.remove("-m")
            assert len(expand(verb, overrides)) > 1
        else:
            assert compose_config(verb, overrides)
    elif words[:2] == ["python", "-m"]:
        assert find_spec(words[2])
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    elif words[:2] == ["docker", "run"]:
        _, verb, overrides = split_command(words[words.index("ee-scale:cuda") + 1 :])
        assert compose_config(verb, overrides)
    elif words[:2] == ["docker", "build"]:
        assert (ROOT / words[words.index("-f") + 1]).is_file()
    elif words[0] == "transformers":
        assert find_spec(f"transformers.cli.{words[1]}")
    elif words[:2] == ["pip", "download"]:
        assert f"{shlex.join(words)}\n" in (ROOT / "scripts" / "english_set.py").read_text()
    elif words[2] == "transformers[serving]":
        assert "serving" in metadata("transformers").get_all("Provides-Extra")
    else:
        assert words[:2] == ["pip", "install"]
        assert re.fullmatch(r"\.(\[\w+\])?", words[2])
        assert words[3:] in ([], ["-c", "constraints.txt"])


def test_commands_were_found():
    found = " ".join(command for _, command in COMMANDS)
    for word in (*VERBS, *PREFIXES):
        assert f"ee-scale {word} " in found or word == "demo", word
    assert sum(page == "README.md" for page, _ in COMMANDS) >= 18


def _take(given: dict, name: str, result: object, config: object) -> object:
    given[name] = checked(config)
    return result


def test_the_example_in_python(monkeypatch):
    """It says names and settings that there are; the functions themselves are tested in tests/e2e/test_api.py."""
    (code,) = (block for block in blocks(PAGES["api.md"], "python") if "ee_scale.tune" in block)
    given = {}
    results = {"tune": TrainedRun(Path("runs/a"), 200, {}), "export": Exported(Path("my-model"))}
    results["evaluate"] = Evaluation([ExitQuality(2, False, 1.0, 2.7, 0.5)], 10)
    for name, result in results.items():
        monkeypatch.setattr(ee_scale, name, partial(_take, given, name, result), raising=False)
    exec(code, {})
    assert given["tune"].parallel.pp == 2
    assert given["export"].src == "runs/a"
    assert given["evaluate"].model == "my-model"


@pytest.mark.parametrize("page", PAGES)
def test_python_in_pages(page: str):
    """It is Python, and every option of `generate` in it is one."""
    for block in blocks(PAGES[page], "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "generate":
                options = {word.arg for word in node.keywords if word.arg}
                assert options <= {*OPTIONS, *LOG_OPTIONS}, options


# -- what pages show ---------------------------------------------------------------------------------------------------


def test_the_table_of_models_is_what_the_families_say(capsys):
    lines = README.split("## Models")[1].split("##")[0].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert [header, *rows] == grouped_rows()
    assert sorted(name for row in rows for name in row[0].split(", ")) == sorted(FAMILIES)
    assert main(["--models"]) == 0
    printed = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert printed == model_rows()


def test_the_picture_is_what_the_code_says():
    """If not: python scripts/draw_architecture.py."""
    assert TARGET.read_text() == drawing()


def test_a_screen_of_the_readme():
    assert len(README.splitlines()) <= 220


def said() -> list[tuple[int, re.Pattern[str]]]:
    """Every text in the package that may be a message, as a pattern: what is filled in is anything; with its length."""
    found = {}
    for path in (ROOT / "ee_scale").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            texts = node.values if isinstance(node, ast.JoinedStr) else [node]
            plain = [text.value if isinstance(text, ast.Constant) else None for text in texts]
            pattern = "".join(re.escape(text) if isinstance(text, str) else ".*" for text in plain)
            found[pattern] = sum(len(text) for text in plain if isinstance(text, str))
    return [(length, re.compile(pattern)) for pattern, length in found.items() if length > 10]


def test_refusals_are_those_of_the_code():
    """Of the troubleshooting page, and those that other pages show; '...' stands for something else there."""
    messages = said()
    rows = [found for _, found in re.findall(r"^\| (`+)(.*?)\1 \|", PAGES["troubleshooting.md"], flags=re.M)]
    rows += re.findall(r"^error: (.*)", "\n".join(PAGES.values()), flags=re.M)
    assert len(rows) > 40
    for row in rows:
        if not row.startswith("a rank of stage 0 needs"):  # put together from parts; tests/e2e/test_check.py has it
            assert any(length >= len(row) / 3 and pattern.fullmatch(row) for length, pattern in messages), row


# -- links -------------------------------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """What a heading is called in a link, by GitHub and MkDocs."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def anchors(path: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)", text, flags=re.M)}


@pytest.mark.parametrize("name", WRITTEN)
def test_links_lead_somewhere(name):
    home = ROOT / "docs" if (ROOT / "docs" / name).is_file() else ROOT
    for link in re.findall(r"\]\(([^)]*)\)", re.sub(r"```.*?```", "", WRITTEN[name], flags=re.S)):
        place, _, anchor = link.partition("#")
        if place.startswith("https://"):
            continue
        path = home / place if place else home / name
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link
        assert home == ROOT or path.resolve().is_relative_to(ROOT / "docs"), f"{link}: outside of the pages"


@pytest.mark.parametrize("name", WRITTEN)
def test_no_section_is_there_twice(name):
    """A page that was put together from two branches."""
    titles: list[tuple[str, ...]] = []
    above: dict[int, str] = {}
    for line in re.sub(r"```.*?```", "", WRITTEN[name], flags=re.DOTALL).splitlines():
        if found := re.match(r"(#+) (.+)", line):
            depth = len(found[1])
            above = {level: title for level, title in above.items() if level < depth} | {depth: found[2]}
            titles.append(tuple(above.values()))
    assert len(titles) == len(set(titles)), [title for title in set(titles) if titles.count(title) > 1]


def test_every_page_is_in_the_menu():
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert {page for item in menu for page in item.values()} == PAGES.keys() - {"README.md"}


def test_the_reference_has_every_setting_and_function():
    named = set(re.findall(r"^::: (\S+)", PAGES["api.md"], flags=re.M))
    for name in named:
        module, _, thing = name.rpartition(".")
        assert thing == "api" or hasattr(importlib.import_module(module), thing), name
    for schema in VERBS.values():
        assert f"{schema.__module__}.{schema.__name__}" in named
        for group in schema.__dataclass_fields__.values():
            if hasattr(group.default_factory, "__dataclass_fields__"):
                assert f"{group.default_factory.__module__}.{group.default_factory.__name__}" in named
    members = re.search(r"::: ee_scale\.api.*?members: \[(.*?)\]", PAGES["api.md"], flags=re.S)[1].split(", ")
    assert {name for name in ee_scale.__all__ if name.islower()} <= set(members)


def test_the_reference_describes_every_setting(monkeypatch):
    """What `make docs` reads of `setting(...)`, without the packages that `make docs` needs."""
    monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Attribute=object, Docstring=object, Extension=object))
    described = importlib.import_module("griffe_settings").described
    calls = [
        node
        for path in (ROOT / "ee_scale" / "config").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setting"
    ]
    assert len(calls) > 150
    for call in calls:
        default, words = described(call)
        assert default
        assert len(words) > 5
