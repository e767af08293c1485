"""Progress on a terminal or in a notebook; nothing in a pipe or a file."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
    track,
)

from ee_scale.log import Terminal

T = TypeVar("T")


def tracked(items: Sequence[T], text: str) -> Iterator[T]:
    """The items, with a bar."""
    terminal = Terminal(stderr=True)
    yield from track(items, text, console=terminal, transient=True, disable=not _shows(terminal))


@contextmanager
def shares(text: str) -> Iterator[Callable[[float], None]]:
    """A bar; called with the share that is done."""
    with _bar(1.0, TextColumn(text), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()) as bar:
        yield lambda share: bar.update(bar.task_ids[0], completed=share)


@contextmanager
def transfer(text: str, nbytes: int) -> Iterator[Callable[[int], None]]:
    """A bar for bytes that move; called with those that have moved since the last call."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with _bar(nbytes, TextColumn(text), *columns) as bar:
        yield lambda size: bar.advance(bar.task_ids[0], size)


@contextmanager
def stages() -> Iterator[Callable[[str, float], None]]:
    """A bar for work of several kinds; called with what is done now and the share of it."""
    with _bar(1.0, TextColumn("{task.description}"), BarColumn()) as bar:
        yield lambda what, share: bar.update(bar.task_ids[0], description=what, completed=share)


def _shows(terminal: Terminal) -> bool:
    """Whether somebody looks at it while it changes."""
    return terminal.is_terminal or terminal.is_jupyter


@contextmanager
def _bar(total: float, *columns: ProgressColumn) -> Iterator[Progress]:
    terminal = Terminal(stderr=True)
    with Progress(*columns, console=terminal, transient=True, disable=not _shows(terminal)) as bar:
        bar.add_task("", total=total)
        yield bar
