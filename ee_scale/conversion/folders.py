"""What lies in a folder: which format, which iteration, and whether a Hugging Face config came along."""

import re
from pathlib import Path
from typing import Any

from ee_scale.backbone.loading import ADAPTER_CONFIG
from ee_scale.backbone.model_folder import SIDECAR_CONFIG, ModelFolder
from ee_scale.backbone.model_path import plain_folder
from ee_scale.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
DIST_MARKER = "metadata.json"  # written last by Megatron-Core: its presence says that the save was finished
HF_PART = "huggingface"  # config and tokenizer that this converter puts beside Megatron's folder


def detect(folder: Path, iteration: int | None) -> str:
    """The format of a folder. Raises `UserError` saying what was looked for."""
    if not folder.is_dir():
        raise UserError(f"src={folder}: no such folder")
    if (folder / SIDECAR_CONFIG).is_file():
        return "sidecar"
    has_config, has_weights = (folder / "config.json").is_file(), any(folder.glob("*.safetensors"))
    if (folder / ADAPTER_CONFIG).is_file() and not has_config and not saved_by_deepspeed(folder):
        raise UserError(
            f"src={folder}: an adapter of peft, without the model it belongs to; give src=<base model> adapter={folder}"
        )
    if saved_by_deepspeed(folder) and not (has_config and has_weights):
        return "deepspeed"  # transformers' Trainer puts a config beside it, and weights only if told to
    if has_config:
        return "hf"
    return megatron_kind(iteration_folder(folder, iteration))


def saved_by_deepspeed(folder: Path) -> bool:
    """Whether a folder, or one in it, has files of DeepSpeed's engine."""
    return any(any(folder.glob(names)) for names in ("latest", "*_states.pt", "*/*_states.pt"))


def megatron_kind(iteration: Path) -> str:
    """Which of Megatron's two layouts an iteration's folder has. Raises `UserError`."""
    if (iteration / DIST_MARKER).is_file():
        return "megatron_core"
    if any(iteration.glob("mp_rank_*")):
        return "megatron_legacy"
    if (iteration / "common.pt").is_file() or (iteration / ".metadata").is_file():
        raise UserError(f"{iteration}: no {DIST_MARKER} in it; its save was never finished, or it is of another kind")
    raise UserError(
        f"src={iteration}: neither config.json (Hugging Face) nor {DIST_MARKER} (Megatron-Core) nor mp_rank_* "
        "(legacy Megatron) nor 'latest' (DeepSpeed) in it"
    )


def iteration_folder(root: Path, iteration: int | None) -> Path:
    """The folder of an iteration: `iter_0000010`, `release`, or `root` itself. Raises `UserError`."""
    saved = {int(path.name[5:]): path for path in root.glob("iter_*") if re.fullmatch(r"iter_\d{7,}", path.name)}
    if iteration is not None:
        if iteration not in saved:
            raise UserError(f"iteration={iteration}: {root} has {', '.join(map(str, sorted(saved))) or 'none'}")
        return saved[iteration]
    if not (root / TRACKER).is_file():
        if len(saved) > 1:
            raise UserError(f"iteration: {root} has {', '.join(map(str, sorted(saved)))} and no {TRACKER}; choose one")
        return next(iter(saved.values()), root)
    text = (root / TRACKER).read_text(encoding="utf-8").strip()
    if text == "release" and (root / text).is_dir():
        return root / text
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) not in saved:
        raise UserError(f"{root / TRACKER}: names {text!r}, which is not there")
    return saved[int(text)]


def hugging_face_part(folder: Path, model_folder: Path | None) -> tuple[Path | None, Any]:
    """(folder with config and tokenizer, its config): as given, or as it came with the checkpoint; else two None."""
    part = plain_folder(model_folder) if model_folder else folder / HF_PART
    if (part / "config.json").is_file():
        # What transformers' Trainer leaves beside a save of DeepSpeed may be weights in part, or none at all.
        return part, ModelFolder(part, alone=part == folder).decoder_config
    if model_folder is not None:
        raise UserError(f"model={model_folder}: no config.json in it")
    return None, None
