"""Exports of a run: the exits alone (sidecar), or one Hugging Face folder with base model and exits."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ee_scale.artifact.checkpoint import checkpoints, read_checkpoint
from ee_scale.artifact.hf_folder import write_beside, write_index, write_sidecar
from ee_scale.artifact.run_folder import CHECKPOINTS, read_run
from ee_scale.artifact.trained_base import TrainedBase
from ee_scale.backbone.loading import SINGLE_NAME, TensorFolder, weight_bytes, weight_files
from ee_scale.backbone.model_folder import CHANGED, GONE, SIDECAR_WEIGHTS, base_path, find_base
from ee_scale.backbone.model_path import plain_folder
from ee_scale.backbone.narrowing import narrowed
from ee_scale.errors import UserError
from ee_scale.files import new_folder, write_text
from ee_scale.log import log
from ee_scale.modeling.heads import ExitSpec
from ee_scale.modeling.modeling_early_exit import PREFIX, auto_map, copy_code
from ee_scale.modeling.wrapped import is_wrapped
from ee_scale.training.recipe import BEST

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
        base = find_base(self.run, self.facts, f"src={self.run}", gone=f"{GONE} any more", other=CHANGED)
        return TrainedBase(base, self.checkpoint, self.files)


def open_trained(run: Path, step: int | None) -> Trained:
    """What a checkpoint of a run holds. Raises `UserError` if there is none or it is damaged."""
    identity = read_run(run)
    found = checkpoints(run / CHECKPOINTS)
    if not found:
        raise UserError(f"src={run}: no checkpoint in it yet")
    if step is not None and step not in found:
        raise UserError(f"step={step}: {run} has checkpoints of steps {', '.join(map(str, found))}")
    last = found[max(found)]
    if step is None and (best := read_checkpoint(last).get(BEST, {}).get("step")) in found:
        step = best
        log.info("step %d: the lowest loss on held-out text", step)
    folder = last if step is None else found[step]
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
        write_sidecar(folder, trained.facts)


def export_early_exit(run: Path, out: Path, step: int | None, copied: Callable[[int], None] = lambda _: None) -> None:
    """One folder: stock architecture for plain transformers, early-exit model for ee_scale or trusted code.

    Base tensors are copied byte for byte, but for those that the run trained; `copied` is told the bytes as they go.
    Raises `UserError`.
    """
    trained = open_trained(run, step)
    base, spec = trained.base(), ExitSpec.from_dict(trained.facts["early_exit"])
    with new_folder(out) as folder:
        weight_map = _copy_base(base, folder, copied)
        dtype = base.read(next(iter(base.files))).dtype  # most of the weights are of this type
        tensors = {name: narrowed(value, dtype, name) for name, value in trained.exits.items()}
        save_file(tensors, folder / EXITS_SHARD, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, EXITS_SHARD)
        write_index(folder, weight_map)
        own = {"early_exit": trained.facts["early_exit"], "auto_map": auto_map(spec)}
        write_beside(folder, base.folder, **own)
        copy_code(spec, folder)
        opener = "AutoModelForImageTextToText" if is_wrapped(base.config) else "AutoModelForCausalLM"
        write_text(folder / "README.md", _model_card(out, trained, opener))


def export_bytes(run: Path) -> int:
    """Bytes that `export_early_exit` will copy, for a progress bar."""
    base = base_path(run, read_run(run))
    return weight_bytes(plain_folder(base)) if base.exists() else 0


def _copy_base(base: TrainedBase, folder: Path, copied: Callable[[int], None]) -> dict[str, str]:
    """Copy weights; returns tensor name -> file. A single file gets a shard's name, because
    transformers reads `model.safetensors` alone wherever it finds one. Exits that the base has stay behind.
    """
    weight_map: dict[str, str] = {}
    for path in weight_files(base.folder):
        name = "model-00001-of-00001.safetensors" if path.name == SINGLE_NAME else path.name
        stored = [key for key, file in base.files.items() if file == path]
        names = {key: base.parameter_of[key] for key in stored if not key.startswith(PREFIX)}
        if not names:
            continue
        if len(names) < len(stored) or any(map(base.is_trained, names.values())):
            read = {key: parameter if base.is_trained(parameter) else key for key, parameter in names.items()}
            tensors = {key: base.read(name).contiguous() for key, name in read.items()}
            save_file(tensors, folder / name, metadata={"format": "pt"})
            copied(path.stat().st_size)
        else:
            _copy_file(path, folder / name, copied)
        weight_map |= dict.fromkeys(names, name)
    return weight_map


def _copy_file(path: Path, target: Path, copied: Callable[[int], None]) -> None:
    with path.open("rb") as source, target.open("wb") as file:
        while block := source.read(1 << 24):
            file.write(block)
            copied(len(block))


def _model_card(out: Path, trained: Trained, opener: str) -> str:
    imported = ", ".join(sorted({opener, "AutoModelForCausalLM"}))
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
from transformers import {imported}

stock = {opener}.from_pretrained("{out.name}")                                # {stock}
model = AutoModelForCausalLM.from_pretrained("{out.name}", trust_remote_code=True)        # with exits
model(input_ids).exit_logits                                                              # {{layer: logits}}
```
"""
