"""A real SLURM of two nodes on one machine, all of it below one folder."""

import os
import shutil
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil

from helpers.machines import Machine, wait_for, why_no_machines

NODES = ("node1", "node2")
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
PlugStackConfig=/dev/null
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=300
NodeName=node1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName=node2 NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=all Nodes=ALL Default=YES State=UP MaxTime=INFINITE
"""


def why_no_slurm() -> str:
    """Why it cannot run here; empty where it can."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"SLURM: not installed: {', '.join(missing)} (Debian: slurm-wlm, munge)"
    reason = why_no_machines()
    return f"SLURM: {reason}" if reason else ""


class Slurm:
    """Controller and nodes; `environment` is what its commands need."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self.nodes: dict[str, Machine] = {}
        self._begin: dict[str, str] = {}  # of jobs that were queued again
        self._daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        key, hosts = self.folder / "munge.key", self.folder / "hosts"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        hosts.write_text(f"127.0.0.1 localhost {' '.join(NODES)} {socket.gethostname()}\n")
        text = CONFIG.format(folder=self.folder, host=socket.gethostname(), ports=_free_ports(3))
        (self.folder / "slurm.conf").write_text(text)
        for name in ("state", *NODES):
            (self.folder / name).mkdir()
        files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid"}
        files |= {"log-file": "munged.log", "seed-file": "munged.seed"}
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        self._daemons.append(self._daemon(["munged", "--foreground", "--force", *options], "munged"))
        wait_for((self.folder / "munge.sock").exists, "munged")
        self._daemons.append(self._daemon(["slurmctld", "-D"], "slurmctld"))
        for name in NODES:
            self.boot(name)

    def boot(self, name: str) -> None:
        """Start a node that is not there, and wait until it takes jobs."""
        self.nodes[name] = Machine(name, self.folder / "hosts")
        # The machine ends its daemon, and with it the steps.
        self._daemon(self.nodes[name].command(["slurmd", "-D", "-N", name]), name)
        wait_for(lambda: self._node_state(name) == "IDLE", f"{name}: see {self.folder}")

    def stop(self) -> None:
        """End all of it."""
        for node in self.nodes.values():
            node.kill()
        for daemon in reversed(self._daemons):
            below = []
            with suppress(psutil.NoSuchProcess):
                below = psutil.Process(daemon.pid).children(recursive=True)
            daemon.kill()
            daemon.wait()
            for process in below:
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    def _daemon(self, command: list[str], name: str) -> subprocess.Popen:
        with open(self.folder / f"{name}.out", "ab") as output:
            command = ["setpriv", "--pdeathsig", "KILL", *command]
            environment = os.environ | self.environment
            return subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=self.folder)

    def _node_state(self, name: str) -> str:
        with suppress(subprocess.CalledProcessError):  # the controller starts
            return _fields(self.ask("scontrol", "show", "-o", "node", name))["State"]
        return ""

    def ask(self, *words: str) -> str:
        """Output of one of its commands."""
        environment = os.environ | self.environment
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout

    def job(self, name: str) -> dict[str, str]:
        """What `scontrol show job` says of a job, or of one element of an array."""
        return _fields(self.ask("scontrol", "show", "-o", "job", name))

    def last_job(self) -> str:
        """The id of what was submitted last."""
        jobs = self.ask("scontrol", "show", "-o", "job").splitlines()
        found = [_fields(line) for line in jobs]
        return str(max(int(job.get("ArrayJobId", job["JobId"])) for job in found))

    def start_now(self, name: str) -> dict[str, str]:
        """What `job` says; one that was queued again starts soon, not in two minutes.

        SLURM waits so long because a node that has not cleaned up after a job fails it at once.
        """
        job = self.job(name)
        if (
            job["JobState"] == "PENDING"
            and job["Reason"] == "BeginTime"
            and job["EligibleTime"] != self._begin.get(name)
        ):
            title = f"slurmstepd: [{job['JobId']}."
            if not any(title in node.run("ps", "-eo", "args") for node in self.nodes.values()):
                self.ask("scontrol", "update", f"JobId={name}", "StartTime=now+4")
                self._begin[name] = self.job(name)["EligibleTime"]
        return job

    def wait(self, name: str, *states: str) -> dict[str, str]:
        """Until a job is in one of these states."""

        def there() -> dict[str, str] | None:
            job = self.job(name) if "PENDING" in states else self.start_now(name)
            return job if job["JobState"] in states else None

        return wait_for(there, f"job {name}: {' or '.join(states)}; now {self.job(name)['JobState']}")

    def run(self, name: str) -> dict[str, str]:
        """Until a job has ended for good."""
        return self.wait(name, *ENDED)


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "BOOT_FAIL", "OUT_OF_MEMORY")


def _fields(line: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
