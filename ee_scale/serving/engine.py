"""The thread that decodes: rows of all requests wait in one line, join queues of the decode loop, and leave.

A queue has one policy; requests with another one have another queue, with a cache of its own. All queues step in turn.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext

from ee_scale.config.serve import ServeConfig
from ee_scale.errors import one_line
from ee_scale.inference.deferral import answer_score
from ee_scale.log import log
from ee_scale.modeling.heads import ModelWithExits
from ee_scale.modeling.packing import packed_linears
from ee_scale.modeling.row_queue import QueuedRow, RowQueue
from ee_scale.serving.call import STOP, Call, Row
from ee_scale.serving.errors import ApiError
from ee_scale.serving.following import watched
from ee_scale.serving.metrics import Metrics

MOST_QUEUES = 4  # with caches, at the same time


class Engine(threading.Thread):
    """Takes calls (`submit`) until it is told to `drain` or `close`.

    Attributes:
        failure: why there is no model, or no thread any more.
    """

    def __init__(
        self,
        config: ServeConfig,
        opens: Callable[[], ModelWithExits],
        longest: int,
        settings: dict[str, object],
        logged: dict[str, object],
        metrics: Metrics,
    ):
        """longest: tokens of a text; settings: of all rows; logged: `exit_log`, `exit_audit` and `exit_follow`."""
        super().__init__(name="decoding", daemon=True)
        self.config, self.opens, self.longest, self.settings = config, opens, longest, settings
        self.logged, self.metrics = logged, metrics
        self.failure: BaseException | None = None
        self.ready = self.draining = self.closed = False
        self.on_ready: Callable[[], None] = lambda: None
        self.on_idle: Callable[[], None] = lambda: None
        self._changed = threading.Condition()
        self._inbox: list[Call] = []
        self._calls: list[Call] = []
        self._held = 0  # rows of calls that were taken and have not ended
        self._waiting: deque[tuple[Call, Row]] = deque()
        self._running: dict[QueuedRow, tuple[Call, Row, RowQueue]] = {}
        self._queues: dict[str, RowQueue] = {}  # the longest unused one first
        metrics.watch(lambda: len(self._running), lambda: self._held - len(self._running), self._cache_share)

    # -- from other threads ----------------------------------------------------------------------------------------

    def check_open(self) -> None:
        """Raises `ApiError` while there is no model, and when the server is about to stop."""
        if self.failure is not None:
            raise ApiError(503, "the server has failed and stops")
        if self.draining:
            raise ApiError(503, "the server is stopping: it takes no more requests")
        if not self.ready:
            raise ApiError(503, "the model is being loaded: try again in a moment")

    def submit(self, call: Call) -> None:
        """Take a call; its pieces are told as they come. Raises `ApiError` where the line is full."""
        with self._changed:
            self.check_open()
            if self._held + len(call.rows) > self.config.rows + self.config.max_waiting:
                raise ApiError(429, f"{self._held} answers are under way or wait: try again later", code="queue_full")
            self._held += len(call.rows)
            self._inbox.append(call)
            self._changed.notify()

    def leave(self, call: Call) -> None:
        """Nobody waits for a call any more: before the next step its rows are gone."""
        with self._changed:
            call.left = True
            self._changed.notify()

    def drain(self) -> None:
        """Take no more calls; `on_idle` is called when those under way have ended."""
        with self._changed:
            self.draining = True
            self._changed.notify()

    def close(self) -> None:
        """Stop, whatever is under way; who waits for it is told."""
        with self._changed:
            self.closed = True
            for call in (*self._calls, *self._inbox):
                call.tell(ApiError(503, "the server was stopped"))
            self._changed.notify()

    def _cache_share(self) -> float:
        """Of all rows' positions, those that are in use."""
        tokens = sum(len(queued.prompt) + row.count for queued, (_, row, _) in list(self._running.items()))
        return tokens / (self.config.rows * self.longest)

    # -- the thread ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Load, then decode."""
        try:
            self.model = self.opens()
            with packed_linears(self.model) if self.config.pack_weights else nullcontext():  # type: ignore[arg-type]
                self.ready = True
                self.on_ready()
                while self._wait():
                    self._turn()
        except BaseException as error:
            self.failure = error
            for call in (*self._calls, *self._inbox):
                call.tell(ApiError(503, "the server has failed and stops"))
        finally:
            self.on_idle()

    def _wait(self) -> bool:
        """Until there is something to do; false: nothing ever more."""
        with self._changed:
            while not (self._inbox or self._calls or self.draining or self.closed):
                self._changed.wait()
            self._calls += self._inbox
            self._waiting += [(call, row) for call in self._inbox for row in call.rows]
            self._inbox = []
        return bool(self._calls) and not self.closed

    def _turn(self) -> None:
        now = time.monotonic()
        for call in list(self._calls):
            if call.left:
                self._end(call, "abort")
            elif now > call.deadline:
                self._refuse(
                    call, ApiError(503, f"not done within {self.config.max_seconds:g} seconds", code="timeout")
                )
        self._admit()
        for queue in list(self._queues.values()):
            if queue.busy:
                self._step(queue)

    def _admit(self) -> None:
        """First come, first served: who cannot join yet holds up who came later, so that nobody waits for ever."""
        while self._waiting and len(self._running) < self.config.rows:
            call, row = self._waiting[0]
            try:
                queue = self._queue_of(call)
                if queue is None:
                    return
                queue.add(row.queued)
            except ValueError as error:
                self._refuse(call, ApiError(400, one_line(error)))
                continue
            self._waiting.popleft()
            self._running[row.queued] = call, row, queue

    def _queue_of(self, call: Call) -> RowQueue | None:
        """The queue of a call's policy; None as long as there is no room for one more."""
        queue = self._queues.pop(call.kind, None)
        if queue is None:
            if len(self._queues) >= MOST_QUEUES:
                idle = next((kind for kind, other in self._queues.items() if not other.busy), None)
                if idle is None:
                    return None
                self._forget(self._queues[idle])
            options = call.options | watched(str(call.options["exit_policy"]), self.logged)
            queue = RowQueue(self.model, options, self.config.rows, self.longest, self.settings).__enter__()
        self._queues[call.kind] = queue
        return queue

    def _forget(self, queue: RowQueue) -> None:
        self._queues = {kind: other for kind, other in self._queues.items() if other is not queue}
        queue.__exit__()
        self.metrics.forget(queue)

    def _step(self, queue: RowQueue) -> None:
        """One step of a queue, and what its rows have to tell."""
        mine = [(call, row) for call, row, other in self._running.values() if other is queue]
        try:
            done = {*queue.step()}
        except Exception as error:  # of memory, or numbers: the other queues go on
            log.exception("a step of decoding failed; its requests are answered with an error")
            self._forget(queue)
            for call in dict.fromkeys(call for call, _ in mine):
                self._refuse(call, ApiError(500, f"decoding failed ({one_line(error)})"))
            return
        self.metrics.decoded(queue)
        for call, row in mine:
            if row.queued in done:
                self._finish(call, row, STOP if row.stopped else row.reason())
            elif row.stopped:
                queue.cancel(row.queued)
                self._finish(call, row, STOP)
            else:
                self._tell(call, row, None)

    def _finish(self, call: Call, row: Row, reason: str) -> None:
        self._running.pop(row.queued)
        call.open.remove(row)
        self._held -= 1
        if not call.open:
            self._calls.remove(call)
            self.metrics.ended(call, reason)
        if call.scored is not None:
            self._score(call.scored, row)
        self._tell(call, row, reason)

    def _score(self, name: str, row: Row) -> None:
        """As `ee-scale defer` does: by one pass over the whole text, for which the other rows wait."""
        try:
            row.score = answer_score(self.model, name, row.queued.prompt, row.queued.tokens[: row.count])  # type: ignore[arg-type]
        except Exception:  # of memory: an answer without a score is not kept
            log.exception("the score of an answer could not be computed")

    def _tell(self, call: Call, row: Row, reason: str | None) -> None:
        if pieces := row.take(reason):
            self.metrics.wrote(call, row, pieces)
            call.tell(pieces)

    def _refuse(self, call: Call, error: ApiError) -> None:
        self._end(call, "error")
        call.tell(error)

    def _end(self, call: Call, reason: str) -> None:
        """Take out whatever of a call is not done."""
        for queued, (other, _, queue) in list(self._running.items()):
            if other is call:
                queue.cancel(queued)
                del self._running[queued]
        self._waiting = deque((other, row) for other, row in self._waiting if other is not call)
        self._held -= len(call.open)
        call.open.clear()
        self._calls.remove(call)
        self.metrics.ended(call, reason)
