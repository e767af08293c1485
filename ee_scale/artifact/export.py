"""Exports of a run: the exits alone (sidecar), or one Hugging Face folder with base model and exits."""

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ee_scale.artifact.checkpoint import checkpoints, read_checkpoint
from ee_scale.artifact.files import file_digest, new_folder, write_json
from ee_scale.artifact.hf_folder import copy_small_files, write_index
from ee_scale.artifact.run_folder import CHECKPOINTS, read_run
from ee_scale.artifact.sidecar import SIDECAR_CONFIG, SIDECAR_WEIGHTS
from ee_scale.backbone.loading import SINGLE_NAME, fingerprint, weight_files
from ee_scale.errors import UserError
from ee_scale.exits import modeling_early_exit
from ee_scale.exits.modeling_early_exit import AUTO_MAP, CODE_FILES
from ee_scale.files import write_text

EXITS_SHARD = "model-exit-heads.safetensors"


def trained_exits(run: Path, step: int | None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(fp32 exit tensors, facts) of a checkpoint of a run. Raises `UserError` if there is none or it is damaged."""
    identity = read_run(run)
    found = checkpoints(run / CHECKPOINTS)
    if not found:
        raise UserError(f"src={run}: no checkpoint in it yet")
    if step is not None and step not in found:
        raise UserError(f"step={step}: {run} has checkpoints of steps {', '.join(map(str, found))}")
    folder = found[step if step is not None else max(found)]
    state, tensors = read_checkpoint(folder), {}
    for name in sorted(state["files"]):
        if name.startswith("exits_"):
            with safe_open(folder / name, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    keys = ("base_model", "base_fingerprint", "early_exit")
    return tensors, {"step": state["step"], **{key: identity[key] for key in keys}}


def export_sidecar(run: Path, out: Path, step: int | None) -> None:
    """`exits.safetensors` and `exits.json`, which names the base model and its fingerprint."""
    tensors, facts = trained_exits(run, step)
    with new_folder(out) as folder:
        save_file(tensors, folder / SIDECAR_WEIGHTS, metadata={"format": "pt"})
        facts["files"] = {SIDECAR_WEIGHTS: file_digest(folder / SIDECAR_WEIGHTS)}
        write_json(folder / SIDECAR_CONFIG, facts)


def export_early_exit(run: Path, out: Path, step: int | None, copied: Callable[[int], None] = lambda _: None) -> None:
    """One folder: stock architecture for plain transformers, early-exit model for ee_scale or trusted code.

    Base tensors are copied byte for byte; `copied` is told the bytes as they go. Raises `UserError`.
    """
    tensors, facts = trained_exits(run, step)
    base = Path(facts["base_model"])
    if not base.is_dir():
        raise UserError(f"src={run}: its base model {base} is not there any more")
    if fingerprint(base) != facts["base_fingerprint"]:
        raise UserError(f"src={run}: {base} changed since the exits were trained")
    with new_folder(out) as folder:
        weight_map = _copy_base(base, folder, copied)
        dtype = _dtype(base / weight_files(base)[0].name)
        tensors = {name: value.to(dtype) for name, value in tensors.items()}
        save_file(tensors, folder / EXITS_SHARD, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, EXITS_SHARD)
        write_index(folder, weight_map)
        _write_config(base, folder, facts["early_exit"])
        for name in CODE_FILES:
            shutil.copyfile(Path(modeling_early_exit.__file__).with_name(name), folder / name)
        write_text(folder / "README.md", _model_card(base, out, facts))


def export_bytes(run: Path) -> int:
    """Bytes that `export_early_exit` will copy, for a progress bar."""
    base = Path(read_run(run)["base_model"])
    return sum(path.stat().st_size for path in weight_files(base)) if base.is_dir() else 0


def _copy_base(base: Path, folder: Path, copied: Callable[[int], None]) -> dict[str, str]:
    """Copy weights and small files; returns tensor name -> file. A single file gets a shard's name, because
    transformers reads `model.safetensors` alone wherever it finds one.
    """
    weight_map = {}
    for path in weight_files(base):
        name = "model-00001-of-00001.safetensors" if path.name == SINGLE_NAME else path.name
        with path.open("rb") as source, (folder / name).open("wb") as target:
            while block := source.read(1 << 24):
                target.write(block)
                copied(len(block))
        with safe_open(folder / name, framework="pt") as file:
            weight_map |= dict.fromkeys(file.keys(), name)
    copy_small_files(base, folder)
    return weight_map


def _write_config(base: Path, folder: Path, early_exit: dict[str, Any]) -> None:
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["early_exit"] = early_exit
    config["auto_map"] = {**config.get("auto_map", {}), **AUTO_MAP}
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def _dtype(path: Path) -> torch.dtype:
    """The type most of a weight file is in."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(next(iter(file.keys()))).dtype


def _model_card(base: Path, out: Path, facts: dict[str, Any]) -> str:
    spec = facts["early_exit"]
    layers = ", ".join(map(str, spec["layers"]))
    return f"""---
library_name: transformers
tags: [early-exit, ee_scale]
---
# {out.name}

`{base.name}` with early exits after layers {layers} (kind `{spec["kind"]}`, head `{spec["head"]}`), trained for
{facts["step"]} steps on the frozen model with ee_scale {version("ee-scale")}.

```python
from transformers import AutoModelForCausalLM

stock = AutoModelForCausalLM.from_pretrained("{out.name}")                                # the base model, unchanged
model = AutoModelForCausalLM.from_pretrained("{out.name}", trust_remote_code=True)        # with exits
model(input_ids).exit_logits                                                              # {{layer: logits}}
```
"""
