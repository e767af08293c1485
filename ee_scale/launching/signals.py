"""SIGTERM and SIGUSR1 on their way from a command to its ranks, and to the commands that it starts."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import psutil

PASSED_ON = (signal.SIGTERM, signal.SIGUSR1)
STOPPING = "EE_SCALE_STOPPING"  # in the environment of ranks that an agent starts again after a signal


@contextmanager
def passing_on(received: list[int], *, of_agent: bool = False) -> Iterator[None]:
    """While the block runs, SIGTERM and SIGUSR1 go to the children of this process and are noted in `received`.

    of_agent: only to an agent's ranks, and ranks that it starts after that leave at once (`STOPPING`).
    """

    def pass_on(number: int, _: FrameType | None) -> None:
        received.append(number)
        if of_agent:
            os.environ[STOPPING] = signal.Signals(number).name
        for child in ranks_of_agent() if of_agent else psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    old = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def ranks_of_agent() -> list[psutil.Process]:
    """The ranks that the agent in this process has started and that have not ended."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # a zombie's environment is one too
            if "LOCAL_RANK" in child.environ():
                found.append(child)
    return found
