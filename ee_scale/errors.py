"""How a run ends when it does not end well: what a person reads, and the exit code."""

STOPPED = "stopped.json"  # in a run's output folder: why it left before its end, for whoever would start it again
BAD_INPUT, FAILED, REQUEUE = 2, 1, 75  # 75: EX_TEMPFAIL of sysexits.h, "try again later"


class UserError(ValueError):
    """Bad input (config, file, request), in one line that names the field, its value and the numbers in conflict.

    The CLI prints the line and leaves with exit code 2.
    """


class RunError(RuntimeError):
    """A run that cannot go on (losses are no numbers, a rank hangs), in one line. Exit code 1."""


class OutOfMemoryError(RunError):
    """A rank found no memory left. It alone knows, so it says the line itself."""


class Requeue(SystemExit):
    """A signal asked the run to leave; its state is saved, the same command goes on. Exit code 75.

    No `Exception`, so that nothing on the way up takes it for a failure.
    """


def one_line(error: BaseException) -> str:
    """The first line of what an error of a library says, with its end; one without words says what it is."""
    first, *more = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return f"{first} {more[0]}"[:300] if more and first.endswith(":") else first[:300]
