"""From a GPU to ordinary memory through two small pinned buffers: a plain copy takes several times as long."""

import torch

CHUNK = 64 * 2**20  # bytes of one buffer


class Staging:
    """While one buffer is emptied into its place the other one is filled. The buffers are given back with the object.

    chunk: bytes of a buffer.
    """

    def __init__(self, device: torch.device, chunk: int = CHUNK):
        self._chunk = chunk
        self._buffers: list[torch.Tensor] = []
        self._filled: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self._buffers = [torch.empty(chunk, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            self._filled = [torch.cuda.Event() for _ in range(2)]

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy on the CPU; a tensor that is there already is returned as it is."""
        if not self._buffers:
            return tensor.cpu()
        result = torch.empty(tensor.shape, dtype=tensor.dtype)
        sources = tensor.contiguous().view(-1).view(torch.uint8).split(self._chunk)
        places = result.view(-1).view(torch.uint8).split(self._chunk)
        self._fill(0, sources[0])
        for number, place in enumerate(places):
            if number + 1 < len(sources):
                self._fill(number + 1, sources[number + 1])
            self._filled[number % 2].synchronize()
            place.copy_(self._buffers[number % 2][: len(place)])
        return result

    def _fill(self, number: int, source: torch.Tensor) -> None:
        self._buffers[number % 2][: len(source)].copy_(source, non_blocking=True)
        self._filled[number % 2].record()
