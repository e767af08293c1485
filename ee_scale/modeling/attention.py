"""Which of torch's attention kernels decoding may use."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LOCK = threading.Lock()
_state = {"inside": 0, "before": True}


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Keep attention off cuDNN, which plans anew for every shape: in decoding each step has a shape of its own.

    The switch is the process's. It is put back when the last thread is out, also after an error.
    """
    with _LOCK:
        if not _state["inside"]:
            _state["before"] = torch.backends.cuda.cudnn_sdp_enabled()
            torch.backends.cuda.enable_cudnn_sdp(False)
        _state["inside"] += 1
    try:
        yield
    finally:
        with _LOCK:
            _state["inside"] -= 1
            if not _state["inside"]:
                torch.backends.cuda.enable_cudnn_sdp(_state["before"])
