"""What the libraries underneath read when they are imported, set before."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def prepare_libraries(config: object = None) -> None:
    """Settings that libraries read at import, and silence for what they say and no user can act on.

    config: of the command; DeepSpeed chooses its accelerator at import, so what asks for the CPU must say so before.
    """
    warnings.filterwarnings("ignore", module="megatron")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Threads that spin while they wait make CPU runs 20 times slower as soon as the machine has other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.getLogger("DeepSpeed").addFilter(_tells_news)
    if "cpu" in (getattr(config, "device", None), getattr(getattr(config, "parallel", None), "device", None)):
        os.environ["DS_ACCELERATOR"] = "cpu"


@contextmanager
def kept_environment() -> Iterator[None]:
    """Environment variables as they were, afterwards: torchrun and DeepSpeed leave RANK and others behind."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _tells_news(record: logging.LogRecord) -> bool:
    return "Setting accelerator to CPU" not in record.getMessage()
