"""What the libraries underneath read when they are imported, set before."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


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
    if "megatron.core.jit" not in sys.modules and not any(isinstance(f, _WithoutFuser) for f in sys.meta_path):
        sys.meta_path.insert(0, _WithoutFuser())
    if "cpu" in (getattr(config, "device", None), getattr(getattr(config, "parallel", None), "device", None)):
        os.environ["DS_ACCELERATOR"] = "cpu"


class _WithoutFuser(MetaPathFinder):
    """Switches Megatron's fuser off as soon as it is imported: it compiles functions at import, none of which is used
    here, and that loads torch's inductor (a second of every process).
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The usual spec of megatron.core.jit, with one more step; nothing for other modules."""
        if fullname != "megatron.core.jit":
            return None
        if (spec := PathFinder.find_spec(fullname, path)) is None or (loader := spec.loader) is None:
            return None
        execute = loader.exec_module

        def execute_and_disable(module: ModuleType) -> None:
            execute(module)
            module.disable_jit_fuser()

        loader.exec_module = execute_and_disable  # type: ignore[method-assign]
        return spec


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
