"""`ee-scale launch launcher=slurm` on a real SLURM: munged, slurmctld and two slurmd, all in a temporary folder."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
from helpers import hold
from helpers.cli import run_cli
from helpers.launcher import noted, recorder
from helpers.machines import wait_for
from helpers.slurm import ENDED, Slurm, why_no_slurm

from ee_scale.cli.main import main

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(reason := why_no_slurm()), reason=reason),
]

STEPS = 18
ENVIRONMENT = "export OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo DS_ACCELERATOR=cpu"


@pytest.fixture(scope="module")
def slurm():
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a socket's path is short
    found = Slurm(folder)
    try:
        found.start()
        yield found
    finally:
        found.stop()
        shutil.rmtree(folder)


@pytest.fixture
def here(slurm, tmp_path, monkeypatch) -> Path:
    """The working directory of who launches; it has a space."""
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "work folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def tune(tmp_path_factory) -> list[str]:
    """A run of two ranks."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "train.txt").write_text(
        "\n".join(f"line {i} of {i * i % 97} words and {i % 13} more" for i in range(2000))
    )
    data = [f"data={folder}/train.txt", f"data.cache_dir={folder}", "data.seq_length=32"]
    saves = ["train.save_every=2", "train.async_save=false", "train.keep=99"]
    return ["tune", "+debug=cpu", *data, f"train.steps={STEPS}", *saves, "logging.every=1"]


def undisturbed(tune: list[str], folder: Path, ranks: int) -> list[dict]:
    """Its losses with nothing in between, without SLURM."""
    folder.mkdir()
    finished = run_cli([*tune, f"parallel.pp={ranks}", "out=run"], folder, ranks)
    assert finished.codes == ranks * [0], finished.output
    return losses(folder / "run")


def losses(out: Path) -> list[dict]:
    """By step; every step is there once."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def launch(slurm: Slurm, words: list[str], setup: list[str], out: Path, *more: str, nodes: int = 2) -> str:
    """Submit; the number of the job."""
    launcher = ["launcher=slurm", f"launcher.nodes={nodes}", f"launcher.setup={json.dumps(setup)}"]
    assert main(["launch", *words, *launcher, f"out={out}", *more]) == 0
    return slurm.last_job()


def checkpoints(out: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (out / "checkpoints").glob("step_*"))


def held(slurm: Slurm, job: str, out: Path, attempt: str) -> str:
    """Waits until a rank stands still; its process id on its node."""
    path = out / f"held_{attempt}"

    def there() -> str:
        assert slurm.start_now(job)["JobState"] not in ENDED, log(out)
        return path.is_file() and path.read_text()

    return wait_for(there, path.name)


def log(out: Path) -> str:
    return "\n".join(path.read_text() for path in out.glob("launch/slurm-*.out"))


def test_a_job_goes_on_after_all_that_happens_to_it(slurm, here, tune, tmp_path):
    """A rank that is killed, a signal, a node that dies and the time limit: every step once, to the last digit."""
    out = here / "my run"
    stops = {"0.0": 3, "0.1": 5, "1.0": 10, "2.0": 13}  # each beyond what the attempt before it saved
    setup = [ENVIRONMENT, *hold.setup(here.parent / "site", 1, stops)]
    job = launch(slurm, tune, setup, out, "launcher.max_restarts=1", "launcher.signal_seconds=600")
    # node2 has rank 1; the agents of both nodes start their ranks again
    victim = held(slurm, job, out, "0.0")
    assert checkpoints(out) == [2]
    slurm.nodes["node2"].run("kill", "-KILL", victim)
    held(slurm, job, out, "0.1")
    slurm.ask("scancel", "--signal=USR1", job)
    held(slurm, job, out, "1.0")
    assert "stopped by SIGUSR1; saved step 8" in log(out)
    assert "Traceback" not in log(out)
    slurm.nodes["node2"].kill()
    slurm.wait(job, "PENDING")
    slurm.boot("node2")
    held(slurm, job, out, "2.0")
    passed = slurm.job(job)["RunTime"].split(":")
    slurm.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={10 + int(passed[0]) * 60 + int(passed[1])}")
    slurm.wait(job, "PENDING")
    slurm.ask("scontrol", "update", f"JobId={job}", "TimeLimit=1-00:00:00")
    ended = slurm.run(job)
    told = log(out)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "3"), told
    assert losses(out) == undisturbed(tune, tmp_path / "undisturbed", 2)
    assert told.count("continuing from") == 4
    assert told.count("stopped by SIGUSR1; saved step") == 2


def test_elements_of_a_sweep(slurm, here, tune, tmp_path):
    """One is stopped by a signal and goes on; one is cancelled: it saves, and that is the end of it."""
    setup = [ENVIRONMENT, *hold.setup(here.parent / "site", 0, {"0.0": 3})]
    single = ["parallel.pp=1", "exits.rank=8,4", "-m"]
    job = launch(slurm, [*tune, *single], setup, here / "sweep", nodes=1)
    outs = [here / "sweep/0_rank=8", here / "sweep/1_rank=4"]
    for element, out in enumerate(outs):
        held(slurm, f"{job}_{element}", out, "0.0")
    slurm.ask("scancel", "--signal=USR1", f"{job}_0")
    slurm.ask("scancel", f"{job}_1")
    cancelled = slurm.wait(f"{job}_1", "CANCELLED")
    finished = slurm.run(f"{job}_0")
    assert (finished["JobState"], finished["Restarts"]) == ("COMPLETED", "1")
    assert losses(outs[0]) == undisturbed(tune, tmp_path / "undisturbed", 1)
    assert cancelled["Restarts"] == "0"
    assert "stopped by SIGTERM; saved step" in log(here / "sweep")
    assert json.loads((outs[1] / "stopped.json").read_text())["step"] == checkpoints(outs[1])[-1] < STEPS


# -- what the job's script does, without a run -------------------------------------------------------------------------

WRITES = 'mkdir -p "$OUT"; printf \'{\\n "code": %s\\n}\\n\' "$SAYS" > "$OUT/stopped.json"; '


def python(path: Path) -> str:
    return f"export PYTHON={path}"


def test_job_starts_one_torchrun_per_node(slurm, here, tmp_path):
    python_path = recorder(tmp_path / "python")
    odd = "data.text_key='it\\'s $HOME & \"x\" `y`'"
    out = here / "my run"
    job = launch(slurm, ["tune", "+debug=cpu", "parallel.dp=2", odd], [python(python_path)], out)
    assert slurm.run(job)["JobState"] == "COMPLETED"
    for node in (0, 1):
        arguments, environment = noted(python_path, node)
        rendezvous, command = arguments[:-1], arguments[arguments.index("tune") :]
        assert arguments[:2] == ["-m", "ee_scale.launching.ranks"]
        assert command[:2] == ["tune", "+debug=cpu"]
        assert odd in command
        assert command[-1] == f"out={out}"
        given = dict(zip(rendezvous[2::2], rendezvous[3::2], strict=False))
        assert given["--nnodes"] == given["--nproc-per-node"] == "2"
        assert given["--rdzv-endpoint"] == f"node1:{10000 + int(job)}"
        assert given["--rdzv-id"] == f"{job}.0"
        assert given["--max-restarts"] == "3"
        assert given["--rdzv-conf"] == f"is_host={'true' if node == 0 else 'false'}"
        assert given["--local-addr"] == f"node{node + 1}"
        assert environment["PWD"] == str(here)
    assert (out / f"launch/slurm-{job}.out").is_file()


def test_elements_of_an_array_do_not_meet(slurm, here, tmp_path):
    python_path = recorder(tmp_path / "python", 'mkdir -p "$OUT"; [ "${SLURM_RESTART_COUNT:-0}" = 1 ] || exit 75')
    sweep = ["optim.lr=1e-3,1e-4", "exits.rank=4,8", "-m"]
    job = launch(slurm, ["tune", "+debug=cpu", *sweep], [python(python_path)], here / "s", nodes=1)
    assert all(slurm.run(f"{job}_{element}")["Restarts"] == "1" for element in range(4))
    seen = {}
    for element, name in enumerate(
        ("0_lr=0.001_rank=4", "1_lr=0.001_rank=8", "2_lr=0.0001_rank=4", "3_lr=0.0001_rank=8")
    ):
        arguments, environment = noted(python_path, attempt=f"1.{element}")
        assert environment["OUT"] == str(here / "s" / name)
        assert f"optim.{name[2:].split('_')[0]}" in arguments
        assert "logging.wandb_group=s" in arguments
        seen[environment["PORT"]] = environment["RUN_ID"]
        assert environment["RUN_ID"] == f"{environment['SLURM_JOB_ID']}.1"
    assert len(seen) == len(set(seen.values())) == 4


@pytest.mark.parametrize(
    ("behaviour", "code", "restarts"),
    [
        ("exit 3", "3:0", "0"),
        ("exit 75", "1:0", "1"),
        ("SAYS=75; " + WRITES + "exit 1", "1:0", "1"),
        ("SAYS=1; " + WRITES + "exit 1", "1:0", "0"),
    ],
)
def test_a_job_is_queued_again_when_the_run_says_so(slurm, here, tmp_path, behaviour, code, restarts):
    second = '[ -z "${SLURM_RESTART_COUNT:-}" ] || exit 1; '  # dies at once
    python_path = recorder(tmp_path / "python", second + behaviour)
    # What an earlier job left; nor may what the first attempt wrote queue the second one again.
    (here / "r").mkdir()
    (here / "r/stopped.json").write_text(json.dumps({"code": 75}, indent=1))
    job = launch(slurm, ["tune", "+debug=cpu"], [python(python_path)], here / "r")
    ended = slurm.run(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", code, restarts)
