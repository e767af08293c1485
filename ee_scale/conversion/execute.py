"""A conversion: what is read, which files are made of it, and how they are filled, checked and published."""

import fcntl
import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from ee_scale.backbone.narrowing import NarrowingError
from ee_scale.conversion.copying import Source
from ee_scale.conversion.model import Opened
from ee_scale.conversion.target_files import ArchivesFile, TargetFile
from ee_scale.conversion.tensors import Piece
from ee_scale.conversion.writing import Writers
from ee_scale.errors import UserError
from ee_scale.files import file_digest, publish, sync
from ee_scale.reading import read_json, write_json

JOURNAL = "journal.json"
RECORD = "conversion.json"  # digests of all files
SLACK = 64 << 20  # bytes of disk for indexes, tokenizers and the like


@dataclass
class Conversion:
    """Everything that is known before a tensor moves.

    Attributes:
        files: to be made, in this order; finish: writes what is not tensors into the folder.
    """

    opened: Opened
    source: Source
    files: Sequence[TargetFile]
    finish: Callable[[Path], None]
    out: Path
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors to be written."""
        return sum(piece.nbytes for file in self.files for piece in file.pieces)

    @property
    def partial(self) -> Path:
        """Where files are made until all are done."""
        return self.out.parent / f".{self.out.name}.partial"


def source_of(opened: Opened) -> Source:
    """The tensors of a checkpoint, with one look at the numbers of its staging and at those read from files."""
    return Source(opened.stored, opened.staging.values if opened.staging else None, opened.updates)


def with_dtypes(files: Sequence[TargetFile], source: Source, dtype: torch.dtype | None, padding: torch.dtype) -> None:
    """Give every piece its number type: as asked for, or as the source has it; `padding`: that of mere padding."""
    for file in files:
        file.pieces = [replace(piece, dtype=dtype or _dtype(piece, source) or padding) for piece in file.pieces]


def _dtype(piece: Piece, source: Source) -> torch.dtype | None:
    found = [source.dtype(span.name) for span in piece.spans if span.name is not None]
    return reduce(torch.promote_types, found) if found else None


def check_source(conversion: Conversion) -> None:
    """Raise `UserError` if a tensor of the model is not wholly there, or a file ends before its tensors do."""
    info = conversion.opened.model.info()
    for name, tensor in info.items():
        if not conversion.source.covers(name, tensor.shape[tensor.dim]):
            raise UserError(f"{conversion.opened.folder}: '{name}' is not there as a whole")
    sizes: dict[Path, int] = {}
    staging = conversion.opened.staging
    for stored in conversion.opened.stored:
        extent = stored.extent
        if staging is not None and extent.path == staging.file:
            continue  # not there yet
        size = sizes.setdefault(extent.path, extent.path.stat().st_size)
        if extent.offset + extent.nbytes > size:
            raise UserError(f"{extent.path}: cut off: '{stored.piece.key}' ends behind its {size:,} bytes")


def run(
    conversion: Conversion,
    workers: int,
    moved: Callable[[int], None],
    check: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write all files beside `out`, `check` them, publish the folder as `out`. `moved` is told the bytes as they go.

    An interrupted run leaves its finished files; the same conversion goes on with them. Raises `UserError`.
    """
    if conversion.out.exists():
        raise UserError(f"out={conversion.out}: exists already; choose another folder")
    staging = conversion.opened.staging
    with _alone(conversion), staging.filled() if staging else nullcontext():
        _run(conversion, workers, moved, check)


@contextmanager
def _alone(conversion: Conversion) -> Iterator[None]:
    """Nobody else writes to the same `out` inside the block. Raises `UserError`."""
    path = conversion.partial.with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise UserError(f"out={conversion.out}: cannot write there ({error.strerror or error})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"out={conversion.out}: another conversion is writing it ({path})") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _run(conversion: Conversion, workers: int, moved: Callable[[int], None], check: Callable[[Path], None]) -> None:
    out, partial = conversion.out, conversion.partial
    try:
        journal = _Journal(partial, _identity(conversion))
    except OSError as error:
        raise UserError(f"out={out}: cannot write there ({error.strerror or error})") from error
    try:
        left = [file for file in conversion.files if not journal.has(file)]
        moved(conversion.nbytes - sum(piece.nbytes for file in left for piece in file.pieces))
        _check_disk(conversion, left)
        Writers(partial, conversion.source, workers, moved).run(left, journal.add)
        conversion.finish(partial)
        check(partial)
        _publish(partial, out, journal)
    except NarrowingError:
        shutil.rmtree(partial, ignore_errors=True)  # the same command cannot go on with it
        raise
    except OSError as error:
        raise UserError(
            f"out={out}: cannot write ({error.strerror or error}); finished files are kept in {partial}, "
            "and the same command goes on with them"
        ) from error


class _Journal:
    """Which files of a partial folder are finished, and what they hold."""

    def __init__(self, folder: Path, identity: str):
        self.folder, self.files, self.lock = folder, {}, threading.Lock()
        self.identity = identity
        path = folder / JOURNAL
        if path.is_file():
            found = read_json(path)
            if found["identity"] != identity:
                raise UserError(
                    f"{folder}: left by another conversion to the same folder (or its source changed); delete it first"
                )
            self.files = found["files"]
        else:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self._write()

    def has(self, file: TargetFile) -> bool:
        """Whether a file was finished before and is still what it was."""
        entry, path = self.files.get(file.name), self.folder / file.name
        if entry is None or not path.is_file() or file_digest(path) != entry["sha256"]:
            return False
        if isinstance(file, ArchivesFile):
            file.places = {key: tuple(place) for key, place in entry["places"].items()}
        return True

    def add(self, file: TargetFile, digest: str) -> None:
        """A file is finished."""
        entry: dict[str, Any] = {"sha256": digest}
        if isinstance(file, ArchivesFile):
            entry["places"] = file.places
        with self.lock:
            self.files[file.name] = entry
            self._write()

    def digests(self) -> dict[str, str]:
        """SHA-256 by file."""
        return {name: entry["sha256"] for name, entry in sorted(self.files.items())}

    def _write(self) -> None:
        write_json(self.folder / JOURNAL, {"identity": self.identity, "files": self.files})


def _identity(conversion: Conversion) -> str:
    """What makes a conversion this one: the source's files as they are, and what is made of them."""
    digest = hashlib.sha256()
    for path in sorted({stored.extent.path for stored in conversion.opened.stored}):
        status = path.stat()
        digest.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    if conversion.opened.model.config is not None:  # files of Megatron hold it too, as arguments
        digest.update(conversion.opened.model.config.to_json_string().encode())
    digest.update(repr(sorted(conversion.opened.updates.items())).encode())
    for file in conversion.files:
        digest.update(json.dumps([file.name, [asdict(piece) for piece in file.pieces]], default=str).encode())
    return digest.hexdigest()


def _check_disk(conversion: Conversion, files: Sequence[TargetFile]) -> None:
    needed = sum(piece.nbytes for file in files for piece in file.pieces) + SLACK
    for leftover in conversion.partial.rglob(".*.tmp"):  # of a run that was killed
        leftover.unlink()
    free = shutil.disk_usage(conversion.partial).free
    if needed > free:
        raise UserError(
            f"out={conversion.out}: needs {needed / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free there"
        )


def _publish(partial: Path, out: Path, journal: _Journal) -> None:
    digests = journal.digests()
    for path in sorted(partial.rglob("*")):
        name = str(path.relative_to(partial))
        if path.is_file() and name not in digests and name != JOURNAL:
            digests[name] = file_digest(path)
            sync(path)
    write_json(partial / RECORD, {"files": digests})
    (partial / JOURNAL).unlink()
    for path in partial.rglob("*"):
        if path.is_dir():
            sync(path)
    publish(partial, out)
