"""Where a model lies: the one place where a path that a person gives becomes a folder, also that of a GGUF file.

Such a file is dequantized once, into the cache, under the digest of its bytes: the same file gives the same folder,
whatever it is called, so that a run that was trained on it goes on when the cache was emptied.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock, Timeout
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import GenerationConfig

from ee_scale.errors import UserError, one_line
from ee_scale.files import cache_folder, is_file, own_file, published, write_text
from ee_scale.log import log
from ee_scale.progress import stages, transfer
from ee_scale.reading import check_fields, read_json, write_json

if TYPE_CHECKING:
    from ee_scale.backbone.gguf_file import GGUFFile

FORMAT = 1  # of what is written for a file; another number makes it anew
ENDING, MAGIC = ".gguf", b"GGUF"
MODELS = ("config.json", "exits.json")  # a folder with one of these is a model's itself
FACTS = "gguf.json"  # what a folder was made of
INDEX = "model.safetensors.index.json"
SHARD = "2GB"  # held in memory at once
SLACK = 64 << 20  # bytes of disk for tokenizer and config
ELSEWHERE = "set EE_SCALE_CACHE to a folder with more room"


def plain_folder(path: Path) -> Path:
    """`path` itself; for a GGUF file, or a folder that holds one and no model beside it, its folder in the cache, which
    is made now if it is not there. Safe in several processes at once. Raises `UserError`.
    """
    file = find_gguf(path)
    if file is None:
        return path
    root = cache_folder() / "gguf"
    try:
        folder = _known_folder(file, root)
        if folder is None or not folder.is_dir():
            root.mkdir(parents=True, exist_ok=True)
            with _alone(root):
                folder = _dequantized(file, root)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: no plain copy of it in {root}: {one_line(error)}; {ELSEWHERE}") from error
    _tell(file.name, folder)
    return folder


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a path means; None: it means something else. Raises `UserError` for a folder of several."""
    if path.suffix.lower() == ENDING and not path.is_dir():
        if not is_file(path):
            raise UserError(f"{path}: no such file")
        return path
    if is_file(path) and os.access(path, os.R_OK):
        with path.open("rb") as file:
            return path if file.read(len(MAGIC)) == MAGIC else None
    if not path.is_dir() or any((path / name).is_file() for name in MODELS):
        return None
    found = sorted(path.glob(f"*{ENDING}"))
    if len(found) > 1:
        names = f"{found[0].name}, {found[1].name}" + (", ..." if len(found) > 2 else "")
        raise UserError(f"{path}: holds {len(found)} GGUF files ({names}); name one of them")
    return own_file(found[0]) if found else None


def _dequantized(file: Path, root: Path) -> Path:
    """The folder of a file, which another process may have made meanwhile; by one process at a time."""
    from ee_scale.backbone.gguf_file import GGUFFile  # an optional package

    before = _state(file)
    if (folder := _folder(file, root)).is_dir():
        return folder
    for left in root.glob(f".{folder.name}.*"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    log.info("%s: decoding its weights, once", file.name)
    with published(folder) as temporary, stages() as show:
        show("reading the header", 0)
        _write(GGUFFile(file), temporary, show)
        if _state(file) != before:
            raise UserError(f"{file}: changed while it was read")
    return folder


def _write(source: "GGUFFile", folder: Path, show: Callable[[str, float], None]) -> None:
    """A folder as transformers saves one. Raises `UserError` if the file is refused or the disk has too little room."""
    show("reading config and tokenizer", 0)
    size = sum(source.model.state_dict()[name].numel() for name in source.names) * source.dtype.itemsize
    tokenizer, config = source.tokenizer, source.config
    if (free := shutil.disk_usage(folder.parent).free) < size + SLACK:
        raise UserError(
            f"{source.path}: its plain copy takes {size / 1e9:.1f} GB, and {folder.parent} has {free / 1e9:.1f} GB "
            f"left; {ELSEWHERE}"
        )
    _write_weights(source, folder, lambda nbytes: show("decoding weights", nbytes / size))
    config.dtype, config.architectures = source.dtype, [type(source.model).__name__]
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts = {
        "quantization": source.quantization,
        "bits_per_weight": round(source.bits_per_weight, 2),
        "weights": source.num_weights,
        "dtype": str(source.dtype).removeprefix("torch."),
        "left_out": source.left_out,
    }
    write_json(folder / FACTS, facts)


def _write_weights(source: "GGUFFile", folder: Path, done: Callable[[int], None]) -> None:
    """Shards and their index; `done` is told the bytes so far."""
    model, nbytes = source.model.state_dict(), 0
    model = {name: torch.empty_like(model[name], dtype=source.dtype) for name in source.names}
    split = split_torch_state_dict_into_shards(model, max_shard_size=SHARD)
    for name, parameters in split.filename_to_tensors.items():
        shard: dict[str, torch.Tensor] = {}
        for parameter in parameters:
            shard[parameter] = source.read(parameter).to(source.dtype).contiguous()
            nbytes += shard[parameter].nbytes
            done(nbytes)
        save_file(shard, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One process at a time; the others find what it made."""
    lock = FileLock(root / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("another process is dequantizing a model; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _known_folder(file: Path, root: Path) -> Path | None:
    """The folder of a file whose digest was noted and that has not changed since."""
    note = _note(file, root)
    digest = note.read_text(encoding="utf-8") if note.is_file() else ""
    return root / _name(digest) if re.fullmatch(r"[0-9a-f]{64}", digest) else None


def _folder(file: Path, root: Path) -> Path:
    """The same, whose digest is computed and noted if it was not."""
    if (known := _known_folder(file, root)) is not None:
        return known
    note, digest = _note(file, root), hashlib.sha256()
    with file.open("rb") as stream, transfer("reading", file.stat().st_size) as moved:
        while block := stream.read(1 << 22):
            digest.update(block)
            moved(len(block))
    write_text(note, digest.hexdigest())
    return root / _name(digest.hexdigest())


def _name(digest: str) -> str:
    """Of a folder: changes with the file's bytes, and with who reads them."""
    from ee_scale.backbone.gguf_file import READERS

    return hashlib.sha256(json.dumps([FORMAT, digest, READERS]).encode()).hexdigest()[:32]


def _note(file: Path, root: Path) -> Path:
    """Where the digest of a file is noted: large ones take a while to read."""
    return root / f"{hashlib.sha256(json.dumps(_state(file)).encode()).hexdigest()[:32]}.sha256"


def _state(file: Path) -> list[str | int]:
    """Changes whenever the file does."""
    stat = file.stat()
    return [str(file.resolve()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


@cache
def _tell(name: str, folder: Path) -> None:
    """Say once what a model is stored in, and what its file says that nobody here knows."""
    facts = read_json(folder / FACTS)
    kinds = {"quantization": str, "bits_per_weight": float, "weights": int, "dtype": str, "left_out": list[str]}
    check_fields(facts, folder / FACTS, **kinds)
    log.info(
        "%s: %.1f M weights in %s, %.2f bits per weight; read as %s from %s",
        *(name, facts["weights"] / 1e6, facts["quantization"], facts["bits_per_weight"], facts["dtype"], folder),
    )
    if facts["left_out"]:
        log.warning("%s: not known here, and left out: %s", name, ", ".join(facts["left_out"]))
