"""Train a supernet, cut two sizes out of it: python cut_palette.py <model folder> <text> <held-out text> <out>."""

import sys

import ee_scale
from ee_scale.config.groups import BatchConfig, ModelConfig
from ee_scale.config.supernet import (
    ImportanceConfig,
    PaletteConfig,
    PhaseConfig,
    SpaceConfig,
    SupernetConfig,
    SupernetDataConfig,
)


def main(
    model: str = "tiny", text: str = "python", held_out: str = "python:valid", out: str = "runs/example_palette"
) -> None:
    config = SupernetConfig(
        model=ModelConfig(model),
        data=SupernetDataConfig(text, valid=held_out, seq_length=32),
        space=SpaceConfig(hidden=[1.0], ffn=[1.0, 0.5], depth=[1.0, 0.5]),
        stages=[
            PhaseConfig("width", ["ffn"], steps=5, lr=1e-3, rank=4),  # to look at: hundreds make a palette of use
            PhaseConfig("width_depth", ["ffn", "depth"], steps=5, lr=1e-3, rank=4),
        ],
        importance=ImportanceConfig(samples=16),
        train=BatchConfig(micro_batch_size=2, global_batch_size=4),
        out=f"{out}/run",
    )
    run = ee_scale.supernet(config)
    sizes = PaletteConfig(str(run.folder), f"{out}/palette", count=2, samples=16, tokens=32, new_tokens=4, seconds=0.2)
    for member in ee_scale.palette(sizes).members:  # plain folders, which stock transformers opens
        print(f"{member.folder}: {member.params:,} parameters, prompt {member.prefill_ms:.1f} ms, {member.quality}")


if __name__ == "__main__":
    main(*sys.argv[1:])
