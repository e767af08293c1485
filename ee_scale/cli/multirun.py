"""`ee-scale tune -m optim.lr=1e-4,3e-4 exits.rank=8,16`: every combination, one after the other or as a SLURM array."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from ee_scale.cli.console import console
from ee_scale.cli.launch import launch
from ee_scale.config.schema import RECIPES
from ee_scale.errors import FAILED, REQUEUE, UserError
from ee_scale.launching.multirun import INTERRUPTED, Combination, check, expand, last_losses, run_all
from ee_scale.log import configure_logging

FLAGS = ("-m", "--multirun")


def run(prefix: str | None, verb: str, arguments: Sequence[str]) -> int:
    """Run or launch every combination. Returns 0, 1 if one failed, 75 if one was stopped.

    All of them are composed and checked (`UserError`) before the first one starts.
    """
    if verb not in RECIPES or prefix not in (None, "launch"):
        raise UserError(f"-m: goes with {', '.join(RECIPES)} and launch, not with {prefix or verb}")
    combinations = expand(verb, [word for word in arguments if word not in FLAGS])
    config = combinations[0].config
    configure_logging(0, config.logging.level)
    launcher, base = config.launcher, Path(config.out).expanduser().absolute().parent
    if prefix == "launch" and launcher.kind == "torchrun":
        raise UserError("launcher=torchrun: -m goes with launcher=local and launcher=slurm")
    tasks = check(verb, combinations, launched=prefix == "launch")
    if prefix == "launch" and launcher.kind == "slurm":
        return launch(launcher, tasks, base, config.parallel.device)
    commands = [[sys.executable, "-m", "ee_scale", *task.words] for task in tasks]
    if prefix == "launch" and launcher.dry_run:
        sys.stdout.write("".join(shlex.join(["ee-scale", *task.words]) + "\n" for task in tasks))
        return 0
    codes = run_all(combinations, commands)
    show(combinations, codes)
    if INTERRUPTED in codes:
        return INTERRUPTED
    if REQUEUE in codes or None in codes:
        return REQUEUE
    return FAILED if any(codes) else 0


def show(combinations: Sequence[Combination], codes: Sequence[int | None]) -> None:
    """Name, exit code and last losses of every run."""
    losses = [last_losses(Path(combination.config.out).expanduser()) for combination in combinations]
    keys = list(dict.fromkeys(key for found in losses for key in found))
    table = Table()
    table.add_column("run")
    for column in ("code", "step", *(f"loss {key}" for key in keys if key != "step")):
        table.add_column(column, justify="right")
    for combination, code, found in zip(combinations, codes, losses, strict=True):
        cells = [f"{found[key]:.4f}" if key in found else "" for key in keys if key != "step"]
        table.add_row(combination.name, "" if code is None else str(code), f"{found.get('step', '')}", *cells)
    console().print(table)
