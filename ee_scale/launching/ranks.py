"""torchrun's agent, in this process, with signals passed on to the ranks.

torchrun answers a signal by ending its ranks, 30 s later by force. Here SIGTERM and SIGUSR1 reach the ranks: they agree
on a step, save and leave with code 75 (`ee_scale.training.loop`); the agent only waits for them.
`python -m ee_scale.launching.ranks` is `torchrun` with that difference: launch/torchrun.sh starts it on every node.
"""

import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import current_thread, main_thread
from typing import TYPE_CHECKING

from ee_scale.errors import BAD_INPUT, FAILED, REQUEUE, STOPPED, Requeue, RunError, UserError
from ee_scale.launching.signals import passing_on
from ee_scale.libraries import kept_environment
from ee_scale.log import spelled
from ee_scale.reading import Count, check_fields, read_object

if TYPE_CHECKING:
    import torch

HANDLED = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # torchrun ends the ranks at these
# torch 2.13 keeps one store for all rounds, where ranks that start again find addresses of ranks that are gone.
OWN_STORE = ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
GRACE = 30.0  # seconds that ranks may go on after the run has ended on another machine


@dataclass
class Ended:
    """How the ranks ended. code: 0, that of the first rank that failed (below 0: killed by that signal).

    signals: what was passed on to them.
    """

    code: int = 0
    rank: int = 0
    signals: list[int] = field(default_factory=list)


def run_ranks(
    verb: str,
    overrides: Sequence[str],
    world_size: int,
    device: "torch.device",
    out: Path | None = None,
    max_restarts: int = 0,
) -> int:
    """Run a command in `world_size` ranks on this machine; returns the exit code.

    out: folder whose stopped.json tells why a run left; max_restarts: times that all ranks start again after one died.
    Raises `UserError` for too few GPUs and outside the main thread, `RunError` and `Requeue` as the ranks ended.
    """
    import torch

    if current_thread() is not main_thread():
        raise UserError(f"{world_size} ranks: signals are passed on to them, which needs Python's main thread")
    if device.type == "cuda" and world_size > torch.cuda.device_count():
        raise UserError(
            f"the grid needs {world_size} GPUs and this node has {torch.cuda.device_count()}; "
            "start it on several nodes with ee-scale launch, or make the grid smaller"
        )
    environment = {}
    if device.type == "cpu":
        threads = max(1, (os.cpu_count() or 1) // world_size)
        environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)), "DS_ACCELERATOR": "cpu"}
    arguments = ["--standalone", "--nproc-per-node", str(world_size), "--max-restarts", str(max_restarts)]
    return exit_code(run_agent([*arguments, "-m", "ee_scale", verb, *overrides], environment), out)


def run_agent(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Ended:
    """`torchrun <arguments>` in this process, until all its ranks have ended.

    Raises `RunError` where the other machines of the run are gone, `Requeue` if they are after a signal.
    """
    with restored():
        # When another machine is gone, its store's clients print C++ stacks; what follows from it is told in a line.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError

    from ee_scale.launching.agent import UNREACHABLE, our_agent

    _quieten()
    ended = Ended()
    with restored(), our_agent(GRACE), passing_on(ended.signals, of_agent=True):
        os.environ.update(environment or {})
        os.environ.setdefault(*OWN_STORE)
        try:
            run.main(["--signals-to-handle", ",".join(number.name for number in HANDLED), *arguments])
        except ChildFailedError as error:
            ended.rank, failure = error.get_first_failure()
            ended.code = failure.exitcode
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            ended.code = -error.sigval
        except RendezvousError as error:
            reason = "has ended on another machine" if isinstance(error, RendezvousClosedError) else UNREACHABLE
            if ended.signals:
                name = signal.Signals(ended.signals[0]).name
                raise Requeue(f"{name} came, and the run {reason}; the same command goes on") from None
            raise RunError(f"the run {reason}") from None
    return ended


def exit_code(ended: Ended, out: Path | None = None) -> int:
    """The exit code of a command whose ranks ended like this; what a person must be told is raised."""
    if ended.code == 0:
        return 0
    if out is not None and (out / STOPPED).is_file():
        stopped = read_object(out / STOPPED)
        check_fields(stopped, out / STOPPED, code=Count)
        return stopped["code"]  # rank 0 has said why
    if ended.code in (REQUEUE, BAD_INPUT):  # a rank has said why
        return ended.code
    if ended.signals and ended.code == -ended.signals[0]:
        name = signal.Signals(ended.signals[0]).name
        raise Requeue(f"{name} came before the ranks were ready; the same command goes on from the last checkpoint")
    if ended.code < 0:
        raise RunError(f"rank {ended.rank} was killed by {signal.Signals(-ended.code).name}")
    raise RunError(f"rank {ended.rank} failed with exit code {ended.code}; its own words are above")


@contextmanager
def restored() -> Iterator[None]:
    """What torchrun changes in a process of its own, put back: environment and signal handlers."""
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    try:
        with kept_environment():
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _quieten() -> None:
    """Keep torchrun's line on a rank that died; drop those on ranks that left on purpose, or are ended after it."""
    logger = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    logger.setLevel(logging.ERROR)
    logger.addFilter(_tells_a_failure)


def _tells_a_failure(record: logging.LogRecord) -> bool:
    return not (isinstance(record.args, tuple) and record.args and record.args[0] in (REQUEUE, BAD_INPUT))


def main(arguments: Sequence[str] | None = None) -> int:
    """torchrun's command line; returns the exit code."""
    try:
        return exit_code(run_agent(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        return 130
    except Requeue as left:
        line, code = str(left), REQUEUE
    except UserError as error:
        line, code = f"error: {error}", BAD_INPUT
    except RunError as error:
        line, code = f"error: {error}", FAILED
    sys.stderr.write(f"{spelled(line)}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
