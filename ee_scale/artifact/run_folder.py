"""The output folder of a run: one resolved config, one identity, metrics, checkpoints. One folder holds one run."""

import json
import os
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ee_scale.artifact.checkpoint import checkpoints, read_checkpoint
from ee_scale.artifact.files import read_json, write_json, write_text
from ee_scale.backbone.loading import fingerprint
from ee_scale.config.compose import to_yaml
from ee_scale.errors import UserError
from ee_scale.training.plan import TunePlan

CONFIG, IDENTITY, METRICS, CHECKPOINTS = "config.yaml", "run.json", "metrics.jsonl", "checkpoints"

# What makes a run that run. Everything else (grid, steps, logging, ...) may change when it goes on.
IDENTITY_KEYS = (
    "exits.kind exits.head exits.rank exits.init exits.loss_weights exits.loss_weight_init "
    "exits.loss_weight_warmup_steps exits.loss_weight_warmup_style exits.confidence_weighting exits.kl_weight "
    "exits.kl_temperature data.path data.weights data.seq_length data.text_key data.seed optim.lr optim.min_lr "
    "optim.betas optim.eps optim.weight_decay optim.clip_grad optim.warmup_fraction optim.decay "
    "train.global_batch_size train.seed"
).split()


def run_identity(config: Any, plan: TunePlan) -> dict[str, Any]:
    """What must be equal for a run to go on: settings that shape the result, the exits and the base model."""
    settings = {key: OmegaConf.select(config, key) for key in IDENTITY_KEYS}
    settings = {k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in settings.items()}
    return {
        "base_model": str(plan.model_dir.resolve()),
        "base_fingerprint": fingerprint(plan.model_dir),
        "early_exit": plan.spec.to_dict(),
        "settings": settings,
    }


def open_run(out: Path, config: Any, plan: TunePlan) -> tuple[dict[str, Any], Path | None, dict[str, Any]]:
    """Make or re-open the output folder. One process calls it, before any rank trains.

    Returns (identity, checkpoint to continue from or None, its state). Raises `UserError` if the folder holds another
    run, a damaged checkpoint, or cannot be written.
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
        _check_same(out, read_json(out / IDENTITY), identity)
    else:
        write_json(out / IDENTITY, identity)
    write_text(out / CONFIG, to_yaml(config))
    folder = max(checkpoints(out / CHECKPOINTS).items(), default=(0, None))[1]
    state = read_checkpoint(folder) if folder else {}
    trim_metrics(out / METRICS, state.get("step", 0))
    return identity, folder, state


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
