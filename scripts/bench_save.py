"""Benchmark of saving: how long a checkpoint holds the training loop back, foreground against background.

    python scripts/bench_save.py
    python scripts/bench_save.py --device cuda --saves 5 --folder /scratch --json bench_save.json

One process trains full heads of a random model, and saves to `--folder` (whose disk is what is measured). Saves of both
kinds take turns, with plain steps in between, so that what else the machine does hits both alike.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from _children import Job, run_child
from rich.console import Console
from rich.table import Table

SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"layers": 6, "hidden": 1024, "vocab": 8192, "sequence": 256, "micro_batch": 1},
    "cuda": {"layers": 12, "hidden": 2048, "vocab": 16384, "sequence": 1024, "micro_batch": 4},
}
KINDS = ("foreground", "background")


def measure(job: Job, folder: Path, saves: int, steps: int) -> dict[str, Any]:
    """Seconds of a plain step, of a call to save, and of a save with all that it slows down afterwards, by kind."""
    import torch  # DeepSpeed, which comes with the rest, picks its device at the first import
    from _bench import build_engine, make_batch, seconds

    from ee_scale.artifact.writer import CheckpointWriter
    from ee_scale.grid import Layout, join_grid, pick_device
    from ee_scale.training.tune import TuneRun

    device = pick_device(job.device)
    grid = join_grid(Layout(), device)
    engine, batch = build_engine(job, grid), make_batch(job, device)
    config = SimpleNamespace(train=SimpleNamespace(global_batch_size=job.micro_batch * job.micro_batches))
    shape, backbone = SimpleNamespace(vocab_size=job.vocab), SimpleNamespace(trains=False)
    plan = SimpleNamespace(config=config, shape=shape, backbone=backbone)
    run = TuneRun(plan, grid, engine.stage, engine)
    writers = {kind: CheckpointWriter(folder / kind, grid, 1, background=kind == "background") for kind in KINDS}

    def train() -> None:
        engine.train_step(iter(batch))
        run.step += 1

    for writer in writers.values():
        train()
        writer.save(run, {})
        writer.finish()
    plain, rows = [], []
    for _ in range(saves):
        for kind, writer in writers.items():
            plain += [seconds(train, device) for _ in range(steps)]
            held = seconds(lambda writer=writer: writer.save(run, {}), device)
            start, during = time.perf_counter(), 0
            while writer.busy:
                seconds(train, device)
                during += 1
            rows.append({"kind": kind, "held": held, "steps": during, "took": time.perf_counter() - start})
            writer.finish()
    mean = statistics.mean(plain)
    megabytes = sum(path.stat().st_size for path in (folder / KINDS[0]).rglob("*.safetensors")) / 1e6
    found: dict[str, Any] = {"step": mean, "megabytes": megabytes, "threads": torch.get_num_threads(), "kinds": {}}
    for kind in KINDS:
        mine = [row for row in rows if row["kind"] == kind]
        found["kinds"][kind] = {
            "held": statistics.median(row["held"] for row in mine),
            "total": statistics.median(row["held"] + row["took"] - row["steps"] * mean for row in mine),
            "steps": statistics.median(row["steps"] for row in mine),
        }
    return found


def table(found: dict[str, Any], device: str) -> Table:
    """One line per kind of save."""
    title = f"{device}: {found['megabytes']:.0f} MB of trained state, step {found['step']:.2f} s"
    lines = Table(title=title, title_justify="left")
    for column in ("save", "loop stands still", "in steps", "with what it slows down", "in steps", "steps meanwhile"):
        lines.add_column(column, justify="left" if column == "save" else "right")
    for kind, row in found["kinds"].items():
        values = (value for key in ("held", "total") for value in (row[key], row[key] / found["step"]))
        cells = [f"{value:.2f}{unit}" for value, unit in zip(values, (" s", "", " s", ""), strict=True)]
        lines.add_row(kind, *cells, f"{row['steps']:.0f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--saves", type=int, default=4, help="saves of each kind; the median counts")
    parser.add_argument("--steps", type=int, default=3, help="plain steps before each save; their mean counts")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    arguments = parser.parse_args()
    size = SIZES[arguments.device]
    quiet = {"DS_ACCELERATOR": arguments.device, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        exits = tuple(size["layers"] * i // 3 for i in (1, 2, 3))
        job = Job(folder=f"{name}/model", device=arguments.device, exits=exits, head="full", **size)
        run_child("_bench:save_model", job, **quiet)
        found = run_child("bench_save:measure", job, Path(name), arguments.saves, arguments.steps, **quiet)
    Console().print(table(found, arguments.device))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
