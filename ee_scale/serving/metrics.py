"""What /metrics tells, under the names of vLLM where it has one, and of exits."""

import time
from collections import Counter as Counts
from collections import deque
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from ee_scale.modeling.row_queue import RowQueue
from ee_scale.modeling.speculate import Speculation
from ee_scale.serving.call import Call, Piece, Row

PREFIX = "ee_scale:"
WINDOW = 1000  # audited tokens
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Of one server; the decoding thread alone counts."""

    def __init__(self, model: str):
        """model: the name that all of them have as a label."""
        disable_created_metrics()
        self.registry, self.model = CollectorRegistry(), model
        self.running = self._gauge("num_requests_running", "answers that are being written")
        self.waiting = self._gauge("num_requests_waiting", "answers that wait for a row")
        self.cache = self._gauge("kv_cache_usage_perc", "share of all rows' positions that are in use, 1 is all")
        self.prompt = self._counter("prompt_tokens", "tokens of prompts")
        self.generated = self._counter("generation_tokens", "tokens of answers")
        self.success = self._counter("request_success", "requests that have ended", "finished_reason")
        self.first = self._seconds("time_to_first_token_seconds", "from a request to the first token of an answer")
        self.between = self._seconds("inter_token_latency_seconds", "from one token of an answer to the next")
        self.whole = self._seconds("e2e_request_latency_seconds", "from a request to its end")
        self.exits = self._counter("exit_tokens", "tokens by the layer that they came from", "layer")
        self.audited = self._counter("exit_audited_tokens", "early tokens compared with the full model")
        self.agreed = self._counter("exit_agreed_tokens", "those that were its own choice")
        self.agreement = self._gauge("exit_agreement", f"share of those among the last {WINDOW} that were compared")
        self.drafts = self._counter("spec_decode_num_drafts", "drafts")
        self.draft_tokens = self._counter("spec_decode_num_draft_tokens", "tokens of drafts")
        self.accepted = self._counter("spec_decode_num_accepted_tokens", "tokens of drafts that were accepted")
        self.accepted_at = self._counter(
            "spec_decode_num_accepted_tokens_per_pos", "the same, by place in the draft", "position"
        )
        self.agreement.labels(model).set(float("nan"))
        self._seen: dict[RowQueue, Counts[str]] = {}
        self._window: deque[tuple[int, int]] = deque()  # (audited, agreed) of steps

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)

    def watch(self, running: Callable[[], float], waiting: Callable[[], float], cache: Callable[[], float]) -> None:
        """What to ask for what is under way, whenever somebody looks."""
        self.running.labels(self.model).set_function(running)
        self.waiting.labels(self.model).set_function(waiting)
        self.cache.labels(self.model).set_function(cache)

    def wrote(self, call: Call, row: Row, pieces: Sequence[Piece]) -> None:
        """Tokens of an answer."""
        count, now = sum(len(piece.tokens) for piece in pieces), time.monotonic()
        if not count:
            return
        if row.told is None:
            self.first.labels(self.model).observe(now - call.started)
        else:
            for _ in range(count):  # those of one step come at once
                self.between.labels(self.model).observe((now - row.told) / count)
        row.told = now
        self.generated.labels(self.model).inc(count)
        for layer, tokens in Counts(layer for piece in pieces for layer in piece.layers).items():
            self.exits.labels(self.model, str(layer)).inc(tokens)

    def ended(self, call: Call, reason: str) -> None:
        """A request is over: `stop`, `length`, `abort` (the client left) or `error`."""
        self.prompt.labels(self.model).inc(call.prompt_tokens)
        self.success.labels(self.model, reason).inc()
        self.whole.labels(self.model).observe(time.monotonic() - call.started)

    def decoded(self, queue: RowQueue) -> None:
        """What the last step of a queue has drafted and audited."""
        now, loop = Counts(audited=queue.trail.audited, agreed=queue.trail.agreed), queue.loop
        if isinstance(loop, Speculation):
            now["drafts"] = loop.row_drafts
            now["drafted"] = sum(fate.drafted for fate in loop.fates.values())
            now["accepted"] = sum(fate.accepted for fate in loop.fates.values())
            now.update({f"at {place}": count for place, count in loop.accepted_at.items()})
        new = now - self._seen.get(queue, Counts())
        self._seen[queue] = now
        for name, counter in (
            ("audited", self.audited),
            ("agreed", self.agreed),
            ("drafts", self.drafts),
            ("drafted", self.draft_tokens),
            ("accepted", self.accepted),
        ):
            counter.labels(self.model).inc(new[name])
        for name, count in new.items():
            if name.startswith("at "):
                self.accepted_at.labels(self.model, name.removeprefix("at ")).inc(count)
        if new["audited"]:
            self._window.append((new["audited"], new["agreed"]))
            while sum(audited for audited, _ in self._window) - self._window[0][0] >= WINDOW:
                self._window.popleft()
            audited, agreed = map(sum, zip(*self._window, strict=True))
            self.agreement.labels(self.model).set(agreed / audited)

    def forget(self, queue: RowQueue) -> None:
        """A queue is no more."""
        self._seen.pop(queue, None)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(PREFIX + name, text, ["model_name"], registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, ["model_name", *labels], registry=self.registry)

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(PREFIX + name, text, ["model_name"], registry=self.registry, buckets=SECONDS)


class DeferralMetrics:
    """What /metrics tells of deferral; the event loop alone counts."""

    def __init__(self, metrics: Metrics):
        self.model = metrics.model
        self.decisions = metrics._counter("deferral_decisions", "answers, by what the upstream did", "upstream")
        self.failures = metrics._counter("upstream_failures", "requests that the upstream did not answer", "reason")
        self.latency = metrics._seconds("upstream_latency_seconds", "of the upstream's answers")
        self.audited = metrics._counter("upstream_audited", "kept answers compared with the upstream's")
        self.agreed = metrics._counter("upstream_agreed", "those that said the same")
        self.share = metrics._gauge("deferral_share", f"share below the limit among the last {WINDOW} answers")
        self.agreement = metrics._gauge("upstream_agreement", f"share that said the same in the last {WINDOW} audits")
        for gauge in (self.share, self.agreement):
            gauge.labels(self.model).set(float("nan"))
        self._below: deque[bool] = deque(maxlen=WINDOW)
        self._agrees: deque[bool] = deque(maxlen=WINDOW)

    def decided(self, word: str, *, below: bool) -> None:
        """An answer is given; word: what the upstream did."""
        self.decisions.labels(self.model, word).inc()
        self._below.append(below)
        self.share.labels(self.model).set(sum(self._below) / len(self._below))

    def answered(self, seconds: float) -> None:
        """By the upstream."""
        self.latency.labels(self.model).observe(seconds)

    def failed(self, reason: str) -> None:
        """The upstream did not answer."""
        self.failures.labels(self.model, reason).inc()

    def compared(self, agrees: bool) -> None:
        """A kept answer with the upstream's."""
        self.audited.labels(self.model).inc()
        self.agreed.labels(self.model).inc(agrees)
        self._agrees.append(agrees)
        self.agreement.labels(self.model).set(sum(self._agrees) / len(self._agrees))
