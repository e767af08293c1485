"""Adapters of peft: LoRA weights that are merged into a model's on their way, a block of rows at a time.

As `merge_and_unload` has it: weight + (B @ A) x alpha / r, in fp32, rounded once to the type that is written.
"""

import re
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

from ee_scale.backbone.loading import ADAPTER_CONFIG
from ee_scale.conversion.model import MERGE_ADAPTER, Opened
from ee_scale.conversion.target_files import safetensors_extents
from ee_scale.conversion.tensors import Extent, Piece, Stored, TensorInfo, Update
from ee_scale.errors import UserError
from ee_scale.files import own_file
from ee_scale.reading import check_fields, read_object, shown

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings that say nothing of what a merged weight is: of training, or of how weights began.
IDLE = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
IDLE |= {"lora_dropout", "megatron_core", "eva_config", "layers_pattern", "qalora_group_size", "runtime_config"}
IDLE |= {"layers_to_transform", "exclude_modules", "loftq_config", "corda_config", "lora_ga_config"}
READ = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "bias"}
READ |= {"init_lora_weights"}
# Beginnings that leave the model's own weights as they are; with others (PiSSA, OLoRA, LoftQ) the adapter is one of a
# changed model.
BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")
PAIR = re.compile(r"(.+)\.lora_([AB])\.weight")


def with_adapter(opened: Opened, folder: Path) -> Opened:
    """The checkpoint with the adapter of a folder of peft in it. Raises `UserError` for what cannot be merged."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise UserError(f"adapter={folder}: no {ADAPTER_CONFIG} in it")
    settings = read_object(own_file(path))
    _check_settings(settings, path)
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"adapter={folder}: no {WEIGHTS} in it")
    pairs = _pairs(folder / WEIGHTS, opened)
    _check_targets(settings.get("target_modules"), settings, path, opened, pairs)
    stored, updates = [], {}
    for name, pair in sorted(pairs.items()):
        update = Update(f"{name}.lora_B", f"{name}.lora_A", _scale(settings, name, pair["A"].shape[0], path))
        updates[name] = update
        for key, extent in ((update.up, pair["B"]), (update.down, pair["A"])):
            piece = Piece(key, 0, (TensorInfo(extent.shape).whole(key),), extent.shape)
            stored.append(Stored(piece, extent))
    note = f"adapter={folder}: merged into {len(updates)} matrices"
    return replace(opened, stored=opened.stored + stored, updates=updates, notes=[*opened.notes, note])


def _check_settings(settings: dict[str, Any], path: Path) -> None:
    kinds: dict[str, object] = {
        "peft_type": str,
        "r": int,
        "lora_alpha": int | float,
        "target_modules": list[str] | str,
    }
    check_fields(settings, path, **kinds)
    optional = {"rank_pattern": dict[str, int], "alpha_pattern": dict[str, int | float], "use_rslora": bool}
    check_fields(settings, path, **{name: kind | None for name, kind in optional.items() if name in settings})
    if settings["peft_type"] != "LORA":
        raise UserError(f"{path}: peft_type={shown(settings['peft_type'])}: only LORA is merged; {MERGE_ADAPTER}")
    odd = [name for name, value in settings.items() if value and name not in IDLE | READ]
    if settings.get("bias", "none") != "none":
        odd.append("bias")
    if settings.get("init_lora_weights", True) not in BEGINNINGS:
        odd.append("init_lora_weights")
    for name in odd:
        raise UserError(f"{path}: {name}={shown(settings[name])}: is not merged here; {MERGE_ADAPTER}")


def _pairs(path: Path, opened: Opened) -> dict[str, dict[str, Extent]]:
    """Name of a matrix of the model -> its A [r, in] and B [out, r]. Raises `UserError`."""
    info, found = opened.model.info(), {}
    tied = opened.model.config.tie_word_embeddings
    for key, extent in safetensors_extents(own_file(path)).items():
        match = PAIR.fullmatch(key.removeprefix(PREFIX))
        name = f"{match[1]}.weight" if match else ""
        name = name if name in info else f"model.{name}"
        if match is None or name not in info or (tied and name == "lm_head.weight"):
            raise UserError(
                f"{path}: '{key}': not the half of an update of a matrix of this model; what else an adapter may "
                f"hold (embeddings, whole modules, biases, magnitudes) is not merged here; {MERGE_ADAPTER}"
            )
        if not extent.dtype.is_floating_point:
            raise UserError(f"{path}: '{key}' is stored as {extent.dtype}")
        found.setdefault(name, {})[match[2]] = extent
    for name, pair in found.items():
        if len(pair) < 2:
            raise UserError(f"{path}: '{name}' has lora_{min(pair)} alone; both halves are needed")
        down, up, shape = pair["A"].shape, pair["B"].shape, info[name].shape
        if len(down) != 2 or len(up) != 2 or (up[0], down[1]) != shape or up[1] != down[0]:
            raise UserError(f"{path}: B {list(up)} x A {list(down)} do not make '{name}' {list(shape)}")
    return found


def _check_targets(
    targets: list[str] | str, settings: dict[str, Any], path: Path, opened: Opened, pairs: dict[str, dict[str, Extent]]
) -> None:
    """Raise `UserError` for a target that the model lacks, or that has no weights in the file."""
    if not pairs:
        raise UserError(f"{path.parent / WEIGHTS}: no weights in it")
    if isinstance(targets, str):  # a pattern
        return
    matrices = [name for name, tensor in opened.model.info().items() if len(tensor.shape) == 2]
    for target in targets:
        meant = [name for name in matrices if f".{name}".endswith(f".{target}.weight")]
        if not meant:
            raise UserError(f"{path}: target_modules: the model has no matrix '{target}'")
        some = settings.get("layers_to_transform") is not None or settings.get("exclude_modules") is not None
        missing = [name for name in meant if name not in pairs]
        if missing and (not some or len(missing) == len(meant)):
            raise UserError(
                f"{path.parent / WEIGHTS}: target_modules names '{target}', but '{missing[0]}' has no update"
            )


def _scale(settings: dict[str, Any], name: str, rank: int, path: Path) -> float:
    module = name.removesuffix(".weight")
    asked = _of_pattern(settings, "rank_pattern", module, settings["r"], path)
    if asked != rank or rank < 1:
        raise UserError(f"{path}: r={asked} for '{module}', but its matrices in {WEIGHTS} have rank {rank}")
    alpha = _of_pattern(settings, "alpha_pattern", module, settings["lora_alpha"], path)
    return alpha / (sqrt(rank) if settings.get("use_rslora") else rank)


def _of_pattern(settings: dict[str, Any], field: str, module: str, usual: float, path: Path) -> float:
    """The value of the first name in a pattern that a module's name ends with."""
    for name, value in (settings.get(field) or {}).items():
        if not re.fullmatch(r"[\w.]+", name):
            raise UserError(f"{path}: {field}: {shown(name)} is no plain name; {MERGE_ADAPTER}")
        if f".{module}".endswith(f".{name}"):
            return value
    return usual
