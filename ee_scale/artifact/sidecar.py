"""The sidecar: the exits alone, and a JSON that names their base model."""

from pathlib import Path
from typing import Any

from ee_scale.errors import UserError
from ee_scale.reading import check_fields, check_files, read_json

SIDECAR_CONFIG, SIDECAR_WEIGHTS = "exits.json", "exits.safetensors"


def base_folder(folder: Path, facts: dict[str, Any]) -> Path:
    """The base model that a sidecar or a run in `folder` names, wherever it lies; a relative path begins there.

    For reading, once its fingerprint is that of the facts. Raises `UserError` for what is no path.
    """
    name = facts.get("base_model")
    if not isinstance(name, str) or "\0" in name:
        raise UserError(f"{folder}: its base model is {name!r}, which is no path")
    return folder / name


def read_sidecar(folder: Path) -> dict[str, Any]:
    """exits.json, after its weights were compared with their digest. Raises `UserError`."""
    facts = read_json(folder / SIDECAR_CONFIG)
    kinds = {"files": dict[str, str], "base_model": str, "base_fingerprint": str, "early_exit": dict[str, Any]}
    check_fields(facts, folder / SIDECAR_CONFIG, **kinds)
    if SIDECAR_WEIGHTS not in facts["files"]:
        raise UserError(f"{folder / SIDECAR_CONFIG}: no digest of {SIDECAR_WEIGHTS} in it")
    check_files(folder, facts["files"])
    return facts
