"""Read pickles of strangers without running them: an allow-list, and stand-ins for what need not be real."""

import argparse
import io
import pathlib
import pickle
import signal
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import IO, Any, Concatenate, ParamSpec, TypeVar

import torch
from torch.distributed.checkpoint import metadata, planner
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ee_scale.conversion.archive import Part, check_pickle, check_places, read_records
from ee_scale.errors import UserError, one_line

TRUST = "trust=true runs the code that the file names; give it only for files of people you trust"


class StandIn:
    """Takes the place of a class that only labels something (enums of Megatron in `args`)."""

    def __init__(self, *values: object):
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


T = TypeVar("T")
P = ParamSpec("P")
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
        with path.open("rb") if file == path else nullcontext(file) as opened:
            size = opened.seek(0, io.SEEK_END) and opened.tell()
            opened.seek(0)
            records = read_records(opened, size, trusted=trust)
            with known_globals(allowed), warnings.catch_warnings(action="ignore"):
                content = torch.load(opened, map_location="cpu", weights_only=not trust)
        check_places(content, records)
        return content
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: {_what(path, error, allowed)}; {TRUST}") from error
    except Exception as error:  # a file that is cut off or was made up fails in many ways
        raise UserError(f"{path}: not a whole file of torch.save ({_line(error)})") from error


def reads_strangers(open_folder: Callable[Concatenate[Path, P], T]) -> Callable[Concatenate[Path, P], T]:
    """For what opens a folder of pickles: their objects hold values of any type under any name, and code that counts on
    others fails in many ways. It then raises `UserError` that names the folder and what was met.
    """

    @wraps(open_folder)
    def opened(folder: Path, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return open_folder(folder, *args, **kwargs)
        except (UserError, OSError):
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {_line(error)}"
            raise UserError(f"{folder}: holds values that no checkpoint of its kind has ({reason})") from error

    return opened


def load_part(path: Path, file: IO[bytes], offset: int, length: int, *, trust: bool = False) -> Any:
    """`load_safely` of `length` bytes of an open file, `path`, from `offset` on."""
    try:
        part = Part(file, offset, length)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {_line(error)}, where its index has a tensor") from error
    return load_safely(io.BufferedReader(part), path, trust=trust)


def load_index(path: Path) -> metadata.Metadata:
    """The `.metadata` of a torch distributed checkpoint, by the allow-list alone. Raises `UserError`."""
    try:
        data = io.BytesIO(path.read_bytes())  # one that is read in pieces takes memory by the sizes that it is told
        check_pickle(data, len(data.getbuffer()))
        data.seek(0)
        found = _IndexUnpickler(data).load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: {error}; it is not the index of a torch distributed checkpoint") from error
    except Exception as error:  # a pickle that is cut off or was made up fails in many ways
        raise UserError(f"{path}: not a whole index of a torch distributed checkpoint ({_line(error)})") from error
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
    return one_line(error).split(". ")[0][:200]
