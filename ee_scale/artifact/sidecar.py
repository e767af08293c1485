"""The sidecar: the exits alone, and a JSON that names their base model."""

from pathlib import Path
from typing import Any

from ee_scale.artifact.files import check_files, read_json

SIDECAR_CONFIG, SIDECAR_WEIGHTS = "exits.json", "exits.safetensors"


def read_sidecar(folder: Path) -> dict[str, Any]:
    """exits.json, after its weights were compared with their digest. Raises `UserError`."""
    facts = read_json(folder / SIDECAR_CONFIG)
    check_files(folder, facts["files"])
    return facts
