"""What a Hugging Face folder has beside its weights: config, the index of its shards, tokenizer and small files."""

import json
import shutil
from pathlib import Path
from typing import Any

from ee_scale.backbone.loading import INDEX_NAME
from ee_scale.backbone.small_files import GENERATION_CONFIG, small_files
from ee_scale.files import own_file, write_text
from ee_scale.modeling.policies import CALIBRATION_KEY
from ee_scale.reading import parse_json

RECORD = "conversion.json"  # digests, in a folder that a conversion made
OF_THE_SOURCE = ("early_exit", "auto_map", "_name_or_path")  # keys of config.json that speak of files not copied


def copy_small_files(base: Path, folder: Path, *, same_exits: bool = False) -> None:
    """Tokenizer, processor, generation settings, terms; config, weights and model card are the caller's.

    `same_exits`: the copy has the exits of `base` as they are, so settings and calibration of exits stay true.
    """
    for name in small_files(base):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(own_file(base / name), folder / name)
    path = folder / GENERATION_CONFIG
    if path.is_file() and not same_exits:
        _drop_exits(path)


def stock_config(values: dict[str, Any]) -> dict[str, Any]:
    """config.json of a copy: without exits, loading code and the name of what it was copied from."""
    return {name: value for name, value in values.items() if name not in OF_THE_SOURCE}


def write_config(folder: Path, values: dict[str, Any]) -> None:
    """config.json."""
    write_text(folder / "config.json", json.dumps(values, indent=2) + "\n")


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    """`model.safetensors.index.json`: tensor name -> file, and the bytes of all tensors."""
    size = 0
    for name in set(weight_map.values()):
        with (folder / name).open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        size += (folder / name).stat().st_size - 8 - header
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")


def _drop_exits(path: Path) -> None:
    """Take what is said of exits out of a generation config; a file that says nothing of them stays as it is."""
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
        kept = {name: value for name, value in values.items() if not name.startswith(("exit_", CALIBRATION_KEY))}
    except (ValueError, AttributeError):
        return  # not an object of JSON: transformers says so
    if len(kept) < len(values):
        write_text(path, json.dumps(kept, indent=2) + "\n")
