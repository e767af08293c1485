"""Which tokens left early or were drafted, for the decision log and for audits."""

import hashlib
import random
import threading
from collections.abc import Sequence
from math import isnan
from typing import Any

import torch

from .decision_log import DecisionLog
from .following import FollowedLimits, check_following
from .heads import ModelWithExits
from .policies import ExitPolicy
from .row_texts import RowTexts
from .sequences import Sequences


class AuditDraws:
    """Random numbers for audits, and none of torch's, which are for what is sampled.

    Where somebody has seeded torch, a named request with the same prompt is audited at the same places, in any process
    and order. Others are numbered, from where torch's generator stands: the same calls after the same seed.
    """

    def __init__(self) -> None:
        self.state, self.calls = b"", 0
        self.lock = threading.Lock()

    def streams(self, prompts: torch.Tensor, names: Sequence[Any] | None) -> list[random.Random]:
        """One for each row of the prompts [B, S], on the device that samples."""
        seed, rows = torch.initial_seed(), prompts.tolist()
        if seed == torch.Generator().initial_seed():  # torch's own, the same in every process
            return [random.Random() for _ in rows]
        if names is not None:
            return [
                random.Random(repr((seed, name, row - names.index(name), rows[row]))) for row, name in enumerate(names)
            ]
        device = torch if prompts.device.type == "cpu" else torch.get_device_module(prompts.device)
        state = hashlib.sha256(device.get_rng_state().numpy().tobytes()).digest()
        with self.lock:
            # Greedy calls leave torch's generator where it was, so they are counted.
            self.calls = self.calls + 1 if state == self.state else 0
            self.state, number = state, self.calls
        return [random.Random(repr((state, number, row, ids))) for row, ids in enumerate(rows)]


DRAWS = AuditDraws()


def request_names(count: int) -> list[str]:
    """Names for requests that have none; no two calls give the same."""
    name = f"{random.SystemRandom().getrandbits(48):012x}"
    return [f"{name}-{row}" for row in range(count)]


class Trail:
    """What is written to the decision log, and which tokens are compared with the full model."""

    def __init__(self, options: dict[str, Any], policy: ExitPolicy, prompts: torch.Tensor, model: ModelWithExits):
        """prompts: token ids [B, S]. Raises ValueError for a share that is none."""
        batch_size = len(prompts)
        self.log = options.get("exit_log")
        self.tags = options.get("exit_tags") or [None] * batch_size
        self.share = options.get("exit_audit", 0.0)
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 <= self.share <= 1:
            raise ValueError(f"exit_audit={self.share!r}: give a share between 0 and 1")
        self.follow: FollowedLimits | None = options.get("exit_follow")
        if self.follow is not None:
            check_following(self.follow, policy.name, self.share)
        self.requests: list[Any] | None = options.get("exit_requests")
        self.random = DRAWS.streams(prompts, self.requests) if 0 < self.share < 1 else None
        if self.requests is None:
            self.requests = request_names(batch_size)
        self.header = {
            "num_layers": model.config.num_hidden_layers,
            "layers": list(policy.layers),
            "policy": policy.name,
        }
        self.waiting: dict[tuple[int, int], tuple[int, int]] = {}
        self.agrees: dict[tuple[int, int], bool] = {}
        self.audited = self.agreed = 0
        self.sources: dict[tuple[int, int], str] = {}  # (row, new token) -> where an accepted draft came from

    def left_early(self, row: int, position: int, index: int, token: int) -> None:
        """New token `index` of a row came from an exit that read `position`; its own most likely token was `token`."""
        if self.share and (self.random is None or self.random[row].random() < self.share):
            self.waiting[row, position] = (index, token)

    def compare(self, row: int, position: int, token: int) -> None:
        """The final layer's most likely token at a position that was waited for."""
        index, early = self.waiting.pop((row, position))
        self.agrees[row, index] = token == early
        self.audited, self.agreed = self.audited + 1, self.agreed + (token == early)
        if self.follow is not None:
            self.follow.saw(self.tags[row], token == early)

    def went_deep(self, row: int) -> None:
        """A row's new token came from the final layer."""
        if self.follow is not None:
            self.follow.saw_full(self.tags[row], self.share)

    def begin(self, row: int, prompt: torch.Tensor, request: str | int | None, tag: str | None) -> None:
        """Another request takes the place of a row: its prompt [1, S], and its names; of None one is made."""
        if self.random is not None:
            (self.random[row],) = DRAWS.streams(prompt, None if request is None else [request])
        self.requests[row] = request_names(1)[0] if request is None else request
        self.tags[row] = tag

    def end(self, row: int, sequences: Sequences | RowTexts) -> None:
        """Append a row's decisions to the log, and forget them."""
        self._write([row], sequences)
        self.waiting = {place: token for place, token in self.waiting.items() if place[0] != row}
        self.agrees = {place: agrees for place, agrees in self.agrees.items() if place[0] != row}
        self.sources = {place: source for place, source in self.sources.items() if place[0] != row}

    def write(self, sequences: Sequences) -> None:
        """Append every decision to the log."""
        self._write(list(range(sequences.batch_size)), sequences)

    def _write(self, rows: list[int], sequences: Sequences | RowTexts) -> None:
        if self.log is None:
            return
        log = self.log if hasattr(self.log, "add") else DecisionLog(self.log)
        log.describe(**self.header)
        for row in rows:
            for index, layer in enumerate(sequences.layers[row]):
                confidence = sequences.confidences[row][index]
                log.add(
                    self.requests[row],
                    index,
                    layer,
                    None if isnan(confidence) else confidence,
                    self.tags[row],
                    self.agrees.get((row, index)),
                    self.sources.get((row, index)),
                )
        if log is not self.log:
            log.close()
