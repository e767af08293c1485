"""Parts of a decode step that are called again and again with the same shapes: recorded once, then replayed.

Launching the kernels of a decoder layer one by one takes a GPU's host longer than the layer takes the GPU. A recorded
part (a CUDA graph) is one launch, in which no Python runs.
"""

from collections.abc import Callable, Hashable
from typing import Protocol

import torch

Tensors = tuple[torch.Tensor, ...]


class Recording(Protocol):
    """A part as it was recorded: `replay` computes `outputs` from what lies in `inputs`, in place."""

    inputs: Tensors
    outputs: Tensors

    def replay(self) -> None: ...


class CudaRecording:
    """A CUDA graph with memory of its own: graphs are replayed in any order, and their outputs outlive one another."""

    def __init__(self, part: Callable[..., Tensors], inputs: Tensors):
        """Runs the part twice: what libraries set up at a first call must not be recorded."""
        self.inputs = tuple(value.clone() for value in inputs)
        aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(2):
                part(*self.inputs)
        here.wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.outputs = part(*self.inputs)

    def replay(self) -> None:
        self.graph.replay()


class StepGraphs:
    """The recorded parts of one generation, by name and shape."""

    def __init__(self, record: Callable[[Callable[..., Tensors], Tensors], Recording] | None):
        """record: makes a recording of a part and its first inputs; None: parts are called as they are."""
        self.record = record
        self.recordings: dict[Hashable, Recording] = {}

    def __call__(self, name: Hashable, part: Callable[..., Tensors], *inputs: torch.Tensor) -> Tensors:
        """part(*inputs). The outputs hold until the part is called again with these shapes.

        A part writes to memory that does not move (`clear` if it did), and reads nothing else that changes.
        """
        if self.record is None:
            return part(*inputs)
        key = name, *(value.shape for value in inputs)
        if key not in self.recordings:
            self.recordings[key] = self.record(part, inputs)
        recording = self.recordings[key]
        for kept, value in zip(recording.inputs, inputs, strict=True):
            kept.copy_(value)
        recording.replay()
        return recording.outputs

    def clear(self) -> None:
        """Forget all recordings."""
        self.recordings.clear()


def recorder(device: torch.device) -> Callable[[Callable[..., Tensors], Tensors], Recording] | None:
    """How parts are recorded on this device; None: not at all."""
    return CudaRecording if device.type == "cuda" else None
