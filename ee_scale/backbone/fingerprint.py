"""A digest that tells one model from another without reading all of it."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ee_scale.backbone.loading import weight_files
from ee_scale.errors import UserError
from ee_scale.reading import parse_json, read_object

FINGERPRINT = "2:"  # how those of this version begin
READ_WHOLE = 1 << 26  # bytes: a smaller file is read to its end
BLOCK = 1 << 14
BLOCKS = 8  # of each tensor
# What transformers writes into a config without any meaning for the model.
SAVED_BY = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "auto_map", "architectures")


def fingerprint(folder: Path) -> str:
    """A digest that tells one model from another.

    SHA-256 over config.json (without what says who saved it), each weight file's size and header, and its tensors: of
    files above READ_WHOLE bytes, BLOCKS blocks of BLOCK bytes of each tensor, the first and the last among them. A
    change inside one big tensor that leaves these blocks as they are is not seen. Raises `UserError`.
    """
    digest = hashlib.sha256(json.dumps(_config_values(folder), sort_keys=True).encode())
    for path in weight_files(folder):
        for block in _sample(path):
            digest.update(block)
    return FINGERPRINT + digest.hexdigest()


def is_model(folder: Path, stored: str) -> bool:
    """Whether a folder holds the model with that fingerprint, also one that an earlier version made."""
    return stored == (fingerprint(folder) if stored.startswith(FINGERPRINT) else _first_fingerprint(folder))


def _config_values(folder: Path) -> dict[str, object]:
    return {key: value for key, value in read_object(folder / "config.json").items() if key not in SAVED_BY}


def _sample(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    yield size.to_bytes(8, "little")
    with path.open("rb") as file:
        if size <= READ_WHOLE:
            while block := file.read(1 << 20):
                yield block
            return
        header = _header(path, file, size)
        yield header
        for name, entry in sorted(parse_json(header.decode()).items()):
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            last = max(begin, end - BLOCK)
            for place in sorted({begin + (last - begin) * i // (BLOCKS - 1) for i in range(BLOCKS)}):
                file.seek(8 + len(header) + place)
                yield file.read(min(BLOCK, end - place))


def _header(path: Path, file: IO[bytes], size: int) -> bytes:
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise UserError(f"{path}: not a whole safetensors file (a header of {length:,} of its {size:,} bytes)")
    return file.read(length)


def _first_fingerprint(folder: Path) -> str:
    """That of the first version: 64 blocks of 64 KiB spread over each file, and no config."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            header = _header(path, file, size)
            digest.update(header)
            for i in range(64):
                file.seek(8 + len(header) + (size - 8 - len(header)) * i // 64)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()
