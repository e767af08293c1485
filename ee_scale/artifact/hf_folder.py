"""What a Hugging Face folder has beside its weights: the index of its shards, tokenizer and other small files."""

import json
import shutil
from pathlib import Path

from ee_scale.backbone.loading import INDEX_NAME
from ee_scale.files import write_text

RECORD = "conversion.json"  # digests, in a folder that a conversion made


def copy_small_files(base: Path, folder: Path) -> None:
    """Tokenizer, generation config, licence: all but weights, their index and config.json."""
    for path in base.iterdir():
        small = path.suffix in (".json", ".jinja", ".model", ".txt") or path.name.upper().startswith("LICENSE")
        if path.is_file() and small and path.name not in ("config.json", INDEX_NAME, RECORD):
            shutil.copyfile(path, folder / path.name)


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    """`model.safetensors.index.json`: tensor name -> file, and the bytes of all tensors."""
    size = 0
    for name in set(weight_map.values()):
        with (folder / name).open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        size += (folder / name).stat().st_size - 8 - header
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")
