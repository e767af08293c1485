"""The agents of a run on two machines, with ranks that are a few lines: how they leave, and what they say."""

import socket
import subprocess
import sys

import psutil
import pytest
from helpers.machines import wait_for

SHORT_GRACE = "import sys; from ee_scale.launching import ranks; ranks.GRACE = 3.0; sys.exit(ranks.main())"
# A rank of the first machine ends with that code; the other one's is still busy for a moment after it is gone.
RANK = """
import os, signal, sys, time
store, code = sys.argv[1:]
node = os.environ["GROUP_RANK"]
print("started", flush=True)
if code == "kill":
    if node == "0":
        os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(0 if node == "0" else 600)
    sys.exit(0)
code, *other = map(int, code.split(","))
open(store + node, "w").write(str(os.getpid()))
if node == "0":
    while not os.path.exists(store + "1"):
        time.sleep(0.01)
elif other:
    time.sleep(other[0])
else:
    while True:
        try:
            os.kill(int(open(store + "0").read()), 0)
        except (FileNotFoundError, ValueError):
            pass
        except ProcessLookupError:
            break
        time.sleep(0.01)
    time.sleep(1)
sys.exit(code)
"""


def start(tmp_path, code: str, restarts: int = 3, nodes: tuple[int, ...] = (0, 1)) -> list[subprocess.Popen]:
    """Agents, the one that holds the store first."""
    (tmp_path / "rank.py").write_text(RANK)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    agents = []
    for node in nodes:
        meeting = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=a"]
        meeting += [f"--rdzv-conf=is_host={'false' if node else 'true'}", f"--local-addr=127.0.0.{node + 1}"]
        rank = ["--no-python", sys.executable, "-IS", str(tmp_path / "rank.py"), str(tmp_path / "rank"), code]
        command = [sys.executable, "-c", SHORT_GRACE, *meeting, f"--max-restarts={restarts}", *rank]
        agents.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return agents


def run(tmp_path, *arguments) -> tuple[list[int], list[str], list[str]]:
    """Codes, outputs and errors of two agents."""
    agents = start(tmp_path, *arguments)
    told = [agent.communicate(timeout=300) for agent in agents]
    return [agent.returncode for agent in agents], [out for out, _ in told], [error for _, error in told]


@pytest.mark.parametrize("code", [0, 75, 2])
def test_agents_leave_without_a_word_and_start_nothing_again(tmp_path, code):
    codes, outputs, errors = run(tmp_path, str(code))
    assert codes == [code, code], errors
    assert errors == ["", ""]
    assert outputs == ["started\n", "started\n"]


def test_a_run_that_failed_ends_on_the_other_machine(tmp_path):
    codes, _, errors = run(tmp_path, "3,600", 0)
    assert codes == [1, 1]
    assert "error: rank 0 failed with exit code 3" in errors[0]
    assert errors[1] == "error: the run has ended on another machine\n"


def test_a_machine_that_is_gone_is_told_in_a_line(tmp_path):
    codes, _, errors = run(tmp_path, "kill")
    assert codes == [-9, 1]
    assert errors[1].splitlines()[-1] == "error: the run cannot be reached: the machine where all meet is gone"
    assert "Traceback" not in errors[1]
    assert "frame #" not in errors[1]


def test_a_signal_ends_the_wait_for_another_machine(tmp_path):
    (agent,) = start(tmp_path, "0", nodes=(0,))
    wait_for(lambda: [link for link in psutil.Process(agent.pid).net_connections() if link.status == "LISTEN"], "agent")
    agent.terminate()
    output, error = agent.communicate(timeout=300)
    assert agent.returncode == 75
    assert error == "SIGTERM came before the ranks were ready; the same command goes on from the last checkpoint\n"
    assert output == ""
