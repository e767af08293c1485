"""The output folder of a run: one resolved config, one identity, metrics, checkpoints. One folder holds one run."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from ee_scale.artifact.checkpoint import checkpoints, read_checkpoint
from ee_scale.artifact.files import read_json, write_json
from ee_scale.backbone.loading import fingerprint
from ee_scale.config.compose import as_dict, to_yaml
from ee_scale.errors import UserError
from ee_scale.files import write_text
from ee_scale.training.plan import TunePlan

CONFIG, IDENTITY, METRICS, CHECKPOINTS = "config.yaml", "run.json", "metrics.jsonl", "checkpoints"

# What makes a run that run. Everything else (grid, steps, precision, logging, ...) may change when it goes on.
IDENTITY_GROUPS = ("exits", "data", "optim")
IDENTITY_KEYS = ("train.global_batch_size", "train.seed")
MAY_CHANGE = ("exits.layers", "exits.loss_chunk_tokens", "data.cache_dir", "data.num_workers")


@dataclass(frozen=True)
class OpenedRun:
    """An output folder that is ready to be trained into.

    Attributes:
        identity: what run.json says.
        checkpoint: where to continue from, or None; `state` is its state.json, or empty.
    """

    out: Path
    identity: dict[str, Any]
    checkpoint: Path | None
    state: dict[str, Any]


def run_identity(config: Any, plan: TunePlan) -> dict[str, Any]:
    """What must be equal for a run to go on: settings that shape the result, the exits and the base model."""
    values = as_dict(config)
    keys = [f"{group}.{name}" for group in IDENTITY_GROUPS for name in values[group]] + list(IDENTITY_KEYS)
    settings = {key: values[key.split(".")[0]][key.split(".")[1]] for key in keys if key not in MAY_CHANGE}
    return {
        "base_model": str(plan.model_dir.resolve()),
        "base_fingerprint": fingerprint(plan.model_dir),
        "early_exit": plan.spec.to_dict(),
        "settings": settings,
    }


def open_run(out: Path, config: Any, plan: TunePlan) -> OpenedRun:
    """Make or re-open the output folder. One process calls it, before any rank trains.

    Raises `UserError` if the folder holds another run, a damaged checkpoint, or cannot be written.
    """
    identity = run_identity(config, plan)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={out}: cannot write there ({error.strerror})") from error
    if not os.access(out, os.W_OK):
        raise UserError(f"out={out}: cannot write there (Permission denied)")
    if (out / IDENTITY).is_file():
        if config.train.resume == "never":
            raise UserError(f"out={out}: holds a run already and train.resume=never; choose another out")
        stored = read_json(out / IDENTITY)
        _check_same(out, stored, identity)
        identity = stored
    else:
        identity["run_id"] = uuid4().hex[:8]
        write_json(out / IDENTITY, identity)
    write_text(out / CONFIG, to_yaml(config))
    folder = max(checkpoints(out / CHECKPOINTS).items(), default=(0, None))[1]
    state = read_checkpoint(folder) if folder else {}
    trim_metrics(out / METRICS, state.get("step", 0))
    return OpenedRun(out, identity, folder, state)


def read_run(out: Path) -> dict[str, Any]:
    """The identity of a finished or running run. Raises `UserError` if the folder holds none."""
    if not (out / IDENTITY).is_file():
        raise UserError(f"src={out}: no {IDENTITY} in it; give the output folder of ee-scale tune")
    return read_json(out / IDENTITY)


def trim_metrics(path: Path, step: int) -> None:
    """Forget the lines after `step`: the run is about to write them again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            break  # the torn last line of a killed run
    write_text(path, "".join(kept))


def _check_same(out: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    def refuse(name: str, there: Any, here: Any) -> None:
        raise UserError(f"out={out}: holds another run ({name}={there} there, {here} here); choose another out")

    if old["base_fingerprint"] != new["base_fingerprint"]:
        refuse("model.path", old["base_model"], new["base_model"])
    if old["early_exit"]["layers"] != new["early_exit"]["layers"]:
        refuse("exits.layers", old["early_exit"]["layers"], new["early_exit"]["layers"])
    for key, value in new["settings"].items():
        if old["settings"].get(key) != value:
            refuse(key, old["settings"].get(key), value)
