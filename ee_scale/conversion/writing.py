"""Fill the files of a conversion: blocks in parallel, each file hashed in order on the way, synced and named."""

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch

from ee_scale.conversion.copying import Part, Source, parts_of, write_part
from ee_scale.conversion.target_files import TargetFile
from ee_scale.conversion.tensors import Stored

FLUSH = 64 << 20  # bytes of a file after which the disk is set to work


class Writers:
    """Threads that fill files below one folder."""

    def __init__(self, folder: Path, source: Source, workers: int, moved: Callable[[int], None]):
        """`workers`: blocks, and files, in the making at the same time; `moved` is told the bytes as they go."""
        self.folder, self.source, self.moved = folder, source, moved
        self.workers = max(1, workers)
        self.stop = threading.Event()

    def run(self, files: Sequence[TargetFile], done: Callable[[TargetFile, str], None]) -> None:
        """Write all; `done` is told each file and its SHA-256 once it has its name. The first failure ends it."""
        with ThreadPoolExecutor(self.workers) as blocks, ThreadPoolExecutor(self.workers) as whole:
            futures = [whole.submit(self._file, file, blocks, done) for file in files]
            try:
                for future in futures:
                    future.result()
            except _StoppedError:
                raise next(
                    f.exception() for f in futures if not isinstance(f.exception(), _StoppedError | None)
                ) from None
            finally:
                self.stop.set()

    def _file(self, file: TargetFile, blocks: ThreadPoolExecutor, done: Callable[[TargetFile, str], None]) -> None:
        path = self.folder / file.name
        unfinished = path.with_name(f".{path.name}.tmp")
        try:
            self._moved(0)
            path.parent.mkdir(parents=True, exist_ok=True)
            targets = sorted(file.create(unfinished), key=lambda target: target.extent.offset)
            with unfinished.open("r+b") as opened, ThreadPoolExecutor(1) as disk:
                digest = self._fill(opened.fileno(), targets, blocks, disk)
                os.fsync(opened.fileno())
            unfinished.replace(path)
            done(file, digest)
        except BaseException:
            self.stop.set()
            unfinished.unlink(missing_ok=True)  # gives its disk space back
            raise

    def _fill(self, file: int, targets: Sequence[Stored], blocks: ThreadPoolExecutor, disk: ThreadPoolExecutor) -> str:
        """Fill targets, in the order of the file; returns its SHA-256. No more blocks are under way than buffers."""
        digest, waiting = _Digest(file), deque[tuple[int, Future[memoryview]]]()
        largest = max((part.extent.nbytes for part in parts_of(targets)), default=0)
        buffers = [torch.empty(largest, dtype=torch.uint8) for _ in range(self.workers + 1)]
        flushed, flush = 0, disk.submit(int)
        try:
            for number, part in enumerate(parts_of(targets)):
                if number >= len(buffers):
                    digest.add(*waiting.popleft())
                if digest.at - flushed >= FLUSH and flush.done():
                    flush.result()
                    flushed, flush = digest.at, disk.submit(os.fdatasync, file)
                buffer = buffers[number % len(buffers)]
                waiting.append((part.extent.offset, blocks.submit(self._write, part, file, buffer)))
            for place, block in waiting:
                digest.add(place, block)
            flush.result()  # a disk reports an error once
            return digest.end()
        except BaseException:
            self.stop.set()
            wait([block for _, block in waiting])  # before the file they write to is closed
            raise

    def _write(self, part: Part, file: int, buffer: torch.Tensor) -> memoryview:
        block = write_part(part, self.source, file, buffer)
        self._moved(block.nbytes)
        return block

    def _moved(self, size: int) -> None:
        if self.stop.is_set():
            raise _StoppedError
        self.moved(size)


class _StoppedError(Exception):
    """Another thread failed."""


class _Digest:
    """SHA-256 of a file: of blocks as they were written, and of what lies between them as the file has it."""

    def __init__(self, file: int):
        self.at, self._file, self._hash = 0, file, hashlib.sha256()

    def add(self, place: int, block: Future[memoryview]) -> None:
        """The next block, once it is written at `place`."""
        data = block.result()
        self._read(place)
        self._hash.update(data)
        self.at += len(data)

    def end(self) -> str:
        """Digest of the whole file."""
        self._read(os.fstat(self._file).st_size)
        return self._hash.hexdigest()

    def _read(self, end: int) -> None:
        while self.at < end:
            if not (data := os.pread(self._file, min(1 << 20, end - self.at), self.at)):
                raise OSError(f"the file ends at byte {self.at} of {end}")
            self._hash.update(data)
            self.at += len(data)
