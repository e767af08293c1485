"""`ee-scale launch tune|supernet ...`: check a run here, then start it here, under torchrun, or as a SLURM job."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ee_scale.cli import train
from ee_scale.config.groups import LauncherConfig
from ee_scale.config.schema import TrainingConfig
from ee_scale.launching.scripts import Task, check_task, job_script, start
from ee_scale.log import configure_logging


def run(verb: str, config: TrainingConfig, overrides: Sequence[str]) -> int:
    """Launch one run; returns the exit code of what was started, 0 for a job that SLURM took."""
    configure_logging(0, config.logging.level)
    launcher = config.launcher
    task = check_task(verb, config, overrides)
    if launcher.kind != "local":
        return launch(launcher, [task], task.out, config.parallel.device)
    if launcher.dry_run:
        sys.stdout.write(shlex.join(["ee-scale", *task.words]) + "\n")
        return 0
    return train.run(verb, config, task.words[1:])


def launch(launcher: LauncherConfig, tasks: Sequence[Task], out: Path, device: str) -> int:
    """Start the script of these tasks, or print it."""
    if launcher.dry_run:
        sys.stdout.write(job_script(launcher, tasks, out, device))
    else:
        start(launcher, tasks, out, device)
    return 0
