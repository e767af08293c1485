"""Exports of a run: the exits alone (sidecar), or one Hugging Face folder with base model and exits."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ee_scale.artifact.checkpoint import checkpoints, read_checkpoint
from ee_scale.artifact.files import file_digest, new_folder, write_json
from ee_scale.artifact.hf_folder import copy_small_files, stock_config, write_config, write_index
from ee_scale.artifact.run_folder import CHECKPOINTS, read_run
from ee_scale.artifact.sidecar import SIDECAR_CONFIG, SIDECAR_WEIGHTS, base_folder
from ee_scale.artifact.trained_base import TrainedBase
from ee_scale.backbone.fingerprint import is_model
from ee_scale.backbone.loading import SINGLE_NAME, TensorFolder, weight_files
from ee_scale.backbone.narrowing import narrowed
from ee_scale.errors import UserError
from ee_scale.files import write_text
from ee_scale.modeling.modeling_early_exit import AUTO_MAP, PREFIX, copy_code
from ee_scale.reading import read_object

EXITS_SHARD = "model-exit-heads.safetensors"


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a tune run.

    Attributes:
        exits: fp32 tensors, 'exit_heads.*'.
        facts: step, base model and its fingerprint, exits.
        files: of the checkpoint, with what trained of the backbone.
    """

    run: Path
    checkpoint: Path
    exits: dict[str, torch.Tensor]
    facts: dict[str, Any]
    files: list[str]

    def base(self) -> TrainedBase:
        """The base model with what the run trained of it. Raises `UserError` if it is gone or changed."""
        base = base_folder(self.run, self.facts)
        if not base.is_dir():
            raise UserError(f"src={self.run}: its base model {base} is not there any more")
        if not is_model(base, self.facts["base_fingerprint"]):
            raise UserError(f"src={self.run}: {base} changed since the exits were trained")
        return TrainedBase(base, self.checkpoint, self.files)


def open_trained(run: Path, step: int | None) -> Trained:
    """What a checkpoint of a run holds. Raises `UserError` if there is none or it is damaged."""
    identity = read_run(run)
    found = checkpoints(run / CHECKPOINTS)
    if not found:
        raise UserError(f"src={run}: no checkpoint in it yet")
    if step is not None and step not in found:
        raise UserError(f"step={step}: {run} has checkpoints of steps {', '.join(map(str, found))}")
    folder = found[step if step is not None else max(found)]
    state = read_checkpoint(folder)
    exits = TensorFolder(folder, [folder / name for name in sorted(state["files"]) if name.startswith("exits_")])
    tensors = {name: exits.read(name) for name in exits.files}
    files = [name for name in state["files"] if re.fullmatch(r"backbone_\d+\.safetensors", name)]
    keys = ("base_model", "base_fingerprint", "early_exit")
    facts = {"step": state["step"], **{key: identity[key] for key in keys}}
    return Trained(run, folder, tensors, facts, files)


def export_sidecar(run: Path, out: Path, step: int | None) -> None:
    """`exits.safetensors` and `exits.json`, which names the base model and its fingerprint."""
    trained = open_trained(run, step)
    if trained.files:
        raise UserError(
            f"kind=sidecar: {run} trained its backbone too, and a sidecar holds the exits alone; use kind=early_exit"
        )
    with new_folder(out) as folder:
        save_file(trained.exits, folder / SIDECAR_WEIGHTS, metadata={"format": "pt"})
        facts = trained.facts | {"files": {SIDECAR_WEIGHTS: file_digest(folder / SIDECAR_WEIGHTS)}}
        write_json(folder / SIDECAR_CONFIG, facts)


def export_early_exit(run: Path, out: Path, step: int | None, copied: Callable[[int], None] = lambda _: None) -> None:
    """One folder: stock architecture for plain transformers, early-exit model for ee_scale or trusted code.

    Base tensors are copied byte for byte, but for those that the run trained; `copied` is told the bytes as they go.
    Raises `UserError`.
    """
    trained = open_trained(run, step)
    base = trained.base()
    with new_folder(out) as folder:
        weight_map = _copy_base(base, folder, copied)
        dtype = _dtype(weight_files(base.folder)[0])
        tensors = {name: narrowed(value, dtype, name) for name, value in trained.exits.items()}
        save_file(tensors, folder / EXITS_SHARD, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, EXITS_SHARD)
        write_index(folder, weight_map)
        own = {"early_exit": trained.facts["early_exit"], "auto_map": AUTO_MAP}
        write_config(folder, stock_config(read_object(base.folder / "config.json")) | own)
        copy_code(folder)
        write_text(folder / "README.md", _model_card(out, trained))


def export_bytes(run: Path) -> int:
    """Bytes that `export_early_exit` will copy, for a progress bar."""
    base = base_folder(run, read_run(run))
    return sum(path.stat().st_size for path in weight_files(base)) if base.is_dir() else 0


def _copy_base(base: TrainedBase, folder: Path, copied: Callable[[int], None]) -> dict[str, str]:
    """Copy weights and small files; returns tensor name -> file. A single file gets a shard's name, because
    transformers reads `model.safetensors` alone wherever it finds one. Exits that the base has stay behind.
    """
    weight_map = {}
    for path in weight_files(base.folder):
        name = "model-00001-of-00001.safetensors" if path.name == SINGLE_NAME else path.name
        with safe_open(path, framework="pt") as file:
            stored = list(file.keys())
        names = {key: base.parameter_of[key] for key in stored if not key.startswith(PREFIX)}
        if not names:
            continue
        if len(names) < len(stored) or any(map(base.is_trained, names.values())):
            tensors = {key: base.read(parameter).contiguous() for key, parameter in names.items()}
            save_file(tensors, folder / name, metadata={"format": "pt"})
            copied(path.stat().st_size)
        else:
            _copy_file(path, folder / name, copied)
        weight_map |= dict.fromkeys(names, name)
    copy_small_files(base.folder, folder)
    return weight_map


def _copy_file(path: Path, target: Path, copied: Callable[[int], None]) -> None:
    with path.open("rb") as source, target.open("wb") as file:
        while block := source.read(1 << 24):
            file.write(block)
            copied(len(block))


def _dtype(path: Path) -> torch.dtype:
    """The type most of a weight file is in."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(next(iter(file.keys()))).dtype


def _model_card(out: Path, trained: Trained) -> str:
    spec = trained.facts["early_exit"]
    layers = ", ".join(map(str, spec["layers"]))
    how = "together with the model" if trained.files else "on the frozen model"
    stock = "the model alone" if trained.files else "the base model, unchanged"
    return f"""---
library_name: transformers
tags: [early-exit, ee_scale]
---
# {out.name}

`{Path(trained.facts["base_model"]).name}` with early exits after layers {layers} (kind `{spec["kind"]}`,
head `{spec["head"]}`), trained for {trained.facts["step"]} steps {how} with ee_scale {version("ee-scale")}.

```python
from transformers import AutoModelForCausalLM

stock = AutoModelForCausalLM.from_pretrained("{out.name}")                                # {stock}
model = AutoModelForCausalLM.from_pretrained("{out.name}", trust_remote_code=True)        # with exits
model(input_ids).exit_logits                                                              # {{layer: logits}}
```
"""
