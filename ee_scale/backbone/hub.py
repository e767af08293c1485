"""A model by its folder or GGUF file, or by its name on the hub."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from ee_scale.backbone.loading import INDEX_NAME, SAVE_AS_SAFETENSORS, SINGLE_NAME
from ee_scale.backbone.model_path import plain_folder
from ee_scale.backbone.small_files import SMALL_FILES
from ee_scale.errors import UserError, one_line
from ee_scale.reading import read_object

# Patterns of the hub match through folders; of these only additional_chat_templates is wanted.
FOLDERS = ("[!a]*/*", "a[!d]*/*")


def find_model(path: str) -> Path:
    """A local folder, that of a GGUF file, or a hub name ('org/name') that is downloaded once. Raises `UserError` if
    there is none.
    """
    folder = plain_folder(Path(path).expanduser())
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise UserError(f"model.path={path}: no such folder")
    try:
        folder = _download(path)
    except Exception as error:
        line = f"model.path={path}: no such folder, and not to be had from the hub ({one_line(error)})"
        raise UserError(line) from error
    if not any((folder / name).is_file() for name in (SINGLE_NAME, INDEX_NAME)):
        raise UserError(f"model.path={path}: no {SINGLE_NAME} or {INDEX_NAME} on the hub; {SAVE_AS_SAFETENSORS}")
    return folder


def _download(name: str) -> Path:
    """What transformers would load, all of one commit: small files, then the weights in the one form that is read."""
    wanted = ["config.json", INDEX_NAME, *SMALL_FILES]
    folder = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=list(FOLDERS)))
    snapshot_download(name, revision=folder.name, allow_patterns=[SINGLE_NAME])
    if not (folder / SINGLE_NAME).is_file() and (folder / INDEX_NAME).is_file():
        index = read_object(folder / INDEX_NAME)
        shards = sorted(set(index["weight_map"].values()))
        snapshot_download(name, revision=folder.name, allow_patterns=shards)
    return folder
