"""Check a run here, then start it under torchrun or as a SLURM job.

What is started is a script of `launch/` with the values of the config in front (`<out>/launch/`), the same that a
person starts by hand.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ee_scale.config.groups import LauncherConfig
from ee_scale.config.schema import TrainingConfig
from ee_scale.errors import RunError, UserError
from ee_scale.files import write_text
from ee_scale.grid import Layout
from ee_scale.log import log
from ee_scale.planning.fits import check_fits
from ee_scale.training.recipe import recipe_of

TORCHRUN, SBATCH = "torchrun.sh", "slurm.sbatch"
JOB = {"torchrun": "job.sh", "slurm": "job.sbatch"}  # their names in <out>/launch
TIME = re.compile(r"\d+(:\d+(:\d+)?)?|\d+-\d+(:\d+(:\d+)?)?")  # the forms of `man sbatch`
OURS = {
    **{"nodes": "launcher.nodes", "ntasks-per-node": "launcher.nodes", "time": "launcher.time"},
    **{"partition": "launcher.partition", "account": "launcher.account", "signal": "launcher.signal_seconds"},
    **{"array": "-m", "requeue": "nothing: it is always there", "open-mode": "nothing: it is always append"},
}


@dataclass(frozen=True)
class Task:
    """One run: what `ee-scale` is given, its output folder, and ranks per machine."""

    words: list[str]
    out: Path
    processes: int


def check_task(verb: str, config: TrainingConfig, overrides: Sequence[str]) -> Task:
    """The run that a config asks for. Raises `UserError` for what its launcher, its model or its grid refuses."""
    check_launcher(config.launcher)
    recipe = recipe_of(verb).of(config)
    if config.launcher.kind == "local" or config.parallel.device_memory_gb is not None:
        check_fits(recipe.plan)  # this machine may not be like those that the run is for
    layout = recipe.plan.layout
    words = [word for word in overrides if not re.match(r"(--dry[-_]run|(launcher\.)?dry_run=)", word)]
    processes = layout.world_size if config.launcher.kind == "local" else split_grid(layout, config.launcher)
    return Task([verb, *words], Path(config.out).expanduser().absolute(), processes)


def check_launcher(launcher: LauncherConfig) -> None:
    """Refuse settings of group `launcher` that cannot be meant, or that this machine cannot do. Raises `UserError`."""
    if launcher.kind == "local" and launcher.nodes > 1:
        raise UserError(f"launcher.nodes={launcher.nodes}: launcher=local is one machine; take torchrun or slurm")
    if launcher.kind == "torchrun" and launcher.nodes > 1 and not launcher.head:
        raise UserError(f"launcher.head: name the first of launcher.nodes={launcher.nodes} machines; they meet there")
    if launcher.kind == "slurm":
        _check_slurm(launcher)


def _check_slurm(launcher: LauncherConfig) -> None:
    if not TIME.fullmatch(launcher.time):
        forms = "minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]"
        raise UserError(f"launcher.time={launcher.time}: SLURM reads {forms}")
    if launcher.signal_seconds >= (limit := seconds(launcher.time)) > 0:
        raise UserError(
            f"launcher.signal_seconds={launcher.signal_seconds}: launcher.time={launcher.time} is {limit} s in all"
        )
    for option in launcher.sbatch:
        name = option.split("=")[0].split(" ")[0]
        if not re.fullmatch(r"[a-z][a-z-]*", name) or "\n" in option:
            raise UserError(f'launcher.sbatch={option!r}: give a long option without its --, e.g. ["qos=high"]')
        if name in OURS:
            raise UserError(f"launcher.sbatch={option!r}: is set by {OURS[name]}")


def seconds(limit: str) -> int:
    """A time limit of SLURM in seconds; 0 means none."""
    days, dash, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, minutes, rest = [*parts, 0, 0][:3]
    else:
        hours, minutes, rest = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def split_grid(layout: Layout, launcher: LauncherConfig) -> int:
    """Ranks per machine. Raises `UserError` if the grid cannot be laid on the machines."""
    size, nodes, processes = layout.world_size, launcher.nodes, launcher.processes_per_node
    grid = f"tp={layout.tp} x pp={layout.pp} (stages launched) x dp={layout.dp} = {size} ranks"
    if processes is None and size % nodes:
        raise UserError(f"launcher.nodes={nodes}: {grid} cannot be shared equally")
    processes = size // nodes if processes is None else processes
    if nodes * processes != size:
        raise UserError(
            f"launcher.nodes={nodes} x launcher.processes_per_node={processes} = {nodes * processes} ranks, but {grid}"
        )
    if processes % layout.tp:
        raise UserError(
            f"parallel.tp={layout.tp}: does not divide the {processes} ranks per machine, so a tensor-parallel group "
            "would straddle two; change launcher.nodes or parallel.tp"
        )
    return processes


def start(launcher: LauncherConfig, tasks: Sequence[Task], out: Path, device: str) -> None:
    """Write the script to `<out>/launch` and start it; several tasks are one array job. torchrun does not return."""
    script = job_script(launcher, tasks, out, device)
    if launcher.kind == "slurm" and shutil.which("sbatch") is None:
        raise UserError("launcher=slurm: no sbatch on PATH; start this where SLURM is, or look at it with --dry-run")
    path = out / "launch" / JOB[launcher.kind]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, script)
        write_text(path.with_name(TORCHRUN), shipped(TORCHRUN))
    except OSError as error:
        raise UserError(f"out={out}: cannot write there ({error.strerror})") from error
    if launcher.kind == "torchrun":
        log.info("starting %s", path)
        sys.stdout.flush()
        os.execvp("bash", ["bash", str(path)])  # in this process: signals reach it without a go-between
    sent = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    if sent.returncode:
        raise RunError(f"sbatch {path}: {' '.join(sent.stderr.split()) or f'exit code {sent.returncode}'}")
    log.info("job %s: %s; its output lies beside it", sent.stdout.strip().split(";")[0], path)


def job_script(launcher: LauncherConfig, tasks: Sequence[Task], out: Path, device: str) -> str:
    """The shipped script behind the config's values; `tasks` hold as many ranks each."""
    values = {"PYTHON": sys.executable, "NODES": launcher.nodes, "PROCESSES": tasks[0].processes}
    values |= {"MAX_RESTARTS": launcher.max_restarts, "HEAD": launcher.head, "PORT": launcher.port}
    options = []
    if launcher.kind == "slurm":
        values["LAUNCH"] = out / "launch"
        options = [f"#SBATCH --{option}" for option in sbatch_options(launcher, tasks, out, device)]
    lines = [f"export {key}={shlex.quote(str(value))}" for key, value in values.items() if value is not None]
    lines += [f"cd {shlex.quote(os.getcwd())} || exit 1", *launcher.setup]
    calls = [f"export OUT={shlex.quote(str(task.out))}; set -- {shlex.join(task.words)}" for task in tasks]
    if len(tasks) > 1:
        cases = [f"    {number}) {call} ;;" for number, call in enumerate(calls)]
        calls = ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"]
    name = SBATCH if launcher.kind == "slurm" else TORCHRUN
    body = [line for line in shipped(name).splitlines()[1:] if not line.startswith("#SBATCH")]
    heading = "# Written by `ee-scale launch`; a line of launcher.setup may choose another PYTHON."
    return "\n".join(["#!/bin/bash", *options, heading, *lines, *calls, "", f"# launch/{name}", *body]) + "\n"


def sbatch_options(launcher: LauncherConfig, tasks: Sequence[Task], out: Path, device: str) -> list[str]:
    """The options of the shipped script with the config's values, then the user's own."""
    found = [line.removeprefix("#SBATCH --") for line in shipped(SBATCH).splitlines() if line.startswith("#SBATCH")]
    options: dict[str, str | int | None] = dict(map(_name_and_value, found))
    log_name = "slurm-%A_%a.out" if len(tasks) > 1 else "slurm-%j.out"
    options |= {
        "job-name": _quoted(f"ee_scale-{out.name}"),
        "nodes": launcher.nodes,
        "time": launcher.time,
        "signal": f"USR1@{launcher.signal_seconds}",
        "output": _quoted(str(out / "launch").replace("%", "%%") + f"/{log_name}"),
    }
    if device != "cpu":
        options["gpus-per-node"] = tasks[0].processes
    if len(tasks) > 1:
        options["array"] = f"0-{len(tasks) - 1}"
    options |= {name: _quoted(value) for name in ("partition", "account") if (value := getattr(launcher, name))}
    own = dict(map(_name_and_value, launcher.sbatch))
    return [name if value is None else f"{name}={value}" for name, value in (options | own).items()]


def _name_and_value(option: str) -> tuple[str, str | None]:
    name, equals, value = option.partition("=")
    return name, value if equals else None


def _quoted(value: str) -> str:
    """A value in a line of #SBATCH, which sbatch reads with quotes and backslashes of its own."""
    plain = re.fullmatch(r"[\w./%+,:@=-]*", value)
    return value if plain else '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def shipped(name: str) -> str:
    """A file of `launch/`: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    folder = package / "launch" if (package / "launch").is_dir() else package.parent / "launch"
    return (folder / name).read_text(encoding="utf-8")
