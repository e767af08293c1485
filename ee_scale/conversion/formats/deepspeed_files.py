"""The files of a DeepSpeed save: which there are, and what they hold by their metadata; no tensor is read."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ee_scale.conversion.target_files import tensor_extent
from ee_scale.conversion.tensors import Extent
from ee_scale.conversion.unpickle import load_safely
from ee_scale.errors import UserError

FILE = re.compile(r"(?:\w*?zero_pp_rank_(\d+)_)?mp_rank_(\d\d)_(model|optim)_states\.pt")
LAYER_FILE = re.compile(r"layer_\d+-model.*_states\.pt")
UNIVERSAL = "DeepSpeed's ds_to_universal writes every parameter whole (zero/<name>/fp32.pt)"


@dataclass
class Save:
    """What a tag's folder holds; names as DeepSpeed has them, and no tensor is read.

    Attributes:
        whole: what lies in one piece; parts: shapes of what the optimizer files have in parts; same: second name of a
            shared tensor -> first.
    """

    stage: int
    whole: dict[str, Extent]
    parts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def tag_folder(src: Path) -> Path:
    """The folder of one save: `src` itself, or what its file `latest` names. Raises `UserError`."""
    if not src.is_dir():
        raise UserError(f"src={src}: no such folder")
    if any(src.glob("*_states.pt")):
        return src
    tags, latest = sorted({path.parent.name for path in src.glob("*/*_states.pt")}), src / "latest"
    there = f"there: {', '.join(tags)}" if tags else "no saves of DeepSpeed (*_states.pt) are there"
    if not latest.is_file():
        raise UserError(f"src={src}: no file 'latest' in it; give the folder of one tag as src; {there}")
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    if tag not in tags:
        raise UserError(f"{latest}: names {tag!r}, which is not there; {there}")
    return src / tag


def scan(tag: Path, trust: bool = False) -> Save:
    """Look into every file of a tag's folder. Raises `UserError`."""
    models, shards = _files(tag)
    path = models.get(None) or models.get(0)
    if path is None:
        raise UserError(f"{tag}: no mp_rank_00_model_states.pt in it")
    state = {one: _content(one, "module", trust) for one in models.values()}[path]  # DeepSpeed's tool loads all of them
    module, groups = state["module"], state.get("param_shapes")
    if not groups and not shards:
        found = Save(0, _whole(path, module))
        if {extent.dtype for extent in found.whole.values()} - {torch.float32}:
            found.notes.append(
                f"{tag.name}: weights as the model computes with them; fp32 masters, if any, stay unread"
            )
        return found
    stage = _optimizer(tag, shards, trust).get("zero_stage")
    if stage is None:  # DeepSpeed's BF16_Optimizer: its tool does not take it for ZeRO
        note = f"{tag.name}: DeepSpeed's tool does not read the masters of its BF16_Optimizer; bf16 weights are taken"
        return Save(0, _whole(path, module), notes=[note])
    if stage == 3:
        _check_ranks(tag, "model", set(models), len(shards))
    if not isinstance(groups, list):
        raise UserError(f"{path}: no 'param_shapes', which say where a weight lies in the optimizer files")
    parts = {name: tuple(shape) for group in groups for name, shape in group.items()}
    trained = len(parts)
    if stage == 3:  # also frozen weights are in parts
        parts |= {name: tuple(shape) for name, shape in (state.get("frozen_param_shapes") or {}).items()}
    same = dict(state.get("shared_params") or {})
    names = set(state.get("buffer_names") or ()) if stage == 3 else set(module) - set(parts) - set(same)
    whole = _whole(path, {name: tensor for name, tensor in module.items() if name in names})
    note = f"{tag.name}: ZeRO {int(stage)}, {len(shards)} ranks: fp32 masters of {trained} weights, joined by DeepSpeed"
    note += f"; {len(whole)} that were not trained, as the model has them" if whole and stage < 3 else ""
    return Save(int(stage), whole, parts, same, [note])


def harmless() -> list[Any]:
    """The classes in DeepSpeed's optimizer files: an enum, the scale of the loss (fixed or not), part of a tensor."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]


def _files(tag: Path) -> tuple[dict[int | None, Path], dict[int | None, Path]]:
    """Model files and optimizer files by rank (None: the one of all ranks)."""
    paths = sorted(tag.glob("*_states.pt"))
    if layers := [path for path in paths if LAYER_FILE.fullmatch(path.name)]:
        raise UserError(
            f"{tag}: {len(layers)} files of single layers ({layers[0].name}): saved with pipeline parallelism, which "
            f"DeepSpeed's tool cannot put together. Each is a plain state dict of its layer; or {UNIVERSAL}"
        )
    found: dict[str, dict[int | None, Path]] = {"model": {}, "optim": {}}
    for path in paths:
        match = FILE.fullmatch(path.name)
        if match is None or (match[1] is None and match[3] == "optim"):
            raise UserError(f"{path}: not a file of ZeRO without experts; such saves cannot be converted")
        if int(match[2]):
            tensor_ranks = 1 + max(int(match[2]) for path in paths if (match := FILE.fullmatch(path.name)))
            raise UserError(
                f"{tag}: weights are cut over {tensor_ranks} tensor ranks (mp_rank_00 to {tensor_ranks - 1:02d}), and "
                f"DeepSpeed's tool does not join them; {UNIVERSAL}"
            )
        rank = None if match[1] is None else int(match[1])
        if (other := found[match[3]].setdefault(rank, path)) != path:
            raise UserError(f"{tag}: {other.name} and {path.name} are of two saves; keep those of one")
    return found["model"], found["optim"]


def _content(path: Path, needed: str, trust: bool, allowed: Sequence[Any] = ()) -> dict[str, Any]:
    """A file's dict, whose `needed` is a dict too; no tensor is read."""
    with FakeTensorMode():
        content = load_safely(path, path, trust=trust, allowed=allowed)
    if not isinstance(content, dict) or not isinstance(content.get(needed), Mapping):
        raise UserError(f"{path}: no '{needed}' in it; not a file of DeepSpeed")
    return content


def _optimizer(tag: Path, shards: Mapping[int | None, Path], trust: bool) -> Mapping[str, Any]:
    """The optimizer file of rank 0, after a look into all of them."""
    if not shards:
        raise UserError(f"{tag}: no *_optim_states.pt in it, and they hold the weights of ZeRO")
    allowed, found = harmless(), {}
    for rank, path in sorted(shards.items()):
        found[rank] = _content(path, "optimizer_state_dict", trust, allowed)["optimizer_state_dict"]
        count = found[rank].get("partition_count")  # of each group, up to ZeRO 2
        count = max(count, default=None) if isinstance(count, list) else count
        if not isinstance(count, int):
            raise UserError(f"{path}: no 'partition_count' in it; not an optimizer file of ZeRO")
        _check_ranks(tag, "optimizer", set(shards), count)
        if count != len(shards):
            raise UserError(f"{path}: saved by {count} ranks, but there are {len(shards)} such files")
    return found[0]


def _check_ranks(tag: Path, what: str, ranks: set[int | None], count: int) -> None:
    missing = sorted(set(range(count)) - ranks)
    if missing:
        shown = ", ".join(map(str, missing[:4])) + (" ..." if len(missing) > 4 else "")
        raise UserError(f"{tag}: saved by {count} ranks; {len(missing)} {what} files missing: zero_pp_rank {shown}")


def _whole(path: Path, tensors: Mapping[str, Any]) -> dict[str, Extent]:
    """Extents of all but scalars and empty tensors."""
    kept = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor) and value.ndim}
    return {name: tensor_extent(path, value) for name, value in kept.items() if value.numel()}
