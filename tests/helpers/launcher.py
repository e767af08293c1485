"""What tests of launchers share: a stand-in for Python, and the end of processes."""

import json
import shlex
import sys
from pathlib import Path

import psutil


def end(pid: int) -> None:
    """Kill a process that is still there, and all below it."""
    if psutil.pid_exists(pid):
        for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
            process.kill()


def recorder(path: Path, behaviour: str = "") -> Path:
    """A stand-in for Python that notes its arguments and environment, then does that.

    path: beside it lie the notes, `<path>.<node>.<attempt>[.<element of an array>]`.
    behaviour: lines of bash; the output folder is "$OUT".
    """
    code = "import json,os,sys; json.dump([sys.argv[1:], dict(os.environ)], open(os.environ['NOTE'], 'w'))"
    lines = [
        "#!/bin/bash",
        'element="${SLURM_ARRAY_TASK_ID:+.$SLURM_ARRAY_TASK_ID}"',
        f'export NOTE={shlex.quote(str(path))}."${{SLURM_NODEID:-x}}.${{SLURM_RESTART_COUNT:-0}}$element"',
        f'{sys.executable} -IS -c "{code}" "$@"',
        behaviour,
    ]
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o755)
    return path


def noted(path: Path, node: int | str = 0, attempt: int | str = 0) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment that a `recorder` saw; attempt: also '<attempt>.<element>'."""
    arguments, environment = json.loads(Path(f"{path}.{node}.{attempt}").read_text())
    return arguments, environment
