"""The loss curves of a run as a picture: every exit's loss by tokens, and its mean over the last `--mean` steps.

python scripts/plot_loss.py runs/a loss.png
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of a tune run")
    parser.add_argument("out", type=Path, help="picture that is written (.png, .svg)")
    parser.add_argument("--mean", type=int, default=25, help="steps")
    args = parser.parse_args()
    metrics = args.run / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise SystemExit(f"{metrics}: {error}") from error
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in rows[0]["loss"]:
        losses = np.array([row["loss"][name] for row in rows], dtype=float)
        tokens = np.array([row["tokens"] for row in rows]) / 1e6
        (line,) = axes.plot(tokens, losses, linewidth=0.5, alpha=0.35)
        if len(losses) >= args.mean:
            mean = np.convolve(losses, np.full(args.mean, 1 / args.mean), "valid")
            axes.plot(tokens[args.mean - 1 :], mean, color=line.get_color(), label=f"exit after layer {name}")
    axes.set(xlabel="million tokens", ylabel="loss, nats", ylim=(None, np.percentile(losses, 99.5)))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.out, dpi=100)


if __name__ == "__main__":
    main()
