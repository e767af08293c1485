"""Machines inside this one: namespaces with a host name, processes, an /etc/hosts and, if wanted, a network.

Everything hangs on one process: when it ends, or whoever started it, all of the machine is gone, and no trace is left.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

PATIENCE = 500.0  # seconds: only what hangs for good comes near


def wait_for(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """The first true value of `condition`."""
    until = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < until, f"waited in vain: {what}"
        time.sleep(0.05)
    return found


def why_no_machines(network: bool = False) -> str:
    """Why there can be none here; empty where there can."""
    if os.geteuid():
        return "needs root"
    tools = ["unshare", "nsenter", "setpriv", *(["ip"] if network else [])]
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        return f"not installed: {', '.join(missing)}"
    tried = subprocess.run([*_unshare(network), "true"], capture_output=True, text=True, check=False)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


def _unshare(network: bool) -> list[str]:
    own = ["--net"] if network else []
    return ["unshare", *own, "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]


class Machine:
    """A machine called `name` whose /etc/hosts is that file."""

    def __init__(self, name: str, hosts: Path, *, network: bool = False):
        self.name = name
        script = 'hostname "$0" && mount --bind "$1" /etc/hosts && exec sleep infinity'
        command = ["setpriv", "--pdeathsig", "KILL", *_unshare(network), "sh", "-c", script, name, str(hosts)]
        self._process = subprocess.Popen(command)
        self.pid = wait_for(self._init, f"machine {name}")

    def _init(self) -> int | None:
        children = psutil.Process(self._process.pid).children()
        return children[0].pid if children and children[0].name() == "sleep" else None

    def command(self, words: Sequence[str]) -> list[str]:
        """What starts that command there, in the working directory of the one who starts it."""
        return ["nsenter", "--target", str(self.pid), "--mount", "--uts", "--net", "--pid", *words]

    def run(self, *words: str) -> str:
        """Output of a command there. Raises CalledProcessError."""
        return subprocess.run(self.command(words), capture_output=True, text=True, check=True).stdout

    def kill(self) -> None:
        """As if the plug were pulled: all its processes are gone."""
        self._process.kill()  # takes the first process with it, and that one all others
        self._process.wait()
        wait_for(lambda: not psutil.pid_exists(self.pid), f"end of {self.name}")
