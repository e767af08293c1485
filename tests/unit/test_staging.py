"""The way of tensors between host and device. No GPU is needed: what is asked of one is counted."""

from typing import Any

import pytest
import torch

from ee_scale.data.loader import to_device
from ee_scale.engine.staging import Staging

CUDA = torch.device("cuda")
CHUNK = 64


class Event:
    """One of a GPU: what is asked of them, in order."""

    asked: list[str]
    made: int

    def __init__(self) -> None:
        self.number = Event.made
        Event.made += 1

    def record(self) -> None:
        self.asked.append(f"fill {self.number}")

    def synchronize(self) -> None:
        self.asked.append(f"empty {self.number}")


@pytest.fixture
def staging(monkeypatch: pytest.MonkeyPatch) -> Staging:
    """Of a GPU whose memory is this machine's, with buffers of 64 bytes."""
    Event.asked, Event.made = [], 0
    monkeypatch.setattr(torch.cuda, "Event", Event)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    return Staging(CUDA, CHUNK)


@pytest.mark.parametrize("size", [1, CHUNK // 8, CHUNK // 8 + 1, CHUNK, 3 * CHUNK + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_byte_arrives(staging: Staging, size: int, dtype: torch.dtype) -> None:
    for _ in range(2):  # the buffers are used again
        tensor = torch.randn(2, size).to(dtype)
        for source in (tensor, tensor.t()):
            found = staging.to_host(source)
            assert torch.equal(found, source)
            assert (found.dtype, found.is_contiguous()) == (dtype, True)
            assert found.data_ptr() != source.data_ptr()


def test_a_buffer_is_emptied_before_it_is_filled_again(staging: Staging) -> None:
    staging.to_host(torch.zeros(CHUNK))  # four chunks
    assert Event.asked == ["fill 0", "fill 1", "empty 0", "fill 0", "empty 1", "fill 1", "empty 0", "empty 1"]


def test_nothing_is_copied_on_a_cpu() -> None:
    tensor = torch.ones(3)
    assert Staging(torch.device("cpu")).to_host(tensor) is tensor


def test_batches_go_to_a_gpu_from_pinned_memory() -> None:
    class Batch:
        calls: list[Any] = []  # noqa: RUF012

        def pin_memory(self) -> "Batch":
            self.calls.append("pinned")
            return self

        def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
            self.calls.append((device, non_blocking))
            return self

    assert set(to_device({"tokens": Batch()}, CUDA)) == {"tokens"}
    assert Batch.calls == ["pinned", (CUDA, True)]
    Batch.calls.clear()
    to_device({"tokens": Batch()}, torch.device("cpu"))
    assert Batch.calls == [(torch.device("cpu"), False)]
