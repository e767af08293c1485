"""Sweeps: what they expand to, what is checked first, in which order they run and stop."""

import json
import signal
import sys

import pytest

from ee_scale.cli.main import main
from ee_scale.errors import UserError
from ee_scale.launching import multirun
from ee_scale.launching.multirun import expand, folder_name, last_losses

DEBUG = ["+debug=cpu", "parallel.pp=1"]


@pytest.fixture
def commands(monkeypatch):
    """Commands that would have been run; each leaves with the next of `codes`."""

    class Started(list):
        codes = ()

    started = Started()

    def run(command, **_):
        started.append(command)
        code = started.codes[len(started) - 1] if started.codes else 0
        return type("Finished", (), {"returncode": code})

    monkeypatch.setattr(multirun.subprocess, "run", run)
    return started


def test_expand():
    words = [*DEBUG, "optim.lr=1e-3,1e-4", "exits.layers=[1,3],[2]", "exits.kl_weight=range(0,2)"]
    found = expand("tune", words)
    assert len(found) == 8
    names = [combination.name for combination in found]
    assert names[0] == "0_lr=0.001_layers=1-3_kl_weight=0"
    assert names[7] == "7_lr=0.0001_layers=2_kl_weight=1"
    config = found[7].config
    assert (config.optim.lr, list(config.exits.layers), config.exits.kl_weight) == (1e-4, [2], 1.0)
    assert config.out == f"runs/debug_cpu/{names[7]}"
    assert config.logging.wandb_group == "debug_cpu"
    assert len({combination.config.out for combination in found}) == 8
    assert names == [again.name for again in expand("tune", words)]


def test_a_list_is_one_value():
    with pytest.raises(UserError, match="-m: no setting has several values"):
        expand("tune", [*DEBUG, "exits.layers=[1,3]", "optim.betas=[0.9,0.95]"])


def test_groups_paths_and_flags(tmp_path):
    words = ["model=tiny", f"data={tmp_path}/a (1).txt,{tmp_path}/b.txt", "exits=mlp,norm", "logging.wandb_group=g"]
    with pytest.raises(UserError):  # such a path must be quoted to be swept
        expand("tune", ["model=tiny", f"data={tmp_path}/a (1).txt"])
    found = expand("tune", [words[0], f"data='{tmp_path}/a (1).txt',{tmp_path}/b.txt", *words[2:]])
    assert [c.config.data.path for c in found[::2]] == [f"{tmp_path}/a (1).txt", f"{tmp_path}/b.txt"]
    assert [c.config.exits.kind for c in found[:2]] == ["mlp", "norm"]
    assert found[0].config.logging.wandb_group == "g"
    assert all("/" not in c.name for c in found)


def test_names():
    assert folder_name(3, 12, [("lr", "1e-4"), ("data", "'/a b/c'")]) == "03_lr=1e-4_data=a-b-c"
    assert len(folder_name(0, 1, [("x", "y" * 500)])) < 100
    found = expand("tune", [*DEBUG, "exits.rank=4,8", "backbone.rank=2,4"])
    assert found[1].name == "1_exits.rank=4_backbone.rank=4"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tune", *DEBUG, "out=a,b"], "out=a,b: cannot be swept"),
        (["launch", "tune", *DEBUG, "launcher.nodes=1,2"], "launcher.nodes=1,2: cannot be swept"),
        (["tune", *DEBUG, "exits.rank=4,x"], "1_rank=x: "),
        (["tune", *DEBUG, "optim.lr=interval(0,1)"], "optim.lr=interval(0,1): -m takes lists"),
        (["tune", *DEBUG, "exits.layers=[1],[9]"], "1_layers=9: exits.layers"),
        (["check", "tune", *DEBUG, "optim.lr=1,2"], "-m: goes with tune, supernet and launch, not with check"),
        (["export", "src=a,b", "out=c"], "-m: goes with tune, supernet and launch, not with export"),
    ],
)
def test_refused_before_the_first_run(arguments, words, commands, capsys):
    assert main([*arguments, "-m"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {words}")
    assert len(told.splitlines()) == 1
    assert commands == []


@pytest.mark.parametrize(
    ("codes", "started", "code"),
    [((0, 0, 0), 3, 0), ((1, 0, 0), 3, 1), ((0, 75), 2, 75), ((2, 75), 2, 75), ((0, 130), 2, 130)],
)
def test_order_and_stops(codes, started, code, commands, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands.codes = codes
    (tmp_path / "s/0_rank=2").mkdir(parents=True)
    line = {"step": 20, "loss": {"1": 2.5, "3": 1.25, "final": None}}
    (tmp_path / "s/0_rank=2/metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n" + json.dumps(line) + "\n")
    assert main(["tune", *DEBUG, "exits.rank=2,4,8", "out=s", "--multirun"]) == code
    assert len(commands) == started
    assert commands[1][:4] == [sys.executable, "-m", "ee_scale", "tune"]
    assert commands[1][-3:] == ["exits.rank=4", "logging.wandb_group=s", "out=s/1_rank=4"]
    rows = [row.split("│") for row in capsys.readouterr().out.splitlines() if "rank=" in row]
    assert [cell.strip() for cell in rows[0]][1:-1] == ["0_rank=2", str(codes[0]), "20", "2.5000", "1.2500"]
    assert [row[2].strip() for row in rows] == [*map(str, codes[:started]), *[""] * (3 - started)]


def test_a_signal_ends_the_sweep(monkeypatch, tmp_path):
    """It goes on to the run that is there; the next ones are left out, even if that one just finished."""
    code = "import os,signal; signal.signal(signal.SIGUSR1, lambda *_: os._exit(0)); "
    code += "os.kill(os.getppid(), signal.SIGUSR1); [signal.pause() for _ in iter(int, 1)]"
    combinations = [multirun.Combination(str(i), [], None) for i in range(2)]
    before = signal.getsignal(signal.SIGUSR1)
    assert multirun.run_all(combinations, [[sys.executable, "-IS", "-c", code]] * 2) == [0, None]
    assert signal.getsignal(signal.SIGUSR1) == before


def test_no_metrics_no_losses(tmp_path):
    assert last_losses(tmp_path) == {}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": {"1": 2.0}}\n{"torn')
    assert last_losses(tmp_path) == {}


def test_dry_run_of_a_local_sweep(commands, capsys):
    assert main(["launch", "tune", *DEBUG, "-m", "exits.rank=2,4", "out=a b", "--dry-run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == (
        "ee-scale tune +debug=cpu parallel.pp=1 exits.rank=4 'logging.wandb_group=a b' 'out=a b/1_rank=4'"
    )
    assert commands == []
