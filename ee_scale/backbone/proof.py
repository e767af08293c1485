"""Whether a model that is cut, tapped and decoded as here computes what transformers' whole model computes.

Tried on a small random copy of its config before anything of its size is made, so that no list of families says it.
What was proved is kept: in the process, and on disk if it took long.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import torch
import transformers
from transformers import PreTrainedConfig

from ee_scale.backbone.proof_checks import (
    CheckError,
    Whole,
    check_count,
    check_decoding,
    check_exits,
    check_single_layers,
    check_stages,
    check_tensor,
)
from ee_scale.errors import UserError, one_line
from ee_scale.families.registry import decoder_family
from ee_scale.families.sizes import unknown_lists
from ee_scale.families.small import small_config
from ee_scale.files import cache_folder, write_text
from ee_scale.reading import read_object

Check = Callable[[Whole], None]
# By what a refusal calls them. Without these a model is not taken ...
NEEDED: dict[str, Check] = {
    "counted sizes": check_count,
    "pipeline stages chained == the whole": check_stages,
    "copied exit == logit lens": check_exits,
    "each layer alone == in its place": check_single_layers,
}
# ... and without these it does less.
TENSOR, DECODING = "tensor-parallel slices == the whole", "blocks with a cache == whole texts"

REMEMBERED = 1.0  # seconds; a proof that took longer is kept on disk
ROOMS = ("backbone", "families", "modeling")  # whose code it runs
SAID_BY = ("transformers_version", "_name_or_path", "dtype", "architectures", "auto_map", "early_exit")


@dataclass(frozen=True)
class Proof:
    """What holds of a model beside what is needed of every one.

    Attributes:
        layers: of the small copy.
        tensor, decoding: why it has no tensor ranks, or no decoding with exits; '' if it has.
    """

    layers: int
    tensor: str = ""
    decoding: str = ""


def prove(config: PreTrainedConfig) -> Proof:
    """Raises `UserError`, in one line with the check that failed, for a model that cannot be cut or tapped."""
    decoder_family(config)
    for name in unknown_lists(config):
        reason = f"its config says '{name}' of each layer, which is not known here"
        raise UserError(f"model.path: architecture '{config.model_type}' is not supported: {reason}")
    try:
        small = small_config(config)
        said = {name: value for name, value in small.to_dict().items() if name not in SAID_BY}
        said["attention"] = small._attn_implementation
        key = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()
    except Exception as error:  # a config may say anything
        reason = f"no small copy of its config ({type(error).__name__}: {one_line(error)})"
        raise UserError(f"model.path: architecture '{config.model_type}' is not supported: {reason}") from error
    return _proved(key, lambda: _prove(small))


def check_tensor_proof(config: PreTrainedConfig, tp: int) -> None:
    """Raise `UserError` if several tensor ranks would not compute what the model computes."""
    if tp > 1 and (reason := prove(config).tensor):
        raise UserError(f"parallel.tp={tp}: '{config.model_type}': {reason}; use tp=1")


def check_decoding_proof(config: PreTrainedConfig) -> None:
    """Raise `UserError` if decoding with exits would not compute what the model computes."""
    if reason := prove(config).decoding:
        raise UserError(f"model.path: '{config.model_type}' is not decoded with exits: {reason}")


def _prove(config: PreTrainedConfig) -> Proof:
    reason, whole = "", None
    with torch.no_grad(), _one_thread():
        try:
            whole = Whole(config)
        except Exception as error:
            reason = _said(error)
        for name, check in NEEDED.items():
            if whole is not None and not reason:
                reason = _reason(name, check, whole)
        if reason or whole is None:
            raise UserError(f"model.path: architecture '{config.model_type}' is not supported: {reason}")
        tensor, decoding = _reason(TENSOR, check_tensor, whole), _reason(DECODING, check_decoding, whole)
    return Proof(config.num_hidden_layers, tensor, decoding)


@contextmanager
def _one_thread() -> Iterator[None]:
    """More of them wait for one another longer than these small matrices take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _reason(name: str, check: Check, whole: Whole) -> str:
    """Why a check does not hold, or ''."""
    try:
        check(whole)
    except Exception as error:  # code that is written otherwise fails in many ways
        return f"{name}: {_said(error)}"
    return ""


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, CheckError) else f"{type(error).__name__}: {one_line(error)}"


# -- what was proved before --------------------------------------------------------------------------------------------

_known: dict[str, Proof | UserError] = {}


def _proved(key: str, make: Callable[[], Proof]) -> Proof:
    if key not in _known:
        versions = [key, transformers.__version__, torch.__version__, _own_version()]
        name = hashlib.sha256("\n".join(versions).encode()).hexdigest()[:32]
        path = cache_folder() / "proofs" / f"{name}.json"
        _known[key] = _stored(path) or _made(path, make)
    if isinstance(found := _known[key], UserError):
        raise UserError(str(found))
    return found


def _stored(path: Path) -> Proof | None:
    with suppress(UserError, TypeError, OSError):
        return Proof(**read_object(path)) if path.is_file() else None
    return None


def _made(path: Path, make: Callable[[], Proof]) -> Proof | UserError:
    start = perf_counter()
    try:
        proof = make()
    except UserError as error:
        return error
    if perf_counter() - start > REMEMBERED:
        with suppress(OSError):  # a cache that nobody may write to
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(asdict(proof)) + "\n")
    return proof


@cache
def _own_version() -> str:
    """Of ee_scale, and of its code that a proof runs."""
    digest, root = hashlib.sha256(version("ee-scale").encode()), Path(__file__).parents[1]
    for room in ROOMS:
        for path in sorted((root / room).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
