"""`ee-scale export`: files that transformers opens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from ee_scale.artifact.export import export_bytes, export_early_exit, export_sidecar
from ee_scale.artifact.run_folder import read_run
from ee_scale.cli.console import console


def run(config: Any, overrides: Sequence[str]) -> int:
    """Write the folder `out`."""
    source, out = Path(config.src).expanduser(), Path(config.out).expanduser()
    err = console(stderr=True)
    read_run(source)
    if config.kind == "sidecar":
        export_sidecar(source, out, config.step)
    else:
        columns = (TextColumn("copying the base model"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
            task = bar.add_task("", total=export_bytes(source))
            export_early_exit(source, out, config.step, lambda size: bar.advance(task, size))
    err.print(f"wrote {out}", highlight=False)
    return 0
