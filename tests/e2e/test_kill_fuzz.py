"""A kill at a random place, and the same command again: the losses are those of an undisturbed run."""

import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_a_kill(tune_arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    from kill_fuzz import fuzz

    said: list[str] = []
    command = [*tune_arguments, "parallel.pp=2", "train.save_every=2"]
    assert fuzz(command, tmp_path / "runs", kills=1, seed=1, say=said.append) == []
    assert [line for line in said if "DIFFER" in line] == []
    assert sum("kill" in line for line in said) == 1, said
