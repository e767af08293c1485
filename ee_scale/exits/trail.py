"""Which tokens left early, for the decision log and for audits. Copied into exported folders."""

import random
from math import isnan
from typing import Any

from .decision_log import DecisionLog
from .policies import ExitPolicy
from .sequences import Sequences


class Trail:
    """What is written to the decision log, and which tokens are compared with the full model."""

    def __init__(self, options: dict[str, Any], policy: ExitPolicy, batch_size: int, model: Any):
        self.log = options.get("exit_log")
        self.tags = options.get("exit_tags") or [None] * batch_size
        self.share = options.get("exit_audit", 0.0)
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 <= self.share <= 1:
            raise ValueError(f"exit_audit={self.share!r}: give a share between 0 and 1")
        self.requests = options.get("exit_requests")
        if self.requests is None:
            name = f"{random.SystemRandom().getrandbits(48):012x}"
            self.requests = [f"{name}-{row}" for row in range(batch_size)]
        self.header = {
            "num_layers": model.config.num_hidden_layers,
            "layers": list(policy.layers),
            "policy": policy.name,
        }
        # Its own generator: auditing must not change what is sampled.
        self.random = random.Random(0) if self.share < 1 else None
        self.waiting: dict[tuple[int, int], tuple[int, int]] = {}
        self.agrees: dict[tuple[int, int], bool] = {}

    def left_early(self, row: int, position: int, index: int, token: int) -> None:
        """New token `index` of a row came from an exit that read `position`; its own most likely token was `token`."""
        if self.share and (self.random is None or self.random.random() < self.share):
            self.waiting[row, position] = (index, token)

    def compare(self, row: int, position: int, token: int) -> None:
        """The final layer's most likely token at a position that was waited for."""
        index, early = self.waiting.pop((row, position))
        self.agrees[row, index] = token == early

    def write(self, sequences: Sequences) -> None:
        """Append every decision to the log."""
        if self.log is None:
            return
        log = self.log if hasattr(self.log, "add") else DecisionLog(self.log)
        log.describe(**self.header)
        for row, layers in enumerate(sequences.layers):
            for index, layer in enumerate(layers):
                confidence = sequences.confidences[row][index]
                log.add(
                    self.requests[row],
                    index,
                    layer,
                    None if isnan(confidence) else confidence,
                    self.tags[row],
                    self.agrees.get((row, index)),
                )
        if log is not self.log:
            log.close()
