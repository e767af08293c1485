"""The output folder of a run: one resolved config, one identity, metrics, checkpoints. One folder holds one run."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from ee_scale.artifact.checkpoint import checkpoints, read_checkpoint
from ee_scale.backbone.exit_layers import read_spec
from ee_scale.backbone.fingerprint import fingerprint, is_model
from ee_scale.backbone.model_path import find_gguf, plain_folder
from ee_scale.config.compose import to_yaml
from ee_scale.config.supernet import DistillConfig, ImportanceConfig, SamplingConfig
from ee_scale.data.provenance import SOURCES
from ee_scale.errors import STOPPED, UserError
from ee_scale.exits.joint import FROZEN
from ee_scale.files import write_text
from ee_scale.modeling.heads import SHORTLIST
from ee_scale.reading import Count, check_fields, parse_json, read_json, write_json
from ee_scale.training.recipe import Recipe

CONFIG, IDENTITY, METRICS, CHECKPOINTS = "config.yaml", "run.json", "metrics.jsonl", "checkpoints"

BACKBONE, OWN_TEXT = "backbone.mode", "data.own_text"
MAY_CHANGE = (
    *("exits.layers", "exits.loss_chunk_tokens", "distill.loss_chunk_tokens", "distill.cache_gb"),
    "backbone.activation_checkpointing",
    *("data.cache_dir", "data.cache_taps", "data.num_workers", "data.valid"),
    "data.licenses",
    "data.errors",  # the digest of the tokens knows
)

# What settings are in a run of a version that did not have them.
UNSAID = {
    BACKBONE: FROZEN,
    "space.palette": [],
    **{f"importance.{name}": getattr(ImportanceConfig(), name) for name in ("layers", "layer_samples")},
    **{f"sampling.{name}": getattr(SamplingConfig(), name) for name in ("full_every", "palette_share")},
    **{f"distill.{name}": getattr(DistillConfig(), name) for name in ("cache", "cache_samples")},
}


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


def run_identity(recipe: Recipe[Any, Any], data: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for a run to go on: settings that shape the result, the base model and the data."""
    values: dict[str, Any] = asdict(recipe.config)
    settings: dict[str, Any] = {}
    for key in recipe.identity:
        found = values
        for part in key.split("."):
            found = found[part]
        group = isinstance(found, dict)
        settings |= {f"{key}.{name}": value for name, value in found.items()} if group else {key: found}
    if settings.get(BACKBONE) == FROZEN:  # then the rest of that group means nothing
        settings = {key: value for key, value in settings.items() if not key.startswith("backbone.")}
        settings[BACKBONE] = FROZEN
    if not settings.get(OWN_TEXT):
        settings = {key: value for key, value in settings.items() if not key.startswith(OWN_TEXT)}
    if not settings.get("space.palette"):  # then there is nothing to have a share of
        settings.pop("sampling.palette_share", None)
    if settings.get("exits.head") != SHORTLIST:  # then its length means nothing
        settings.pop("exits.shortlist", None)
    model_dir = recipe.plan.model_dir
    given = find_gguf(Path(recipe.config.model.path).expanduser())  # what lies in the cache may be gone some day
    return {
        "kind": recipe.verb,
        "base_model": str((given or model_dir).resolve()),
        "base_fingerprint": fingerprint(model_dir),
        "settings": {key: value for key, value in settings.items() if key not in MAY_CHANGE},
        **recipe.facts(),
        "data": data,
    }


def open_run(recipe: Recipe[Any, Any], data: dict[str, Any]) -> OpenedRun:
    """Make or re-open the output folder. One process calls it, before any rank trains.

    data: which data it is, as `Recipe.prepare` says. Raises `UserError` if the folder holds another run, a damaged
    checkpoint, or cannot be written.
    """
    config, identity = recipe.config, run_identity(recipe, data)
    out = Path(config.out).expanduser()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={out}: cannot write there ({error.strerror})") from error
    if not os.access(out, os.W_OK):
        raise UserError(f"out={out}: cannot write there (Permission denied)")
    if (out / IDENTITY).is_file():
        if config.train.resume == "never":
            raise UserError(f"out={out}: holds a run already and train.resume=never; choose another out")
        stored = _read_identity(out)
        _check_same(out, stored, identity)
        identity = stored
    else:
        identity["run_id"] = uuid4().hex[:8]
        write_json(out / IDENTITY, identity)
    (out / STOPPED).unlink(missing_ok=True)
    write_text(out / CONFIG, to_yaml(config))
    folder = max(checkpoints(out / CHECKPOINTS).items(), default=(0, None))[1]
    state = read_checkpoint(folder) if folder else {}
    trim_metrics(out / METRICS, state.get("step", 0))
    return OpenedRun(out, identity, folder, state)


def read_run(out: Path, kind: str = "tune") -> dict[str, Any]:
    """The identity of a finished or running run. Raises `UserError` if the folder holds none of that kind."""
    if not (out / IDENTITY).is_file():
        raise UserError(f"src={out}: no {IDENTITY} in it; give the output folder of ee-scale {kind}")
    identity = _read_identity(out)
    if identity.get("kind", "tune") != kind:
        raise UserError(
            f"src={out}: a run of ee-scale {identity.get('kind', 'tune')}; one of ee-scale {kind} is wanted"
        )
    return identity


def _read_identity(out: Path) -> dict[str, Any]:
    identity, path = read_json(out / IDENTITY), out / IDENTITY
    check_fields(identity, path, base_model=str, base_fingerprint=str, settings=dict[str, Any], run_id=str)
    check_fields({"kind": "tune", **identity}, path, kind=str)
    if identity.get("kind", "tune") == "tune":
        check_fields(identity, path, early_exit=dict[str, Any])
        read_spec(identity["early_exit"], path)
    elif identity["kind"] == "supernet":
        check_fields(identity, path, task=str, labels=list[str], parts=Count)
    return identity


def trim_metrics(path: Path, step: int) -> None:
    """Forget the lines after `step`: the run is about to write them again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            if parse_json(line.decode())["step"] <= step:
                kept.append(line.decode() + "\n")
        except (ValueError, KeyError, TypeError):
            break  # the torn last line of a killed run
    write_text(path, "".join(kept))


def _check_same(out: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    def refuse(name: str, there: object, here: object) -> None:
        raise UserError(f"out={out}: holds another run ({name}={there} there, {here} here); choose another out")

    if old.get("kind", "tune") != new["kind"]:
        refuse("command", old.get("kind", "tune"), new["kind"])
    if not is_model(plain_folder(Path(new["base_model"])), old["base_fingerprint"]):
        refuse("model.path", old["base_model"], new["base_model"])
    if "early_exit" in new and old["early_exit"]["layers"] != new["early_exit"]["layers"]:
        refuse("exits.layers", old["early_exit"]["layers"], new["early_exit"]["layers"])
    if new.get("labels") != old.get("labels"):
        refuse("labels", old.get("labels"), new.get("labels"))
    before = {**UNSAID, **old["settings"]}
    for key, value in new["settings"].items():
        if before.get(key) != value:
            refuse(key, before.get(key), value)
    if "data" in old and _without_sources(old["data"]) != _without_sources(new["data"]):
        raise UserError(
            f"out={out}: its run was trained on other data: {_changed(old['data'], new)}; give that back, or choose "
            "another out"
        )
    if "early_exit" in new and old["early_exit"].get("shortlist_ids") != new["early_exit"].get("shortlist_ids"):
        raise UserError(
            f"out={out}: its run's shortlist has other tokens than the {new['settings']['exits.shortlist']} chosen now "
            "(the model's special tokens have changed?); choose another out"
        )


def _without_sources(data: dict[str, Any]) -> dict[str, Any]:
    """The tokens are what counts, whatever they are called."""
    return {key: value for key, value in data.items() if key != SOURCES}


def _changed(old: dict[str, Any], new: dict[str, Any]) -> str:
    for name in ("eos_token_id", "pad_token_id"):
        if old[name] != new["data"][name]:
            return f"the tokenizer's {name} was {old[name]} and is {new['data'][name]}"
    if old.get("own_text") != new["data"].get("own_text"):
        return "what the model writes (data.own_text) came out otherwise"
    path, pairs = new["settings"]["data.path"], zip(old["tokens"], new["data"]["tokens"], strict=False)
    number = next((i for i, (there, here) in enumerate(pairs) if there != here), 0)
    name = path if isinstance(path, str) else path[number]
    return f"the tokens of data.path='{name}' are not those of then (its text or the model's tokenizer has changed)"
