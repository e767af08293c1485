"""Benchmark of the converters: peak memory and throughput, against a plain copy of the same files in the same run.

    python scripts/bench_convert.py --gigabytes 2 --folder /scratch

A random Llama of the given size in bf16 is written once. Copy and conversion alternate, each in a fresh process whose
start and imports are not counted, though what a first conversion loads later is; the best of each counts. Both read
files that lie in the page cache and sync what they wrote. The copy is shutil's, inside the kernel, one file after
another; a conversion also looks for infinities and takes the SHA-256 of every byte, which `sha256` alone bounds for a
single file. CPU s are per GB.
`peak` is the largest resident memory of the process, `over idle` what it has beyond everything imported and nothing
converted.
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _children import run_child
from rich.console import Console
from rich.table import Table

GRIDS = ((1, 1), (4, 2))
LAYER = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 4}
WORDS = 32000


def write_source(folder: str, gigabytes: float) -> None:
    """A random Llama of about this size, in shards of a quarter of it."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    per_layer = 2 * (2048 * 2048 * 2 + 2048 * 512 * 2 + 3 * 2048 * 5632)
    layers = max(4, round((gigabytes * 1e9 - 4 * WORDS * 2048) / per_layer) // 4 * 4)
    config = LlamaConfig(**LAYER, vocab_size=WORDS, num_hidden_layers=layers, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=f"{int(gigabytes * 250)}MB")


def convert(source: str, out: str, to: str, tp: int, pp: int, workers: int) -> dict[str, float]:
    """One conversion in this process: seconds, bytes, peak and idle memory in MB."""
    from ee_scale.config.convert import ConvertConfig
    from ee_scale.conversion.execute import run
    from ee_scale.conversion.plan import make_conversion

    torch.set_num_threads(1)
    idle = memory()
    started, busy = time.perf_counter(), cpu()
    conversion = make_conversion(ConvertConfig(src=Path(source), out=Path(out), to=to, tp=tp, pp=pp))
    run(conversion, workers, lambda size: None)
    spent = {"seconds": time.perf_counter() - started, "cpu": cpu() - busy}
    return {**spent, "bytes": conversion.nbytes, "peak": memory(), "idle": idle}


def copy(source: str, out: str) -> dict[str, float]:
    """All files of a folder, copied and synced, one after another."""
    started, busy, moved = time.perf_counter(), cpu(), 0
    for path in sorted(Path(source).rglob("*")):
        if path.is_file():
            target = Path(out) / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            moved += path.stat().st_size
            with target.open("rb+") as file:
                os.fsync(file.fileno())
    return {"seconds": time.perf_counter() - started, "cpu": cpu() - busy, "bytes": moved}


def hash_speed() -> float:
    """MB/s of SHA-256 alone, the best of some."""
    data, best = bytes(64 << 20), 0.0
    for _ in range(5):
        started = time.perf_counter()
        hashlib.sha256(data)
        best = max(best, len(data) / (time.perf_counter() - started) / 1e6)
    return best


def cpu() -> float:
    """Seconds of this process on any core so far, in user code and in the kernel."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def memory() -> float:
    """Largest resident memory so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(root: Path, rounds: int, workers: int) -> list[dict[str, Any]]:
    """Every conversion `rounds` times, each behind a copy of what it reads; the best of both."""
    source, rows = root / "hf", []
    for tp, pp in GRIDS:
        for to in ("megatron_core", "megatron_legacy"):
            there, back = root / f"{to}-{tp}-{pp}", root / f"{to}-{tp}-{pp}-hf"
            for name, src, out, target in ((f"hf -> {to}", source, there, to), (f"{to} -> hf", there, back, "hf")):
                plain, found = [], []
                for _ in range(rounds):
                    plain.append(run_child("bench_convert:copy", str(src), str(root / "copy")))
                    shutil.rmtree(root / "copy")
                    shutil.rmtree(out, ignore_errors=True)
                    found.append(run_child("bench_convert:convert", str(src), str(out), target, tp, pp, workers))
                row = {"name": name, "tp": tp, "pp": pp, "bytes": found[0]["bytes"]}
                for part, runs in (("", found), ("copy_", plain)):
                    row[f"{part}speed"] = max(one["bytes"] / one["seconds"] for one in runs) / 1e6
                    row[f"{part}cpu"] = min(one["cpu"] / one["bytes"] for one in runs) * 1e9
                row["peak"], row["idle"] = (max(one[key] for one in found) for key in ("peak", "idle"))
                rows.append(row)
            shutil.rmtree(back)
            shutil.rmtree(there)
    return rows


def main() -> None:
    """Write, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, help="where to write; needs four times the size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    out = Console(width=150)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run_child("bench_convert:write_source", str(Path(folder) / "hf"), args.gigabytes)
        rows = measure(Path(folder), args.rounds, args.workers)
    largest = WORDS * LAYER["hidden_size"] * 2 / 2**20
    title = f"{rows[0]['bytes'] / 1e9:.2f} GB, largest tensor {largest:.0f} MB, {args.workers} workers"
    table = Table(title=f"{title}, sha256 {hash_speed():.0f} MB/s, load {os.getloadavg()[0]:.1f}")
    columns = ("conversion", "tp x pp", "MB/s", "copy MB/s", "of the copy", "CPU s", "copy CPU s")
    for name in (*columns, "peak MB", "over idle MB"):
        table.add_column(name, justify="right")
    for row in rows:
        speeds = [f"{row['speed']:.0f}", f"{row['copy_speed']:.0f}", f"{row['speed'] / row['copy_speed']:.2f}"]
        speeds += [f"{row['cpu']:.2f}", f"{row['copy_cpu']:.2f}"]
        grid = f"{row['tp']} x {row['pp']}"
        table.add_row(row["name"], grid, *speeds, f"{row['peak']:.0f}", f"{row['peak'] - row['idle']:.0f}")
    out.print(table)
    if args.json:
        args.json.write_text(json.dumps({"largest_tensor_mb": largest, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
