"""Benchmark of exit tuning: step time against the ideal and the naive loop, idle share, peak memory, kept taps.

    python scripts/bench_tune.py                       # everything, on the CPU and, if there is one, on the GPU
    python scripts/bench_tune.py --parts a,c --device cpu --json bench.json --plot bench.png

Models are random (time and memory do not depend on the weights) and live in a temporary folder; nothing is downloaded.
Each measurement runs in fresh processes of its own. On a busy machine trust the ratios: contenders take turns.
OMP_NUM_THREADS is passed on to parts a, c and d; part b gives each of its processes one thread.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from _bench_report import plot, print_checks, print_part
from _children import Job, run_child, run_children
from rich.console import Console

STAGES, MICRO_BATCHES = 4, 2
EXIT_COUNTS = (1, 2, 4, 8)

SIZES: dict[tuple[str, bool, str], dict[str, Any]] = {
    # (device, quick, what): the size
    ("cpu", False, "step"): {"layers": 12, "hidden": 512, "vocab": 8192, "sequence": 256, "micro_batch": 2},
    ("cpu", True, "step"): {"layers": 12, "hidden": 256, "vocab": 4096, "sequence": 128, "micro_batch": 2},
    ("cuda", False, "step"): {"layers": 24, "hidden": 2048, "vocab": 32768, "sequence": 1024, "micro_batch": 4},
    ("cuda", True, "step"): {"layers": 12, "hidden": 1024, "vocab": 16384, "sequence": 512, "micro_batch": 4},
    ("cpu", False, "memory"): {"layers": 8, "hidden": 256, "vocab": 32768, "sequence": 256, "micro_batch": 4},
    ("cpu", True, "memory"): {"layers": 8, "hidden": 128, "vocab": 16384, "sequence": 128, "micro_batch": 4},
    ("cuda", False, "memory"): {"layers": 8, "hidden": 1024, "vocab": 65536, "sequence": 512, "micro_batch": 4},
    ("cuda", True, "memory"): {"layers": 8, "hidden": 512, "vocab": 32768, "sequence": 512, "micro_batch": 4},
    # Depth, and vocabulary to width, of a model of 7B parameters: how much of a step is frozen layers depends on them.
    ("cpu", False, "taps"): {"layers": 32, "hidden": 384, "vocab": 3072, "sequence": 256, "micro_batch": 2},
    ("cpu", True, "taps"): {"layers": 32, "hidden": 192, "vocab": 1536, "sequence": 128, "micro_batch": 2},
    ("cuda", False, "taps"): {"layers": 32, "hidden": 2048, "vocab": 16384, "sequence": 1024, "micro_batch": 4},
    ("cuda", True, "taps"): {"layers": 32, "hidden": 1024, "vocab": 8192, "sequence": 512, "micro_batch": 4},
}
TINY = {"layers": STAGES, "hidden": 64, "vocab": 256, "sequence": 32, "micro_batch": 1}


def make_job(folder: Path, device: str, size: dict[str, Any], exits: tuple[int, ...], **more: Any) -> Job:
    """A job whose model lies in a folder named by its size, written if it is not there yet."""
    name = "-".join([device, *(f"{key}{value}" for key, value in size.items())])
    job = Job(folder=str(folder / name), device=device, exits=exits, micro_batches=MICRO_BATCHES, **size, **more)
    if not Path(job.folder).exists():
        run_child("_bench:save_model", job, **environment(device))
    return job


def environment(device: str, **more: str) -> dict[str, str]:
    """Variables of a child: DeepSpeed reads its device when it is imported."""
    quiet = {"PYTHONWARNINGS": "ignore", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}
    return {"DS_ACCELERATOR": device, **quiet, **more}


Found = Iterator[dict[str, Any]]


def part_a(folder: Path, device: str, quick: bool, heads: list[str]) -> Found:
    """Step time of ours, the ideal and the naive loop; exits at a quarter, a half and three quarters."""
    rows, checks = [], []
    for head in heads:
        size = SIZES[device, quick, "step"]
        exits = tuple(size["layers"] * i // 4 for i in (1, 2, 3))
        job = make_job(folder, device, size, exits, head=head, rounds=5 if quick else 11)
        row = run_child("_bench_parts:measure_steps", job, **environment(device))
        rows.append(row)
        for name, text, wanted in (("over_ideal", "ideal", 1.15), ("over_naive", "naive loop", 1.0)):
            what = f"step time / {text}, head {head} (fastest rounds: {row[name + '_fastest']:.3f})"
            checks.append(check(what, row[name], wanted))
        yield {"rows": rows, "checks": checks, "size": {**size, "exits": exits}}


def part_b(folder: Path, device: str, quick: bool, heads: list[str]) -> Found:
    """Idle share of each of 4 stages, flushed and run-ahead; nothing where the CPU's answer stands for this device."""
    real = (torch.cuda.device_count() if device == "cuda" else len(os.sched_getaffinity(0))) >= STAGES
    if device == "cuda" and not real:
        return
    size = SIZES[device, quick, "step"] if real else TINY
    exits = tuple(size["layers"] * i // STAGES for i in range(1, STAGES + 1))
    wait = 0.0 if real else 0.04
    job = make_job(folder, device, size, exits, stages=STAGES, wait=wait)
    batches, warm_up = (10, 3) if quick else (23, 3)
    rendezvous = str(folder / f"rendezvous-{device}")
    rows = run_children(
        "_bench_parts:measure_idle",
        [(job, rank, rendezvous, batches, warm_up) for rank in range(STAGES)],
        **environment(device, OMP_NUM_THREADS="1"),
    )
    checks = [
        check(f"idle share of stage {row['stage']}, run-ahead", row["run_ahead"]["idle"], 0.10, percent=True)
        for row in rows
    ]
    formula = (STAGES - 1) / (MICRO_BATCHES + STAGES - 1)
    yield {"rows": rows, "checks": checks, "formula": formula, "wait": wait, "size": size}


def part_c(folder: Path, device: str, quick: bool, heads: list[str]) -> Found:
    """Peak memory for 1, 2, 4 and 8 exits, and of the naive loop with 8; the deepest exit is always the same."""
    size = SIZES[device, quick, "memory"]
    # Every block of 64 KiB and more goes back to the system when it is freed: resident memory is what is in use.
    variables = environment(device, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    rows = []
    for count, naive in [*((count, False) for count in EXIT_COUNTS), (EXIT_COUNTS[-1], True)]:
        exits = tuple(size["layers"] * i // count for i in range(1, count + 1))
        job = make_job(folder, device, size, exits, chunk_tokens=size["sequence"])
        row = run_child("_bench_parts:measure_memory", job, naive, **variables)
        rows.append({**row, "naive": naive, "rest": row["peak"] - row["state"]})
    first, last = rows[0], rows[len(EXIT_COUNTS) - 1]
    growth = (last["rest"] - first["rest"]) / (last["state"] - first["state"])
    # 5%: room for what the exits read (see the note of the table), not for logits.
    text = f"memory, {first['exits']} to {last['exits']} exits: growth of the rest / growth of the heads' state"
    yield {"rows": rows, "checks": [check(text, growth, 0.05, percent=True)], "size": size}


def part_d(folder: Path, device: str, quick: bool, heads: list[str]) -> Found:
    """Time of an epoch that computes, that keeps and that reads what exits read; exits as in part a."""
    size, rows, checks = SIZES[device, quick, "taps"], [], []
    exits = tuple(size["layers"] * i // 4 for i in (1, 2, 3))
    for head in heads:
        job = make_job(folder, device, size, exits, head=head, rounds=3 if quick else 5)
        row = run_child("_bench_parts:measure_taps", job, str(folder / f"taps-{head}"), **environment(device))
        rows.append(row)
        checks.append(check(f"second epoch / first, head {head}", row["seconds"]["read"] / row["seconds"]["kept"], 0.5))
        yield {"rows": rows, "checks": checks, "size": size}


def check(what: str, got: float, wanted: float, percent: bool = False) -> dict[str, Any]:
    """A wanted upper bound and what was measured."""
    return {"what": what, "wanted": wanted, "got": got, "ok": got <= wanted, "percent": percent}


HEADS = ("low_rank", "full")
# Each yields what it has found whenever there is more of it.
PARTS: dict[str, Callable[[Path, str, bool, list[str]], Found]] = {
    "a": part_a,
    "b": part_b,
    "c": part_c,
    "d": part_d,
}


def machine() -> dict[str, Any]:
    """What the numbers belong to."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = {name: version(name) for name in ("torch", "deepspeed", "megatron-core", "transformers")}
    return {"cores": os.cpu_count(), "gpus": gpus, "python": platform.python_version(), **versions}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="a,b,c,d", help="a: step time, b: idle share, c: peak memory, d: kept taps")
    choices = ("auto", "cpu", "cuda")
    parser.add_argument("--device", choices=choices, default="auto", help="auto: the CPU, then the GPU if there is one")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS), help="of parts a and d")
    parser.add_argument("--quick", action="store_true", help="small models and few rounds: does it run at all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers, as they come")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture (PNG or SVG)")
    arguments = parser.parse_args()
    arguments.parts = [part.strip() for part in arguments.parts.split(",")]
    for part in arguments.parts:
        if part not in PARTS:
            parser.error(f"--parts: {part!r} is not one of {', '.join(PARTS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    return arguments


def measure(
    part: str, folder: Path, device: str, arguments: argparse.Namespace, console: Console, before: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """One part, told head by head; all numbers are written whenever there are more of them."""
    start, result = time.perf_counter(), None
    with console.status(f"part {part} on {device}"):
        for found in PARTS[part](folder, device, arguments.quick, arguments.heads):
            result = {"part": part, "device": device, "took": time.perf_counter() - start, **found}
            if "head" in (row := found["rows"][-1]):
                times = ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in row["seconds"].items())
                console.print(f"part {part} on {device}, head {row['head']}: {times}", highlight=False)
            if arguments.json:
                text = json.dumps({"machine": machine(), "results": [*before, result]}, indent=2)
                arguments.json.write_text(text + "\n")
    return result


def main() -> None:
    arguments = parse_arguments()
    console = Console()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if arguments.device != "auto":
        devices = [arguments.device]
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for device in devices:
            for part in arguments.parts:
                found = measure(part, Path(folder), device, arguments, console, results)
                if found is None:
                    console.print(f"part {part} on {device}: fewer than {STAGES} GPUs, see the CPU's table\n")
                    continue
                results.append(found)
                print_part(console, found)
    print_checks(console, results)
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
