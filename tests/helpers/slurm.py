"""A SLURM of one machine: stand-ins for sbatch, srun and scontrol, and the controller that runs what was submitted."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

COMMANDS = {
    # Keeps a copy of the script, as the real one does, with the options of its #SBATCH lines.
    "sbatch": """
script = [word for word in sys.argv[1:] if not word.startswith("--")][0]
lines = [line for line in open(script) if line.startswith("#SBATCH ")]
options = dict((*shlex.split(line)[1].removeprefix("--").split("=", 1), "")[:2] for line in lines)
number = 100 * (1 + len(os.listdir(spool)))
json.dump({"id": number, "options": options, "cwd": os.getcwd()}, open(f"{spool}/{number}.json", "w"))
shutil.copy(script, f"{root}/{number}.script")
print(number)
""",
    # One task per node, ended together when one fails; their ids for whoever sends signals.
    "srun": """
command = [word for i, word in enumerate(sys.argv[1:]) if "--kill-on-bad-exit=1" != word or i]
tasks = []
for number in range(int(os.environ["SLURM_JOB_NUM_NODES"])):
    node = {"SLURM_NODEID": str(number), "SLURM_PROCID": str(number), "SLURMD_NODENAME": f"127.0.0.{number + 1}"}
    tasks.append(subprocess.Popen(command, env={**os.environ, **node}))
steps = f"{root}/{os.environ['SLURM_JOB_ID']}.tasks"
open(steps, "w").write(" ".join(str(task.pid) for task in tasks))
while any(task.poll() is None for task in tasks):
    if any(task.poll() for task in tasks):
        late = time.monotonic() + 5  # the others are leaving too; a code of their own is worth waiting for
        while time.monotonic() < late and any(task.poll() is None for task in tasks):
            time.sleep(0.05)
        [task.terminate() for task in tasks if task.poll() is None]
        [task.wait(30) for task in tasks]
    time.sleep(0.05)
os.remove(steps)
sys.exit(max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks))
""",
    "scontrol": """
if sys.argv[1:3] == ["show", "hostnames"]:
    base, first, last = re.fullmatch(r"(.*)\\[(\\d+)-(\\d+)\\]", sys.argv[3]).groups()
    print("\\n".join(f"{base}{number}" for number in range(int(first), int(last) + 1)))
else:
    assert sys.argv[1] == "requeue"
    open(f"{root}/requeued", "a").write(sys.argv[2] + "\\n")
""",
}


@dataclass(frozen=True)
class Slurm:
    """root: folder of the stand-ins; environment: what every process of a job sees, on top of PATH."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.root / "bin").mkdir(parents=True)
        (self.root / "spool").mkdir()
        imports = "import json, os, re, shlex, shutil, subprocess, sys, time"
        for name, code in COMMANDS.items():
            path = self.root / "bin" / name
            where = f"root = {str(self.root)!r}; spool = root + '/spool'"
            path.write_text(f"#!{sys.executable} -IS\n{imports}\n{where}\n{code}")
            path.chmod(0o755)

    @property
    def path(self) -> str:
        return f"{self.root / 'bin'}:{os.environ['PATH']}"

    def submitted(self) -> list[dict]:
        """Jobs in the order they came."""
        return [json.loads(path.read_text()) for path in sorted((self.root / "spool").iterdir())]

    def requeued(self) -> list[str]:
        """What `scontrol requeue` was asked for."""
        path = self.root / "requeued"
        return path.read_text().split() if path.is_file() else []

    def run(
        self,
        job: dict,
        element: int | None = None,
        signal_when: Callable[[], bool] | None = None,
        to_all: bool = False,
        timeout: float = 180,
    ) -> list[int]:
        """Run a job, or one element of an array, as long as it asks to be queued again; its exit codes.

        signal_when: SIGUSR1 goes to the step when this is first true: to each node's first process, as under
        proctrack/cgroup, or to all.
        """
        nodes, number = job["options"]["nodes"], job["id"] + (element or 0)
        names = {
            "SLURM_JOB_ID": str(number),
            "SLURM_JOB_NUM_NODES": nodes,
            "SLURM_JOB_NODELIST": f"127.0.0.[1-{nodes}]",
        }
        name = str(number)
        if element is not None:
            names |= {"SLURM_ARRAY_JOB_ID": str(job["id"]), "SLURM_ARRAY_TASK_ID": str(element)}
            name = f"{job['id']}_{element}"
        codes: list[int] = []
        while not codes or (len(self.requeued()) == len(codes) and self.requeued()[-1] == name):
            assert len(codes) < 3
            restarted = {"SLURM_RESTART_COUNT": str(len(codes))} if codes else {}
            environment = os.environ | {"PATH": self.path} | self.environment | names | restarted
            log = job["options"]["output"].replace("%j", name).replace("%A_%a", name).replace("%%", "%")
            with open(log, "a") as output:  # --open-mode=append
                command = ["bash", str(self.root / f"{job['id']}.script")]
                options = {"cwd": job["cwd"], "env": environment, "stdout": output, "stderr": output}
                batch = subprocess.Popen(command, **options)
                try:
                    codes.append(self._wait(batch, number, None if codes else signal_when, to_all, timeout))
                finally:
                    end(batch.pid)
        return codes

    def _wait(self, batch, number, signal_when, to_all, timeout) -> int:
        until = time.monotonic() + timeout
        while batch.poll() is None:
            assert time.monotonic() < until, "the job hangs"
            if signal_when is not None and signal_when():
                signal_when = None
                for task in map(int, (self.root / f"{number}.tasks").read_text().split()):
                    below = psutil.Process(task).children(recursive=True) if to_all else []
                    os.kill(task, signal.SIGUSR1)
                    for process in below:
                        process.send_signal(signal.SIGUSR1)
            time.sleep(0.05)
        return batch.returncode


def end(pid: int) -> None:
    """Kill a process that is still there, and all below it."""
    if psutil.pid_exists(pid):
        for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
            process.kill()


def recorder(path: Path, behaviour: str = "") -> Path:
    """A stand-in for Python that notes its arguments and environment in `<path>.<node>.<attempt>`, then does that.

    behaviour: lines of bash; the output folder is "$OUT".
    """
    code = "import json,os,sys; json.dump([sys.argv[1:], dict(os.environ)], open(os.environ['NOTE'], 'w'))"
    lines = [
        "#!/bin/bash",
        f"export NOTE={shlex.quote(str(path))}.${{SLURM_NODEID:-x}}.${{SLURM_RESTART_COUNT:-0}}",
        f'{sys.executable} -IS -c "{code}" "$@"',
        behaviour,
    ]
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o755)
    return path


def noted(path: Path, node: int | str = 0, attempt: int = 0) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment that a `recorder` saw."""
    arguments, environment = json.loads(Path(f"{path}.{node}.{attempt}").read_text())
    return arguments, environment
