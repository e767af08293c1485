"""How many tokens a decoder at two thirds of its layers' parameters takes to come near the full one.

    python scripts/palette_curve.py --decoder SMOLLM2 --train train.txt --valid valid.txt --steps 2000 --json curve.json
    python scripts/palette_curve.py --decoder SMOLLM2 --train train.txt --valid heldout.txt --size 1200,24

One size trains alone by distillation from the full model, with low-rank factors (`--rank 0`: whole matrices) and a rate
that stays where the warm-up left it, so that a point of the curve is not the end of a shorter run. Held-out loss is
measured at steps 1, 2, 4, ... The gap to the full model is fitted by a power law of the tokens, gap = a tokens^-b, over
the later half of the points. A fit that far beyond its last point is a lower bound at best: gaps level off.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from math import exp, log
from pathlib import Path

import torch
from _palette_bench import Bench, Case, Steps
from _palette_decoder import add_decoder, decoder_settings, two_thirds
from rich.console import Console
from transformers import logging

from ee_scale.elastic.sampling import RANDOM, Draw
from ee_scale.elastic.subnet import SubnetSpec
from ee_scale.grid import Layout, join_grid
from ee_scale.training.schedules import LearningRate
from ee_scale.training.supernet import open_phases
from ee_scale.training.supernet_data import Data

Point = tuple[int, float]  # (tokens, held-out loss in nats)


def case_of(args: argparse.Namespace) -> Case:
    """One size, `args.steps` steps at a constant rate."""
    lr = args.lr or (1e-3 if args.rank else 1e-4)
    size = tuple(args.size or two_thirds(args.decoder))
    settings = [*decoder_settings(args, args.batch), f"optim.lr={lr}", "optim.min_lr=0", "optim.decay=constant"]
    settings += ["optim.warmup_fraction=0.02", "optim.weight_decay=0.01", "train.verify_frozen=false"]
    settings += [f"space.ffn=[1.0,{size[0]}]", f"space.depth=[1.0,{size[1]}]", "logging.every=1000000"]
    return Case("curve", settings, [size], Steps(0, args.steps, 0), lr, args.samples, args.rank, kept=False)


def train(bench: Bench, spec: SubnetSpec) -> Iterator[Point]:
    """Points of the curve; the first one before any training."""
    run = bench.begin(bench.plan(*bench.recipe(bench.case.rank)))
    open_phases(run, 0)
    run.start_engine()
    rate, batches = LearningRate(run.config.optim, run.plan.total_steps), Data(run.plan, bench.grid).micro_batches(0)
    tokens, due = run.config.train.global_batch_size * run.config.data.seq_length, 1
    yield 0, bench.judge(run, spec).mean
    for step in range(run.plan.total_steps):
        run.engine.set_lr(rate.at(step))
        run.engine.train_step(batches, [Draw(0, RANDOM, spec, 1.0)])
        if step + 1 in (due, run.plan.total_steps):
            due *= 2
            yield (step + 1) * tokens, bench.judge(run, spec).mean


def power_law(points: Sequence[Point], full: float) -> tuple[float, float] | None:
    """(a, b) of gap = a tokens^-b by least squares on logarithms; None where the gap does not shrink."""
    trained = [(log(tokens), log(loss - full)) for tokens, loss in points if tokens and loss > full]
    later = trained[len(trained) // 2 :]
    if len(later) < 2:
        return None
    mean_x, mean_y = (sum(column) / len(later) for column in zip(*later, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in later) / sum((x - mean_x) ** 2 for x, _ in later)
    return (exp(mean_y - slope * mean_x), -slope) if slope < 0 else None


def told(points: Sequence[Point], full: float, gap: float) -> str:
    """What the curve says of a gap, in a sentence."""
    if reached := next((tokens for tokens, loss in points if loss - full <= gap), None):
        return f"within {gap} nats of the full model after {reached:,} tokens"
    if (law := power_law(points, full)) is None:
        return f"not within {gap} nats after {points[-1][0]:,} tokens, and no power law: the gap does not shrink"
    a, b = law
    tokens = exp(min(log(a / gap) / b, 700))
    return f"gap = {a:.3g} tokens^-{b:.3g}: within {gap} nats after about {tokens:.2g} tokens, if it goes on like this"


def main(words: Sequence[str]) -> None:
    """Parse, train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_decoder(parser)
    parser.add_argument("--size", type=lambda text: [int(part) for part in text.split(",")], help="MLP units,layers")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--rank", type=int, default=32, help="of the low-rank factors; 0: whole matrices")
    parser.add_argument("--lr", type=float, help="default: 1e-3, whole matrices 1e-4")
    parser.add_argument("--samples", type=int, default=128, help="held-out sequences")
    parser.add_argument("--gap", type=float, default=0.15, help="nats")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(words)
    if not (args.decoder and args.train and args.valid):
        parser.error("give --decoder, --train and --valid")
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    out, grid = Console(width=120), join_grid(Layout(), torch.device("cpu"))
    bench = Bench(case_of(args), grid, out)
    run = bench.begin(bench.plan(*bench.recipe(args.rank)))
    full, points = bench.judge(run, bench.full).mean, []
    (spec,), (layers,) = bench.sizes, bench.layer_params
    bench.say(f"full model {full:.4f} nats; {spec.name}: {layers / bench.full_params[1]:.3f} of the layers' parameters")
    for tokens, loss in train(bench, spec):
        points.append((tokens, loss))
        bench.say(f"{tokens:>12,} tokens  {loss:.4f}  +{loss - full:.4f}")
    words_of_it = told(points, full, args.gap)
    bench.say(words_of_it)
    if args.json:
        found = {"size": spec.name, "kept": list(spec.layers), "full": full, "points": points, "told": words_of_it}
        args.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
