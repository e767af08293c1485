"""`launch/torchrun.sh` on two hosts: namespaces with a network and a name of their own, and a cable in between."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import cable, hold
from helpers.cli import run_cli
from helpers.machines import Machine, wait_for, why_no_machines

import ee_scale

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(bool(reason := why_no_machines(network=True)), reason=f"hosts: {reason}"),
]

ROOT = Path(ee_scale.__file__).parents[1]
NAMES = ("host1", "host2")
STEPS = 8
HELD = 3


@pytest.fixture
def machines(tmp_path):
    """Two machines without a cable."""
    hosts = tmp_path / "hosts"
    known = [f"{address} {name}" for address, name in zip(cable.ADDRESSES, NAMES, strict=True)]
    hosts.write_text("\n".join(["127.0.0.1 localhost", *known]) + "\n")
    found = []
    try:
        for name in NAMES:
            found.append(Machine(name, hosts, network=True))
        yield tuple(found)
    finally:
        for machine in found:
            machine.kill()


@pytest.fixture(scope="module")
def tune(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    (folder / "train.txt").write_text("\n".join(f"line {i} of {i * i % 97} words" for i in range(2000)))
    data = [f"data={folder}/train.txt", f"data.cache_dir={folder}", "data.seq_length=32"]
    return ["tune", "+debug=cpu", *data, f"train.steps={STEPS}", "train.save_every=100", "logging.every=1"]


@pytest.fixture(scope="module")
def undisturbed(tune, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("undisturbed")
    finished = run_cli([*tune, "out=run"], folder, 2)
    assert finished.codes == [0, 0], finished.output
    return losses(folder / "run")


def losses(out: Path) -> list[dict]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def start(machines: tuple[Machine, Machine], command: list[str], folder: Path) -> list[subprocess.Popen]:
    """One rank on each host; rank 1 holds after step `HELD`."""
    (line,) = hold.setup(folder / "site", 1, {"0.0": HELD})
    names = dict(word.split("=", 1) for word in line.split()[1:])
    names |= {"NODES": "2", "HEAD": "host1", "OUT": str(folder / "run"), "PYTHON": sys.executable}
    names |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": cable.INTERFACE, "DS_ACCELERATOR": "cpu"}
    started = []
    for machine in machines:
        words = machine.command(["bash", str(ROOT / "launch/torchrun.sh"), *command])
        with open(folder / machine.name, "w") as output:
            environment = {**os.environ, **names}
            started.append(subprocess.Popen(words, cwd=folder, env=environment, stdout=output, stderr=output))
    return started


def wait_until_held(started: list[subprocess.Popen], folder: Path) -> None:
    def is_held() -> bool:
        assert all(process.poll() is None for process in started), told(folder)
        return (folder / "run/held_0.0").is_file()

    wait_for(is_held, f"step {HELD} of {folder}")


def told(folder: Path) -> list[str]:
    return [(folder / name).read_text() for name in NAMES]


def codes(started: list[subprocess.Popen]) -> list[int]:
    return [process.wait(500) for process in started]


def test_a_pulled_cable_ends_both_sides(machines, tune, tmp_path):
    """Each names the rank that it does not hear of, with its stage and host, and leaves."""
    cable.join(machines)
    started = start(machines, [*tune, "parallel.timeout_minutes=0.5"], tmp_path)
    wait_until_held(started, tmp_path)
    cable.plug(machines[1], "down")
    (tmp_path / "run/go").touch()
    assert codes(started) == [1, 1], told(tmp_path)
    first, second = told(tmp_path)
    assert re.search(r"rank 0 leaves: rank 1 \(stage 1, dp 0, tp 0; host host2, pid \d+\) has not been heard of", first)
    assert re.search(
        r"rank 1 leaves: rank 1 \(stage 1, dp 0, tp 0; host host2, pid \d+\) waits in '.*' of step 4", second
    )
    assert "Traceback" not in first + second


@pytest.mark.skipif(not os.path.exists(cable.TUN), reason=f"hosts: no {cable.TUN}")
def test_a_bad_cable_changes_nothing(machines, tune, undisturbed, tmp_path):
    """100 ms late, one packet in a hundred lost, and pulled for a moment."""
    carriers = cable.join_badly(machines, delay=0.1, loss=0.01)
    started = start(machines, tune, tmp_path)
    wait_until_held(started, tmp_path)
    cable.plug(machines[0], "down")
    (tmp_path / "run/go").touch()
    time.sleep(3)  # messages get lost meanwhile, on a slow machine fewer of them
    cable.plug(machines[0], "up")
    assert codes(started) == [0, 0], told(tmp_path)
    assert losses(tmp_path / "run") == undisturbed
    assert "Traceback" not in "".join(told(tmp_path))
    for machine, carrier in zip(machines, carriers, strict=True):
        machine.kill()
        carrier.wait()
