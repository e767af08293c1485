"""Text from data reaches a terminal as text: no markup, no commands."""

import io
import json
import logging
import re
import subprocess
import sys

import pytest
from rich.table import Table
from rich.text import Text

from ee_scale.cli.main import main
from ee_scale.config.schema import PREFIXES, VERBS
from ee_scale.evaluation.log_report import report_table
from ee_scale.evaluation.log_summary import summarise
from ee_scale.log import Terminal, spelled, visible

EVIL = "[red]a[/red] \x1b[31mb\x1b]0;title\x07 \x9b2J c\x7f [/]"


def printed(*things) -> str:
    out = io.StringIO()
    terminal = Terminal(file=out, width=200, force_terminal=True, color_system=None)
    for thing in things:
        terminal.print(thing, highlight=False)
    return out.getvalue()


def test_markup_and_commands_are_text():
    table = Table(title=EVIL)
    table.add_column(EVIL)
    table.add_row(EVIL)
    said = printed(EVIL, Text(EVIL), table)
    assert said.count("[red]a[/red]") == 5
    assert not set("\x1b\x07\x9b\x7f") & set(said)
    assert printed("one\ntwo\tthree") == "one\ntwo     three\n"


def test_styles_of_our_own_stay():
    out = io.StringIO()
    Terminal(file=out, force_terminal=True, color_system="standard").print(Text("a\x1b[31m", style="red"))
    assert out.getvalue() == "\x1b[31ma\ufffd[31m\x1b[0m\n"


def test_tags_of_a_log(tmp_path):
    lines = [{"num_layers": 4, "layers": [1]}, {"time": 1.0, "layer": 1, "tag": EVIL}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    said = printed(report_table(summarise([tmp_path / "a.jsonl"], 60), 1, "per tag", 0.95))
    assert "[red]a[/red]" in said
    assert "\x1b" not in said


def test_an_error_is_spelled(capsys):
    assert main(["generate", "model=a\n\x1b[31m\u202eb", "prompt=x"]) == 2
    assert capsys.readouterr().err == "error: model=a\\n\\x1b[31m\\u202eb: no such folder\n"
    assert spelled("数据 é 👍") == "数据 é 👍"


def test_help_has_its_bold_words(capsys):
    assert main(["tune", "--help"]) == 0
    assert "[bold]" not in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert "[bold]" not in capsys.readouterr().out
    assert main(["check"]) == 0
    assert "[bold]" not in capsys.readouterr().out


def test_the_guide_is_one_screen(capsys):
    """Of 24 x 80; every command is on it."""
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 23  # and the prompt
    assert max(map(len, lines)) <= 80
    words = set(re.findall(r"[a-z]+", " ".join(lines)))
    assert words >= {*VERBS, *PREFIXES}


def test_the_guide_comes_without_torch():
    code = "import sys; from ee_scale.cli.main import main; main([]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("terminal", [True, False])
def test_generated_text(monkeypatch, capsys, terminal):
    from ee_scale.cli.generate import _for_stdout

    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert _for_stdout("a\x1b[31m\n") == ("a\ufffd[31m\n" if terminal else "a\x1b[31m\n")
    assert visible("a\tb\n") == "a\tb\n"


def test_log_lines(monkeypatch):
    from ee_scale import log as logs

    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", out)
    kept = logs.log.handlers[:], logs.log.propagate, logs.log.level
    try:
        logs.configure_logging()
        logging.getLogger("ee_scale").info("run %s", EVIL)
    finally:
        logs.log.handlers[:], logs.log.propagate = kept[0], kept[1]
        logs.log.setLevel(kept[2])
    assert "run " in out.getvalue()
    assert "\x1b[31mb" not in out.getvalue()
    assert "\x07" not in out.getvalue()
