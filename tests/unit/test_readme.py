"""Every command of the README is understood: composed, or known to make."""

import re
import shlex
from functools import partial
from pathlib import Path

import pytest

import ee_scale
from ee_scale.api import Exported, TrainedRun
from ee_scale.cli.main import main, split_command
from ee_scale.cli.models import model_rows
from ee_scale.config.compose import checked, compose_config
from ee_scale.evaluation.evaluate import Evaluation
from ee_scale.evaluation.per_exit import ExitQuality
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


def _take(given: dict, name: str, result: object, config: object) -> object:
    given[name] = checked(config)
    return result


def test_the_example_in_python(monkeypatch):
    """It says names and settings that there are; the functions themselves are tested in tests/e2e/test_api.py."""
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", README, flags=re.S) if "ee_scale.tune" in block)
    given = {}
    results = {"tune": TrainedRun(Path("runs/a"), 200, {}), "export": Exported(Path("my-model"))}
    results["evaluate"] = Evaluation([ExitQuality(2, False, 1.0, 2.7, 0.5)], 10)
    for name, result in results.items():
        monkeypatch.setattr(ee_scale, name, partial(_take, given, name, result), raising=False)
    exec(code, {})
    assert given["tune"].parallel.pp == 2
    assert given["export"].src == "runs/a"
    assert given["evaluate"].model == "my-model"


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
