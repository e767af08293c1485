"""A log of where tokens left, to watch thresholds in production.

One JSON object per line. A header names the model that the lines after it come from:
{"num_layers": 12, "layers": [3, 6, 9], "policy": "threshold"}
{"time": 1767225600.123, "request": "a7", "position": 64, "layer": 6, "confidence": 0.93, "tag": "sql", "agrees": null}
A token that was drafted and accepted (`lossless`) names its source: "source": "exit 3", "source": "prompt".
Lines with "deferred" are about whole answers (`ee-scale serve upstream=...`).
"""

import atexit
import fcntl
import json
import os
import threading
import time
from collections.abc import Sequence
from math import isfinite
from pathlib import Path

AGREES = {None: "null", True: "true", False: "false"}


class DecisionLog:
    """Appends decisions to a file in blocks, one write each; several processes and threads may share the file.

    A killed process loses what it had not written yet and leaves at most one torn line, which no later line joins.
    Open it in the process that uses it: what is buffered when a process forks would be written twice.
    """

    def __init__(self, path: str | Path, flush_every: int = 1024, flush_seconds: float = 5.0):
        """`flush_every` decisions, or the first one after `flush_seconds`, make a block.

        Raises ValueError for a block of less than 1, OSError if the file cannot be opened.
        """
        if flush_every < 1:
            raise ValueError(f"flush_every={flush_every}: must be at least 1")
        self.path = Path(path)
        self.flush_every, self.flush_seconds = flush_every, flush_seconds
        self._file: int | None = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self._lines: list[str] = []
        self._texts: dict[str, str] = {}
        self._header = ""
        self._flushed = time.time()
        self._lock = threading.RLock()
        atexit.register(self.close)

    def describe(self, num_layers: int, layers: Sequence[int], policy: str | None = None) -> None:
        """Say which model the next decisions come from; the same again writes nothing."""
        header = json.dumps({"num_layers": num_layers, "layers": list(layers), "policy": policy}) + "\n"
        with self._lock:
            if header != self._header:
                self._header = header
                self._lines.append(header)

    def add(
        self,
        request: str | int,
        position: int,
        layer: int,
        confidence: float | None,
        tag: str | None = None,
        agrees: bool | None = None,
        source: str | None = None,
    ) -> None:
        """One token.

        layer: where it came from (num_layers: the final layer). confidence: None where no exit was looked at; so is
        what JSON cannot hold (NaN, infinity). agrees: whether the full model says the same token,
        where that is known. source: what drafted it, where it is an accepted draft. Raises ValueError after `close`.
        """
        now = time.time()
        score = "null" if confidence is None or not isfinite(confidence) else f"{confidence:.6g}"
        drafted = "" if source is None else f', "source": {self._text(source)}'
        line = (
            f'{{"time": {now:.3f}, "request": {request if type(request) is int else self._text(request)}, '
            f'"position": {position}, "layer": {layer}, "confidence": {score}, '
            f'"tag": {"null" if tag is None else self._text(tag)}, "agrees": {AGREES[agrees]}{drafted}}}\n'
        )
        self._put(line, now)

    def note(self, values: dict[str, object]) -> None:
        """A line of its own, with the time. Raises ValueError after `close`."""
        now = time.time()
        self._put(json.dumps({"time": round(now, 3), **values}) + "\n", now)

    def _put(self, line: str, now: float) -> None:
        with self._lock:
            if self._file is None:
                raise ValueError(f"{self.path}: the log is closed")
            self._lines.append(line)
            if len(self._lines) >= self.flush_every or now - self._flushed >= self.flush_seconds:
                self.flush()

    def flush(self) -> None:
        """Write what is buffered. Raises OSError if the disk refuses."""
        with self._lock:
            lines, self._lines = self._lines, []
            self._flushed = time.time()
            if lines and self._file is not None:
                _append(self._file, "".join(lines).encode())

    def close(self) -> None:
        """Write what is buffered and close the file; may be called twice."""
        if self._file is None:
            return
        try:
            self.flush()
        finally:
            os.close(self._file)
            self._file = None
            atexit.unregister(self.close)

    def __enter__(self) -> "DecisionLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _text(self, value: object) -> str:
        """JSON of a request or tag; a request's name comes once per token, so the last ones are kept."""
        value = str(value)
        text = self._texts.get(value)
        if text is None:
            if len(self._texts) > 1000:
                self._texts = {}
            text = self._texts[value] = json.dumps(value)
        return text


def _append(file: int, block: bytes) -> None:
    """Append whole lines. The lock keeps other processes out, so a torn line can only be a killed process's last."""
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            block = b"\n" + block
        while block:
            block = block[os.write(file, block) :]
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
