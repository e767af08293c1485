"""`ee-scale convert`: checkpoints of one world into those of another."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ee_scale.cli.console import console
from ee_scale.config.convert import ConvertConfig
from ee_scale.conversion.check.verify import TOKENS, verify
from ee_scale.conversion.copying import differing_copies
from ee_scale.conversion.execute import Conversion
from ee_scale.conversion.execute import run as write_files
from ee_scale.conversion.plan import make_conversion, open_result
from ee_scale.conversion.show import plan_lines, summary
from ee_scale.errors import UserError
from ee_scale.log import configure_logging


def run(config: ConvertConfig, overrides: Sequence[str]) -> int:
    """Plan, then print the plan or carry it out; with `verify`, compare source and result."""
    configure_logging()
    out = config.out_folder
    if out.exists():
        raise UserError(f"out={out}: exists already; choose another folder")
    conversion = make_conversion(config)
    if config.verify and conversion.opened.model.config is None:
        raise UserError("verify=true: without a config there is no model to run; give model=<Hugging Face folder>")
    if config.plan:
        for line in plan_lines(conversion):
            console().print(line, highlight=False, soft_wrap=True)
        return 0
    err = console(stderr=True)
    copies = [
        f"{item.extent.path}: '{item.piece.key}' differs from what it is a copy of, which is what counts"
        for item in differing_copies(conversion.opened.stored, conversion.source)
    ]
    for note in [*copies, *conversion.notes]:
        err.print(note, highlight=False, soft_wrap=True)
    _write(conversion, config.workers, err, _check(conversion, config, err) if config.verify else lambda folder: None)
    for line in conversion.source.values.lines():
        err.print(line, highlight=False, soft_wrap=True)
    err.print(f"wrote {out}", highlight=False, soft_wrap=True)
    return 0


def _check(conversion: Conversion, config: ConvertConfig, err: Console) -> Callable[[Path], None]:
    """Compare what was written with the source, before it gets its name."""

    def check(folder: Path) -> None:
        result = open_result(config, folder)
        try:
            with err.status("comparing source and result"):
                found = verify(conversion.opened, result)
        except UserError as error:
            raise UserError(f"{error}; what was written is in {folder}, under no other name") from error
        console().print(
            f"verified: {found.steps} points on {TOKENS} random tokens; largest relative difference: hidden states "
            f"{found.hidden:.2g}, logits {found.logits:.2g}; same top token {found.same_tokens:.1%}",
            highlight=False,
        )

    return check


def _write(conversion: Conversion, workers: int, err: Console, check: Callable[[Path], None]) -> None:
    err.print(summary(conversion), highlight=False)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("writing"), *columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=conversion.nbytes)
        write_files(conversion, workers, lambda size: bar.advance(task, size), check)
