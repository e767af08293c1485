"""The decoder of the palette benchmarks: its sizes follow from the shape of the model."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.config.supernet import SpaceConfig
from ee_scale.elastic.architecture import ElasticMap
from ee_scale.elastic.subnet import MULTIPLE, SubnetSpec, resolve_space

SPACE = SpaceConfig(ffn=[1.0, 0.83], depth=[1.0, 0.9, 0.83, 0.75, 0.67])  # as space=decoder
SIZES = ((0, 1), (0, 2), (1, 1), (1, 2), (0, 4), (1, 3))  # of its choices: 90% to two thirds of the layers' parameters
FEWEST = 12


def add_decoder(parser: ArgumentParser) -> None:
    """Arguments of both benchmarks."""
    parser.add_argument("--decoder", help="Llama folder; bf16 where its weights are")
    parser.add_argument("--train", help="text to train the decoder's sizes on")
    parser.add_argument("--valid", help="text to judge them on")
    parser.add_argument("--decoder-length", type=int, default=128, help="tokens of a decoder's sequence")


def decoder_sizes(folder: str) -> list[tuple[int, int]]:
    """Six (MLP units, layers). Raises `SystemExit` for a model with too few layers."""
    shape = ElasticMap(ModelFolder(Path(folder)).config, "causal_lm").shape
    space = resolve_space(SPACE, shape, range(shape.num_layers), 1)
    if shape.num_layers < FEWEST:
        raise SystemExit(f"--decoder {folder}: {shape.num_layers} layers; six sizes take {FEWEST}")
    return [(space.ffn[ffn], space.depth[depth]) for ffn, depth in SIZES]


def two_thirds(folder: str) -> tuple[int, int]:
    """(MLP units, layers): four fifths of the layers, MLP units until two thirds of their parameters are left.

    Both axes together lose less than one alone (`docs/palette.md`).
    """
    found = ElasticMap(ModelFolder(Path(folder)).config, "causal_lm")
    full, depth = found.shape.full, round(found.shape.num_layers * 0.8)
    wanted = found.parameters(full, layers_only=True) * 2 / 3

    def parameters(ffn: int) -> int:
        spec = SubnetSpec(full.hidden, full.groups, ffn, tuple(range(depth)))
        return found.parameters(spec, layers_only=True)

    return min(range(MULTIPLE, full.ffn + 1, MULTIPLE), key=lambda ffn: abs(parameters(ffn) - wanted)), depth


def decoder_settings(args: Namespace, batch: int = 4) -> Sequence[str]:
    """Model, text, space and precision."""
    stored = ModelFolder(Path(args.decoder)).config.dtype
    return [
        f"model={args.decoder}",
        f"data={args.train}",
        f"data.valid={args.valid}",
        f"data.seq_length={args.decoder_length}",
        f"train.precision={'bf16' if stored == torch.bfloat16 else 'fp32'}",
        f"train.micro_batch_size={batch}",
        f"train.global_batch_size={batch}",
        "space=decoder",
    ]
