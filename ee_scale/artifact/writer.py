"""Checkpoints that are written while training goes on; one that cannot be written is told and tried again."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

from ee_scale.artifact.checkpoint import checkpoints
from ee_scale.artifact.save import NotWrittenError, Snapshot, take_snapshot, write_snapshot
from ee_scale.errors import RunError
from ee_scale.grid import Grid
from ee_scale.log import log
from ee_scale.training.recipe import Run

LEAVE_SECONDS = 30.0  # for a write in flight, when a run leaves because something else failed


@dataclass(frozen=True)
class Outcome:
    """How a write ended, the same on all ranks: `failure` is empty, or 'rank 3: No space left on device'."""

    step: int
    folder: Path | None
    failure: str = ""


class CheckpointWriter(AbstractContextManager):
    """Saves a run; at most one write is in flight. All ranks hold one and call the same methods at the same steps.

    Leaving the `with` block waits a while for a write in flight and raises nothing; `finish` is the regular end.
    """

    def __init__(self, root: Path, grid: Grid, keep: int, *, background: bool):
        self._root, self._grid, self._keep, self._background = root, grid, keep, background
        self._thread: Thread | None = None
        self._outcome: Outcome | None = None  # of the last write that ended
        self._told = True

    def save(self, run: Run, facts: dict[str, Any]) -> None:
        """Take a snapshot of this step and write it: in the background, or before returning.

        Training stands still for the snapshot (see `take_snapshot` for its memory) and, before it, for a write that is
        still in flight. A step that is on disk already is not written again. A failed write does not raise.
        """
        self._wait()
        if self._outcome is not None and self._outcome.step == run.step and not self._outcome.failure:
            return
        snapshot = take_snapshot(run, facts)
        if not self._background:
            self._write(snapshot)
            self.poll()
            return
        # A daemon: a process that must leave does not wait for it, and what it leaves behind has no state.json.
        self._thread = Thread(target=self._write, args=(snapshot,), name="checkpoint writer", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether this rank's write is still in flight."""
        return self._thread is not None and self._thread.is_alive()

    def poll(self) -> None:
        """Tell, on rank 0 and once, how the last write ended."""
        if self.busy or self._told or self._outcome is None:
            return
        self._told = True
        if self._grid.rank == 0 and self._outcome.failure:
            log.warning(
                "step %d: checkpoint not written (%s); the last good one is %s; training goes on and the next save "
                "tries again",
                *(self._outcome.step, self._outcome.failure, self._last_good()),
            )
        elif self._grid.rank == 0:
            log.info("saved %s", self._outcome.folder)

    def finish(self) -> None:
        """Wait for the write in flight. Raises `RunError` on all ranks if the last checkpoint was not written."""
        self._wait()
        if self._outcome is not None and self._outcome.failure:
            raise RunError(
                f"step {self._outcome.step}: the last checkpoint was not written ({self._outcome.failure}); "
                f"the last good one is {self._last_good()}"
            )

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._wait(LEAVE_SECONDS)

    def _wait(self, seconds: float | None = None) -> None:
        if self._thread is not None:
            self._thread.join(seconds)
        self.poll()

    def _write(self, snapshot: Snapshot) -> None:
        try:
            folder = write_snapshot(self._root, snapshot, self._grid, self._keep)
            self._outcome = Outcome(snapshot.step, folder)
        except NotWrittenError as error:
            self._outcome = Outcome(snapshot.step, None, str(error))
        except Exception as error:  # a rank is gone: the training learns of it by itself
            self._outcome = Outcome(snapshot.step, None, f"rank {self._grid.rank}: {error}")
        self._told = False

    def _last_good(self) -> str:
        return max((folder.name for folder in checkpoints(self._root).values()), default="none")
