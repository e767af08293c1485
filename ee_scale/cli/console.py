"""Where commands write for people: as wide as the terminal, and wide enough for whole lines in a pipe or file."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.progress import track

from ee_scale.log import Terminal

T = TypeVar("T")

PIPE_WIDTH = 140


def console(*, stderr: bool = False) -> Terminal:
    """A console for results (stdout) or for progress and notes (stderr)."""
    terminal = Terminal(stderr=stderr)
    return terminal if terminal.is_terminal else Terminal(stderr=stderr, width=PIPE_WIDTH)


def with_progress(items: Sequence[T], text: str) -> Iterator[T]:
    """The items, with a progress bar on a terminal."""
    err = console(stderr=True)
    yield from track(items, text, total=len(items), console=err, transient=True, disable=not err.is_terminal)
