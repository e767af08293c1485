"""Write a model folder: config, shards and their index, tokenizer and small files; a sidecar; a calibration."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoConfig, GenerationConfig

from ee_scale.backbone.loading import INDEX_NAME, SINGLE_NAME
from ee_scale.backbone.model_folder import SIDECAR_CONFIG, SIDECAR_WEIGHTS, ModelFolder
from ee_scale.backbone.small_files import GENERATION_CONFIG, small_files
from ee_scale.errors import UserError
from ee_scale.files import file_digest, own_file, write_text
from ee_scale.modeling.calibration import CALIBRATION_KEY
from ee_scale.modeling.wrapped import MARK
from ee_scale.reading import parse_json, read_object, write_json

# Keys of config.json that speak of files not copied.
OF_THE_SOURCE = ("early_exit", "auto_map", "_name_or_path", MARK)

T = TypeVar("T")


def write_beside(
    folder: Path, base: Path | None, values: dict[str, Any] | None = None, *, same_exits: bool = False, **own: object
) -> None:
    """What goes with weights that were made of those in `base`: config.json, and its small files.

    `values`: of the config, if not those of `base`; what they say of exits, of loading code and of where they come from
    is left out, and `own` is added. `same_exits`: see `copy_small_files`.
    """
    if values is None:
        assert base is not None  # one of both says what the model is
        values = read_object(base / "config.json")
    kept = {name: value for name, value in values.items() if name not in OF_THE_SOURCE}
    write_text(folder / "config.json", json.dumps(kept | own, indent=2) + "\n")
    if base is not None:
        copy_small_files(base, folder, same_exits=same_exits)


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


def shards(items: Iterable[T], nbytes: Callable[[T], int], most: int) -> list[list[T]]:
    """The items, in order, in groups of at most `most` bytes (a larger one is a group alone)."""
    groups: list[list[T]] = []
    room = 0
    for item in items:
        size = nbytes(item)
        if not groups or size > room:
            groups.append([])
            room = most
        groups[-1].append(item)
        room -= size
    return groups


def shard_names(count: int) -> list[str]:
    """What the weight files of a folder are called."""
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return names if count > 1 else [SINGLE_NAME]


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    """`model.safetensors.index.json`: tensor name -> file, and the bytes of all tensors; a single file has none."""
    if set(weight_map.values()) == {SINGLE_NAME}:
        return
    size = 0
    for name in set(weight_map.values()):
        with (folder / name).open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        size += (folder / name).stat().st_size - 8 - header
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")


def write_sidecar(folder: Path, facts: dict[str, Any]) -> None:
    """exits.json, with what is known of the exits whose weights lie in `folder`."""
    files = {SIDECAR_WEIGHTS: file_digest(folder / SIDECAR_WEIGHTS)}
    write_json(folder / SIDECAR_CONFIG, facts | {"files": files})


def write_calibration(path: Path, calibration: dict[str, Any]) -> None:
    """Store a calibration beside the exits, in a whole model or a sidecar; every other setting of the file stays.

    Raises `UserError` if it cannot be written.
    """
    file, values = path / GENERATION_CONFIG, ModelFolder(path).settings()
    if not file.is_file() and (path / "config.json").is_file():
        # Without this file transformers takes its settings (the end token, say) from config.json; with it, no more.
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        values = json.loads(GenerationConfig.from_model_config(config).to_json_string(use_diff=True))
    # transformers drops what it does not know from a file with this mark, which says that nobody wrote to it.
    values.pop("_from_model_config", None)
    try:
        write_text(file, json.dumps({**values, CALIBRATION_KEY: calibration}, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{file}: cannot write ({error.strerror})") from error


def _drop_exits(path: Path) -> None:
    """Take what is said of exits out of a generation config; a file that says nothing of them stays as it is."""
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
        kept = {name: value for name, value in values.items() if not name.startswith(("exit_", CALIBRATION_KEY))}
    except (ValueError, AttributeError):
        return  # not an object of JSON: transformers says so
    if len(kept) < len(values):
        write_text(path, json.dumps(kept, indent=2) + "\n")
