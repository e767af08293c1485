"""Tune exits on a model, export both, decode: python tune_exits.py <model folder> <text file> <output folder>."""

import sys

import ee_scale
from ee_scale.config.groups import DataConfig, ModelConfig, OptimConfig
from ee_scale.config.schema import ExportConfig, GenerateConfig
from ee_scale.config.tune import ExitsConfig, TrainConfig, TuneConfig


def main(model: str = "tiny", text: str = "python", out: str = "runs/example") -> None:
    config = TuneConfig(
        model=ModelConfig(model),
        data=DataConfig(text, seq_length=32),
        exits=ExitsConfig(layers=[0.25, 0.75], kind="mlp", rank=8),
        optim=OptimConfig(lr=1e-3),
        train=TrainConfig(steps=20, global_batch_size=8),  # to look at: a model of use takes thousands
        out=f"{out}/run",
    )
    run = ee_scale.tune(config)  # the same call goes on with a run that was stopped
    for layer, loss in run.losses.items():
        print(f"exit {layer}: loss {loss:.3f} after {run.step} steps")

    folder = ee_scale.export(ExportConfig(src=str(run.folder), out=f"{out}/model")).folder
    request = GenerateConfig(model=str(folder), prompt="def main(", policy="lossless", max_new_tokens=16)
    (answer,) = ee_scale.generate(request)
    early = sum(layer < max(answer.layers) for layer in answer.layers)
    print(f"{answer.tokens} tokens, {early} of them drafted by an exit: {answer.text!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
