"""How long a palette's sizes take on this machine, as stock models in torch and in onnxruntime."""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from _palette_report import Latency

from ee_scale.artifact.onnx import FILE, OnnxModel, export_onnx, in_turns
from ee_scale.elastic.architecture import ElasticMap
from ee_scale.elastic.extract import subnet_config
from ee_scale.elastic.subnet import SubnetSpec
from ee_scale.families.build import AUTO_CLASS

ROUNDS = 31
ONNX = {"onnx fp32": False, "onnx int8": True}


@torch.no_grad()
def measure_latency(elastic_map: ElasticMap, specs: Sequence[SubnetSpec], tokens: int) -> Latency:
    """One forward of `tokens` tokens, batch 1, fp32, with torch's threads; random weights cost what others cost."""
    task, times = elastic_map.family.task, {}
    ids = torch.randint(elastic_map.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    with TemporaryDirectory() as temporary:
        folders = [Path(temporary) / str(i) for i in range(1 + len(specs))]
        calls: list[Callable[[], Any]] = []
        for folder, spec in zip(folders, (elastic_map.shape.full, *specs), strict=True):
            config = subnet_config(elastic_map, spec, tied=getattr(elastic_map.config, "tie_word_embeddings", False))
            model = AUTO_CLASS[task].from_config(config, dtype=torch.float32).eval()
            model.save_pretrained(folder)
            calls.append(lambda model=model: model(ids))
        times["torch"] = in_turns(*calls, rounds=ROUNDS)
        del model, calls
        for runtime, int8 in ONNX.items():
            found = [folder.with_name(f"{folder.name} {runtime}") for folder in folders]
            for folder, out in zip(folders, found, strict=True):
                export_onnx(folder, out, task, int8=int8)
            models = [OnnxModel(out / FILE) for out in found]
            times[runtime] = in_turns(*(lambda model=model: model(ids.numpy()) for model in models), rounds=ROUNDS)
    return Latency(tokens, {name: ms[0] for name, ms in times.items()}, {name: ms[1:] for name, ms in times.items()})
