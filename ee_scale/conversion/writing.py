"""Fill the files of a conversion: pieces in parallel, each file hashed close behind its writers, synced and named."""

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from ee_scale.conversion.copying import Source, write_piece
from ee_scale.conversion.target_files import TargetFile
from ee_scale.conversion.tensors import Stored

BLOCK = 8 << 20  # bytes


class Writers:
    """Threads that fill files below one folder."""

    def __init__(self, folder: Path, source: Source, workers: int, moved: Callable[[int], None]):
        """`workers`: pieces, and files, in the making at the same time; `moved` is told the bytes as they go."""
        self.folder, self.source, self.moved = folder, source, moved
        self.workers = max(1, workers)
        self.stop = threading.Event()

    def run(self, files: Sequence[TargetFile], done: Callable[[TargetFile, str], None]) -> None:
        """Write all; `done` is told each file and its SHA-256 once it has its name. The first failure ends it."""
        with ThreadPoolExecutor(self.workers) as pieces, ThreadPoolExecutor(self.workers) as whole:
            futures = [whole.submit(self._file, file, pieces, done) for file in files]
            try:
                for future in futures:
                    future.result()
            except _StoppedError:
                raise next(
                    f.exception() for f in futures if not isinstance(f.exception(), _StoppedError | None)
                ) from None
            finally:
                self.stop.set()

    def _file(self, file: TargetFile, pieces: ThreadPoolExecutor, done: Callable[[TargetFile, str], None]) -> None:
        path = self.folder / file.name
        unfinished = path.with_name(f".{path.name}.tmp")
        try:
            self._moved(0)
            path.parent.mkdir(parents=True, exist_ok=True)
            targets = sorted(file.create(unfinished), key=lambda target: target.extent.offset)
            with unfinished.open("r+b") as opened:
                number = opened.fileno()
                futures = [pieces.submit(write_piece, target, self.source, number, self._moved) for target in targets]
                try:
                    digest = _follow(unfinished, targets, futures)
                    os.fsync(opened.fileno())
                except BaseException:
                    self.stop.set()
                    wait(futures)  # before the file they write to is closed
                    raise
            unfinished.replace(path)
            done(file, digest)
        except BaseException:
            self.stop.set()
            unfinished.unlink(missing_ok=True)  # gives its disk space back
            raise

    def _moved(self, size: int) -> None:
        if self.stop.is_set():
            raise _StoppedError
        self.moved(size)


class _StoppedError(Exception):
    """Another thread failed."""


def _follow(path: Path, targets: Sequence[Stored], futures: Sequence[Future]) -> str:
    """SHA-256 of a file while it is written: up to the end of a piece as soon as that and all before it are there."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:  # a buffer would read ahead of the writers
        for target, future in zip(targets, futures, strict=True):
            future.result()
            end = target.extent.offset + target.extent.nbytes
            while file.tell() < end:
                digest.update(file.read(min(BLOCK, end - file.tell())))
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
