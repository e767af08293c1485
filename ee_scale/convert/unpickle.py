"""Read pickles of strangers without running them: an allow-list, and stand-ins for what need not be real."""

import argparse
import pathlib
import pickle
import signal
import threading
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import metadata, planner
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ee_scale.errors import UserError

TRUST = "trust=true runs the code that the file names; give it only for files of people you trust"


class StandIn:
    """Takes the place of a class that only labels something (enums of Megatron in `args`)."""

    def __init__(self, *values: Any):
        self.values = values


# Names that checkpoints of Megatron-LM, Megatron-Core and EE-LLM hold beside tensors. Nothing here does anything.
STAND_INS = (
    "megatron.core.enums.ModelType",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.AttnMaskType",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.transformer.enums.LayerType",
    "megatron.core.transformer.pipeline_parallel_layer_layout.PipelineParallelLayerLayout",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.model.enums.ModelType",
    "megatron.legacy.model.enums.ModelType",
)
PLAIN = (
    argparse.Namespace,
    types.SimpleNamespace,
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    signal.Signals,
)
# The index of a torch distributed checkpoint (`.metadata`).
INDEX = {
    "torch": ("Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath",),
}
INDEX_STAND_INS = ("MCoreMetadata", "MCoreSavePlan")


_LOCK = threading.Lock()


@contextmanager
def known_globals(more: Sequence[Any] = ()) -> Iterator[None]:
    """What `weights_only` loading accepts inside the block, one thread at a time: torch's list is the process's."""
    allowed: list[Any] = [*PLAIN, *_numpy(), *more]
    allowed += [(_stand_in(name), name) for name in STAND_INS]
    with _LOCK, safe_globals(allowed):
        yield


def load_safely(file: Path | IO[bytes], path: Path, *, trust: bool = False, allowed: Sequence[Any] = ()) -> Any:
    """`torch.load` that runs nothing of the file; `trust` runs it. `allowed`: classes that are harmless there.

    Raises `UserError` that names what the file asks for.
    """
    try:
        with known_globals(allowed):
            return torch.load(file, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: {_what(path, error, allowed)}; {TRUST}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a whole file of torch.save ({_line(error)})") from error


def load_index(path: Path) -> metadata.Metadata:
    """The `.metadata` of a torch distributed checkpoint, by the allow-list alone. Raises `UserError`."""
    try:
        with path.open("rb") as file:
            found = _IndexUnpickler(file).load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: {error}; it is not the index of a torch distributed checkpoint") from error
    except Exception as error:  # a pickle that is cut off or was made up fails in many ways
        raise UserError(f"{path}: not a whole index of a torch distributed checkpoint ({error})") from error
    if not isinstance(found, metadata.Metadata):
        raise UserError(f"{path}: holds a {type(found).__name__}, not the index of a torch distributed checkpoint")
    return found


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Only what an index is made of."""
        if name in INDEX_STAND_INS and module.startswith("megatron."):
            return type(name, (metadata.Metadata if name == "MCoreMetadata" else planner.SavePlan,), {})
        if name not in INDEX.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for '{module}.{name}'")
        return super().find_class(module, name)


def _stand_in(name: str) -> type:
    module, _, label = name.rpartition(".")
    return type(label, (StandIn,), {"__module__": module})


def _numpy() -> list[Any]:
    """What numpy arrays (`np_rng_state`) are made of, under the names of numpy 1 and 2."""
    import numpy as np

    reconstruct = np.zeros(1).__reduce__()[0]
    names = [f"{place}.multiarray._reconstruct" for place in ("numpy.core", "numpy._core")]
    return [np.ndarray, np.dtype, type(np.dtype("uint32")), *((reconstruct, name) for name in names)]


def _what(path: Path, error: Exception, allowed: Sequence[Any] = ()) -> str:
    try:
        with known_globals(allowed):
            names = sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception:
        names = []
    if names:
        shown = ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")
        return f"asks for {shown}, which is not on the list of harmless names"
    return _line(error)


def _line(error: Exception) -> str:
    """The first sentence of an error; one without words says what it is."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0][:200]
