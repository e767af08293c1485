"""The same model as other people store it: names, matrices and number types that differ from what we write."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def rewritten(
    source: Path, folder: Path, change: Callable[[Tensors], Tensors] = lambda tensors: tensors, **config: Any
) -> Path:
    """A copy of a model folder of one weight file with other tensors and other values in config.json."""
    shutil.copytree(source, folder)
    weights = folder / "model.safetensors"
    tensors = {name: tensor.clone().contiguous() for name, tensor in change(load_file(weights)).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def without(*names: str) -> Callable[[Tensors], Tensors]:
    """Some tensors left out."""
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def bare(tensors: Tensors) -> Tensors:
    """As a base model is saved: without the prefix."""
    return {name.removeprefix("model.").removeprefix("bert."): tensor for name, tensor in tensors.items()}


def packed(tensors: Tensors) -> Tensors:
    """All experts of a layer in one tensor, as transformers has them in memory."""
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    firsts = sorted({name.partition(".experts.")[0] for name in tensors if ".experts." in name})
    for place in firsts:
        mlp = place.replace("block_sparse_moe", "mlp")
        count = len(
            {name.split(".experts.")[1].split(".")[0] for name in tensors if name.startswith(f"{place}.experts.")}
        )
        names = ("gate_proj", "up_proj", "down_proj") if mlp == place else ("w1", "w3", "w2")
        gate, up, down = (
            torch.stack([tensors[f"{place}.experts.{i}.{name}.weight"] for i in range(count)]) for name in names
        )
        found |= {f"{mlp}.experts.gate_up_proj": torch.cat([gate, up], 1), f"{mlp}.experts.down_proj": down}
    return found


def as_int8(tensors: Tensors) -> Tensors:
    """bitsandbytes' 8 bits: rows of int8 and their scales."""
    scale = tensors[UP].abs().amax(1)
    rows = (tensors[UP] / scale[:, None] * 127).round().to(torch.int8)
    return tensors | {UP: rows, UP.replace("weight", "SCB"): scale}


def as_fp8(tensors: Tensors) -> Tensors:
    """A weight in fp8 with a scale for each channel, as compressed-tensors stores it."""
    scale = tensors[UP].abs().amax(1, keepdim=True) / 448
    return tensors | {UP: (tensors[UP] / scale).to(torch.float8_e4m3fn), f"{UP}_scale": scale}


def as_4bit(tensors: Tensors) -> Tensors:
    """A weight as GPTQ and AWQ pack it."""
    rows, columns = tensors[UP].shape
    packed = {"qweight": torch.zeros(rows // 8, columns, dtype=torch.int32), "scales": torch.ones(1, columns)}
    return without(UP)(tensors) | {UP.replace("weight", leaf): tensor for leaf, tensor in packed.items()}


def scaled(tensors: Tensors) -> Tensors:
    """A plain weight beside a scale that is meant for it."""
    return tensors | {f"{UP}_scale_inv": torch.full((1, 1), 0.5)}
