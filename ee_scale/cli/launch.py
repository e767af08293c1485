"""Start the ranks of a command on this machine, through torchrun."""

import os
import subprocess
import sys
from collections.abc import Sequence

import torch

from ee_scale.errors import UserError


def run_ranks(verb: str, overrides: Sequence[str], world_size: int, device: torch.device) -> int:
    """`torchrun --standalone --nproc-per-node <world_size> -m ee_scale <verb> ...`; returns its exit code."""
    if device.type == "cuda" and world_size > torch.cuda.device_count():
        raise UserError(
            f"the grid needs {world_size} GPUs and this node has {torch.cuda.device_count()}; "
            "start it on several nodes with torchrun, or make the grid smaller"
        )
    environment = os.environ.copy()
    if device.type == "cpu":
        threads = max(1, (os.cpu_count() or 1) // world_size)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        environment["DS_ACCELERATOR"] = "cpu"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    return subprocess.run([*command, "-m", "ee_scale", verb, *overrides], env=environment, check=False).returncode
