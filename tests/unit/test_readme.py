"""Every command of the README is understood: composed, or known to make."""

import re
import shlex
from pathlib import Path

import pytest

import ee_scale
from ee_scale.cli.main import main, split_command
from ee_scale.cli.models import model_rows
from ee_scale.config.compose import compose_config
from ee_scale.launching.multirun import expand

ROOT = Path(ee_scale.__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    for line in block.splitlines()
    if line.strip()
]


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str):
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
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    else:
        assert words[:3] == ["pip", "install", "."]
        assert words[3:] in ([], ["-c", "constraints.txt"])


def test_commands_were_found():
    assert len(COMMANDS) >= 9


def test_the_error_that_the_readme_shows(capsys):
    assert main(["tune", "model=nowhere", "data=x", "train.zero=3"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_table_of_models_is_what_the_families_say(capsys):
    lines = README.split("## Models")[1].split("##")[0].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert [header, *rows] == model_rows()
    assert main(["--models"]) == 0
    printed = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert printed == model_rows()
