"""What stock assisted generation does, cycle by cycle."""

import torch
from transformers.generation.streamers import BaseStreamer


class Cycles(BaseStreamer):
    """How many tokens each cycle brought."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.sizes.append(value.numel())

    def end(self) -> None:
        pass

    def whole(self, length: int, drafts: int, *, ended: bool = False) -> list[int]:
        """Those that begin so early that all their rows lie in the text of that length, or all where it ended."""
        sizes = self.sizes[1:]  # the first is the prompt
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [size for start, size in zip(starts, sizes, strict=True) if ended or start < length - drafts]
