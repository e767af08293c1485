"""What must have happened before threads convert files."""

import importlib.util
from threading import current_thread

import pytest
from torch._subclasses import fake_tensor

from ee_scale.conversion import target_files


def test_fake_tensors_are_entered_before_there_are_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch sets its CUDA guard then, without a lock: a CUDA build without a GPU dies of it in a pool."""
    entered = []

    class Mode:
        def __enter__(self) -> None:
            entered.append(current_thread().name)

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(fake_tensor, "FakeTensorMode", Mode)
    spec = importlib.util.spec_from_file_location("a_copy", target_files.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert entered == ["MainThread"]
