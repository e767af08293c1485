"""Where a calibration lives: in `generation_config.json` of the folder that holds the exits, whole model or sidecar."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig

from ee_scale.backbone.small_files import GENERATION_CONFIG
from ee_scale.errors import UserError
from ee_scale.files import write_text
from ee_scale.modeling.policies import CALIBRATION_KEY, check_calibration
from ee_scale.reading import read_object


def read_calibration(folder: Path) -> dict[str, Any] | None:
    """The stored calibration, if there is one. Raises `UserError` for a file that says something else."""
    found = _read(folder).get(CALIBRATION_KEY)
    if found is not None:
        try:
            check_calibration(found)
        except ValueError as error:
            raise UserError(f"{folder / GENERATION_CONFIG}: {error}") from error
    return found


def write_calibration(folder: Path, calibration: dict[str, Any]) -> None:
    """Store a calibration; every other setting of the file stays. Raises `UserError` if it cannot be written."""
    path = folder / GENERATION_CONFIG
    values = _read(folder)
    if not path.is_file() and (folder / "config.json").is_file():
        # Without this file transformers takes its settings (the end token, say) from config.json; with it, no more.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        values = json.loads(GenerationConfig.from_model_config(config).to_json_string(use_diff=True))
    # transformers drops what it does not know from a file with this mark, which says that nobody wrote to it.
    values.pop("_from_model_config", None)
    try:
        write_text(path, json.dumps({**values, CALIBRATION_KEY: calibration}, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror})") from error


def _read(folder: Path) -> dict[str, Any]:
    path = folder / GENERATION_CONFIG
    return read_object(path) if path.is_file() else {}
