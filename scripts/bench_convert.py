"""Benchmark of the converters: peak memory and throughput, against a plain copy of the same files in the same run.

    python scripts/bench_convert.py --gigabytes 2 --folder /scratch

A random Llama of the given size in bf16 is written once; every conversion runs in a fresh process. `peak` is the
largest resident memory of that process, `over idle` what it has beyond the same process with everything imported and
nothing converted. The copy reads and writes the same bytes with shutil and syncs them to the disk, as conversions do.
"""

import argparse
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
    layers = max(1, round((gigabytes * 1e9 - 4 * WORDS * 2048) / per_layer))
    config = LlamaConfig(**LAYER, vocab_size=WORDS, num_hidden_layers=layers // 4 * 4, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=f"{int(gigabytes * 250)}MB")


def convert(source: str, out: str, to: str, tp: int, pp: int, workers: int) -> dict[str, float]:
    """One conversion in this process: seconds, bytes, peak and idle memory in MB."""
    from ee_scale.config.convert import ConvertConfig
    from ee_scale.conversion.execute import run
    from ee_scale.conversion.plan import make_conversion

    torch.set_num_threads(1)
    idle = memory()
    started = time.perf_counter()
    conversion = make_conversion(ConvertConfig(src=Path(source), out=Path(out), to=to, tp=tp, pp=pp))
    run(conversion, workers, lambda size: None)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "bytes": conversion.nbytes, "peak": memory(), "idle": idle}


def copy(source: str, out: str) -> dict[str, float]:
    """All files of a folder, copied and synced, one after another."""
    started, moved = time.perf_counter(), 0
    for path in sorted(Path(source).rglob("*")):
        if path.is_file():
            target = Path(out) / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            moved += path.stat().st_size
            with target.open("rb+") as file:
                os.fsync(file.fileno())
    return {"seconds": time.perf_counter() - started, "bytes": moved, "peak": memory(), "idle": 0.0}


def memory() -> float:
    """Largest resident memory so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(root: Path, rounds: int, workers: int) -> list[dict[str, Any]]:
    """Every conversion `rounds` times, each round with its own copy; the median by speed against that round's copy."""
    source, rows = root / "hf", []
    for tp, pp in GRIDS:
        for to in ("megatron_core", "megatron_legacy"):
            there, back = root / f"{to}-{tp}-{pp}", root / f"{to}-{tp}-{pp}-hf"
            for name, src, out, target in ((f"hf -> {to}", source, there, to), (f"{to} -> hf", there, back, "hf")):
                found = []
                for _ in range(rounds):
                    plain = run_child("bench_convert:copy", str(src), str(root / "copy"))
                    shutil.rmtree(root / "copy")
                    shutil.rmtree(out, ignore_errors=True)
                    one = run_child("bench_convert:convert", str(src), str(out), target, tp, pp, workers)
                    one["speed"] = one["bytes"] / one["seconds"] / 1e6
                    one["copy_speed"] = plain["bytes"] / plain["seconds"] / 1e6
                    one["share"] = one["speed"] / one["copy_speed"]
                    found.append(one)
                found.sort(key=lambda one: one["share"])
                rows.append({"name": name, "tp": tp, "pp": pp, **found[len(found) // 2]})
                rows[-1]["peak"] = max(one["peak"] for one in found)
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
    table = Table(title=f"{rows[0]['bytes'] / 1e9:.2f} GB, largest tensor {largest:.0f} MB, {args.workers} workers")
    for name in ("conversion", "tp x pp", "MB/s", "copy MB/s", "of the copy", "peak MB", "over idle MB"):
        table.add_column(name, justify="right")
    for row in rows:
        speeds = (f"{row['speed']:.0f}", f"{row['copy_speed']:.0f}", f"{row['share']:.2f}")
        grid = f"{row['tp']} x {row['pp']}"
        table.add_row(row["name"], grid, *speeds, f"{row['peak']:.0f}", f"{row['peak'] - row['idle']:.0f}")
    out.print(table)
    if args.json:
        args.json.write_text(json.dumps({"largest_tensor_mb": largest, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
