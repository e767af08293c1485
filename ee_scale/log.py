"""Logging: one logger for the package; ranks other than 0 are silent below WARNING. And what a terminal is told."""

import logging
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.logging import RichHandler
from rich.segment import Segment
from rich.table import Table

log = logging.getLogger("ee_scale")
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Terminal(Console):
    """A console for text that may come from anywhere: it is shown, and neither markup nor commands for the terminal."""

    def __init__(self, **kwargs: Any):
        super().__init__(**{"markup": False, **kwargs})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As the base class; a control character becomes a sign for it."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def titled_table(title: str, right: Sequence[str], *, left: Sequence[str] = ()) -> Table:
    """A table without rows: columns of text, then columns of numbers."""
    table = Table(title=title, title_justify="left")
    for column in left:
        table.add_column(column)
    for column in right:
        table.add_column(column, justify="right")
    return table


def visible(text: str) -> str:
    """Text for a terminal: lines and tabs stay, other control characters become a sign."""
    return CONTROLS.sub("\ufffd", text)


def spelled(text: str) -> str:
    """Text for one line: what cannot be printed is spelled as in Python."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def configure_logging(rank: int = 0, level: str = "info") -> None:
    """Send records to stderr, once per process: in colour on a terminal, as plain lines into a file or pipe."""
    if sys.stderr.isatty():
        handler: logging.Handler = RichHandler(console=Terminal(stderr=True), show_path=False)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(level.upper() if rank == 0 else logging.WARNING)
    for noisy in ("DeepSpeed", "megatron", "transformers", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
