"""Where commands write for people: as wide as the terminal, and wide enough for whole lines in a pipe or file."""

from ee_scale.log import Terminal

PIPE_WIDTH = 140


def console(*, stderr: bool = False) -> Terminal:
    """A console for results (stdout) or for progress and notes (stderr)."""
    terminal = Terminal(stderr=stderr)
    return terminal if terminal.is_terminal else Terminal(stderr=stderr, width=PIPE_WIDTH)
