"""What `ee-scale launch` writes, runs and refuses, against a stand-in for Python; images' build files."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.launcher import noted, recorder

import ee_scale
from ee_scale.cli.main import main
from ee_scale.config.groups import LauncherConfig
from ee_scale.errors import Requeue, RunError, UserError
from ee_scale.grid import Layout
from ee_scale.launching.ranks import Ended, exit_code
from ee_scale.launching.ranks import main as main_of_ranks
from ee_scale.launching.scripts import seconds, split_grid
from ee_scale.launching.signals import STOPPING

ROOT = Path(ee_scale.__file__).parents[1]
TUNE = ["launch", "tune", "+debug=cpu"]
TWO_NODES = ["parallel.dp=2", "launcher=slurm", "launcher.nodes=2"]


def shellcheck(*paths: Path) -> None:
    tool = Path(sys.executable).with_name("shellcheck")
    quotes = "--exclude=SC2089,SC2090"  # values that hold quotes, as a folder's name may
    checked = subprocess.run([tool, quotes, *paths], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def dry(arguments: list[str], capsys) -> str:
    assert main([*TUNE, *arguments, "--dry-run"]) == 0
    return capsys.readouterr().out


def python(path: Path) -> str:
    return f'launcher.setup=["export PYTHON={path}"]'


# -- the scripts -------------------------------------------------------------------------------------------------------


def test_shipped_scripts_pass_shellcheck():
    shellcheck(*sorted((ROOT / "launch").iterdir()))


@pytest.mark.parametrize(
    "arguments",
    [
        TWO_NODES,
        [*TWO_NODES, "-m", "optim.lr=1e-3,1e-4"],
        ["launcher=torchrun", "launcher.nodes=2", "launcher.head=a"],
        [*TWO_NODES, 'out=it\'s a "run" at 100%'],
    ],
)
def test_written_scripts_pass_shellcheck(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script = dry(arguments, capsys)
    assert script.startswith("#!/bin/bash\n")
    assert os.listdir(tmp_path) == []
    (tmp_path / "script").write_text(script)
    shellcheck(tmp_path / "script")


def test_sbatch_options_come_from_the_config(capsys):
    settings = ["launcher.time=2:00:00", "launcher.signal_seconds=90", "launcher.partition=p", "launcher.account=a"]
    script = dry([*TWO_NODES, *settings, 'launcher.sbatch=["qos=high",exclusive]'], capsys)
    options = set(re.findall(r"^#SBATCH --(.*)", script, flags=re.M))
    assert {"nodes=2", "ntasks-per-node=1", "time=2:00:00", "signal=USR1@90", "requeue", "open-mode=append"} < options
    assert {"partition=p", "account=a", "qos=high", "exclusive"} < options
    assert not any("gpus" in option for option in options)
    assert "#SBATCH --gpus-per-node=2\n" in dry([*TWO_NODES, "parallel.device=auto"], capsys)


def test_local_dry_run_is_the_command(capsys):
    assert dry(["out=a b"], capsys) == "ee-scale tune +debug=cpu 'out=a b'\n"


def test_torchrun_by_hand(tmp_path):
    python_path = recorder(tmp_path / "python", 'grep SigIgn /proc/self/status > "$NOTE.ignored"')
    command = ["bash", str(ROOT / "launch/torchrun.sh"), "tune", "a=b c"]
    environment = {**os.environ, "PYTHON": str(python_path), "PROCESSES": "2"}
    subprocess.run(command, env=environment, check=True)
    assert noted(python_path, "x")[0] == shlex.split(
        "-m ee_scale.launching.ranks --standalone --nproc-per-node 2 --max-restarts 0 -m ee_scale tune 'a=b c'"
    )
    ignored = int((tmp_path / "python.x.0.ignored").read_text().split()[1], 16)  # a signal must not kill what starts
    assert all(ignored >> (number - 1) & 1 for number in (signal.SIGTERM, signal.SIGUSR1))
    alone = subprocess.run(command, env=environment | {"NODES": "2"}, capture_output=True, text=True, check=False)
    assert alone.returncode != 0
    assert "HEAD: is not set" in alone.stderr
    subprocess.run(command, env=environment | {"NODES": "2", "HEAD": "a", "OUT": "x y"}, check=True)
    arguments = noted(python_path, "x")[0]
    assert arguments[arguments.index("--rdzv-endpoint") + 1] == "a:29500"
    assert arguments[-1] == "out=x y"


def test_launched_torchrun_starts_the_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = []

    def execvp(*words):
        started.append(words)
        raise SystemExit(0)

    monkeypatch.setattr("ee_scale.launching.scripts.os.execvp", execvp)
    settings = ["launcher=torchrun", "launcher.nodes=2", "launcher.head=n0", "launcher.port=4000", "out=r"]
    with pytest.raises(SystemExit):
        main([*TUNE, *settings, python(recorder(tmp_path / "python"))])
    ((program, command),) = started
    assert (program, command[0]) == ("bash", "bash")
    subprocess.run(command, check=True)
    arguments = noted(tmp_path / "python", "x")[0]
    assert arguments[arguments.index("--rdzv-endpoint") + 1] == "n0:4000"
    assert arguments[arguments.index("--nproc-per-node") + 1] == "1"


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["launcher.nodes=2"], "launcher.nodes=2: launcher=local is one machine"),
        (["launcher=slurm", "launcher.nodes=0"], "launcher.nodes=0: must be at least 1"),
        (["launcher=slurm", "launcher.nodes=3"], "launcher.nodes=3: tp=1 x pp=2 (stages launched) x dp=1 = 2 ranks"),
        (["launcher=slurm", "launcher.processes_per_node=4"], "launcher.nodes=1 x launcher.processes_per_node=4 = 4"),
        (["launcher=slurm", "launcher.time=1h"], "launcher.time=1h: SLURM reads"),
        (["launcher=slurm", "launcher.time=2"], "launcher.signal_seconds=180: launcher.time=2 is 120 s"),
        (["launcher=slurm", 'launcher.sbatch=["--qos=x"]'], "launcher.sbatch='--qos=x': give a long option"),
        (["launcher=slurm", 'launcher.sbatch=["nodes=3"]'], "launcher.sbatch='nodes=3': is set by launcher.nodes"),
        (["launcher=slurm"], "launcher=slurm: no sbatch on PATH"),
        (["launcher=torchrun", "launcher.nodes=2"], "launcher.head: name the first of launcher.nodes=2"),
        (["launcher=torchrun", "launcher.port=80"], "launcher.port=80: give one of 1024 to 65535"),
        (["launcher=slurm", "exits.layers=[9]"], "exits.layers"),
        (["launcher=torchrun", "-m", "optim.lr=1,2"], "launcher=torchrun: -m goes with"),
        (["launcher=slurm", "-m", "parallel.dp=1,2", "launcher.dry_run=true"], "1_dp=2: 4 ranks per node, 2 for"),
    ],
)
def test_refused_before_anything_starts(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    assert main([*TUNE, *arguments]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert len(told.splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_a_refusing_sbatch_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    assert main([*TUNE, *TWO_NODES, "out=r"]) == 1
    assert "sbatch: error: invalid partition" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layout", "nodes", "processes", "expected"),
    [
        (Layout(2, 2, 2), 2, None, 4),
        (Layout(2, 2, 2), 4, 2, 2),
        (Layout(2, 2, 2), 8, None, "parallel.tp=2: does not divide the 1 ranks per machine"),
        (Layout(4, 3, 1), 2, None, "parallel.tp=4: does not divide the 6 ranks per machine"),
        (Layout(1, 3, 1), 2, None, "launcher.nodes=2: tp=1 x pp=3"),
        (Layout(1, 3, 1), 2, 2, "2 x launcher.processes_per_node=2 = 4 ranks, but tp=1 x pp=3"),
    ],
)
def test_ranks_per_machine(layout, nodes, processes, expected):
    launcher = LauncherConfig(nodes=nodes, processes_per_node=processes)
    if isinstance(expected, int):
        assert split_grid(layout, launcher) == expected
    else:
        with pytest.raises(UserError, match=re.escape(expected)):
            split_grid(layout, launcher)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("30", 1800), ("30:10", 1810), ("1:00:00", 3600), ("1-0", 86400), ("1-2:3", 93780), ("1-2:3:4", 93784), ("0", 0)],
)
def test_seconds(limit, expected):
    assert seconds(limit) == expected


def test_exit_code(tmp_path):
    assert exit_code(Ended(0)) == 0
    assert exit_code(Ended(75)) == 75
    assert exit_code(Ended(2)) == 2
    with pytest.raises(RunError, match="rank 3 was killed by SIGKILL"):
        exit_code(Ended(-9, 3))
    with pytest.raises(RunError, match="rank 1 failed with exit code 1"):
        exit_code(Ended(1, 1), tmp_path)
    with pytest.raises(Requeue, match="SIGTERM came before"):
        exit_code(Ended(-15, 0, [15]))
    with pytest.raises(RunError, match="killed by SIGTERM"):
        exit_code(Ended(-15, 0, []))
    (tmp_path / "stopped.json").write_text('{"code": 75, "step": 3, "reason": "SIGUSR1"}')
    assert exit_code(Ended(-9), tmp_path) == 75
    assert exit_code(Ended(0), tmp_path) == 0
    (tmp_path / "stopped.json").write_text('{"code": 1, "step": 3, "reason": "11 updates skipped"}')
    assert exit_code(Ended(1), tmp_path) == 1  # rank 0 has said why


def test_ranks_that_start_again_after_a_signal_leave_at_once(monkeypatch, capsys):
    monkeypatch.setenv(STOPPING, "SIGUSR1")
    assert main(["tune", "model=nowhere"]) == 75
    assert capsys.readouterr().err == ""


def test_the_end_of_a_rank_is_told_unless_it_left_on_purpose(capfd):
    code = "import signal, os; os.kill(os.getpid(), 9)"
    environment, handler = dict(os.environ), signal.getsignal(signal.SIGHUP)
    assert main_of_ranks(["--standalone", "--no-python", sys.executable, "-ISc", code]) == 1
    assert "rank 0 was killed by SIGKILL" in capfd.readouterr().err
    assert main_of_ranks(["--standalone", "--no-python", sys.executable, "-ISc", "raise SystemExit(75)"]) == 75
    assert capfd.readouterr().err == ""
    assert dict(os.environ) == environment
    assert signal.getsignal(signal.SIGHUP) == handler


def test_bad_input_is_told_in_one_line(monkeypatch, capsys):
    def refuse(*_):
        raise UserError("parallel.tp=0: must be at least 1")

    monkeypatch.setattr("ee_scale.launching.ranks.run_agent", refuse)
    assert main_of_ranks([]) == 2
    assert capsys.readouterr().err == "error: parallel.tp=0: must be at least 1\n"


def test_signals_reach_the_ranks_and_the_agent_waits(tmp_path):
    """A rank that takes its time to leave, and is not started again."""
    code = """if True:
        import os, signal, sys, time
        print("started", flush=True)
        def leave(*_):
            time.sleep(1)
            print("saved", flush=True)
            sys.exit(75)
        signal.signal(signal.SIGUSR1, leave)
        os.kill(os.getppid(), signal.SIGUSR1)
        while True:
            signal.pause()
    """
    (tmp_path / "rank.py").write_text(code)
    arguments = ["--standalone", "--max-restarts", "1", "--no-python", sys.executable, "-IS", tmp_path / "rank.py"]
    command = [sys.executable, "-m", "ee_scale.launching.ranks", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 75, ended.stderr
    assert ended.stdout.split() == ["started", "saved"]
    assert ended.stderr == ""


# -- images ------------------------------------------------------------------------------------------------------------

DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))


def test_there_are_two_images():
    assert [path.name for path in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.cuda"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_build_file(path):
    text = re.sub(r"\\\n", " ", path.read_text())
    steps = [line.split(None, 1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    bases = [words for name, words in steps if name == "FROM"]
    assert bases
    assert all(re.search(r":[\w.-]*\d", base) and "latest" not in base for base in bases)
    runs = [words for name, words in steps if name == "RUN"]
    assert not any("sudo" in words for words in runs)
    for words in runs:
        if "apt-get install" in words:
            assert "--no-install-recommends" in words
            assert "rm -rf /var/lib/apt/lists/*" in words
            assert "apt-get update" in words
        if "pip install" in words:
            assert "--no-cache-dir" in words
    users = [words for name, words in steps if name == "USER"]
    assert users
    assert users[-1] not in ("root", "0")
    assert ["ENTRYPOINT", '["ee-scale"]'] in steps
    for name, words in steps:  # what is copied is there
        if name == "COPY" and "--from" not in words:
            assert all((ROOT / source).exists() for source in words.split()[:-1] if not source.startswith("--"))


def test_hadolint():
    tool = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if tool is None:
        pytest.skip("hadolint has no wheel for this machine")
    checked = subprocess.run([tool, *DOCKERFILES], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
