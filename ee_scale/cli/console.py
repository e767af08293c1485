"""Where commands write for people: as wide as the terminal, and wide enough for whole lines in a pipe or file."""

from rich.console import Console

PIPE_WIDTH = 140


def console(*, stderr: bool = False) -> Console:
    """A console for results (stdout) or for progress and notes (stderr)."""
    terminal = Console(stderr=stderr)
    return terminal if terminal.is_terminal else Console(stderr=stderr, width=PIPE_WIDTH)
