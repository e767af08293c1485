"""Benchmark of one GPU: steps of `tune` on a Llama of 1.5 B parameters, and decoding with exits on it.

    python scripts/bench_gpu.py --json gpu.json                 # TMPDIR=/dev/shm is the quickest place for 6 GB
    python scripts/bench_gpu.py --json small.json --small       # does it run at all; works on a CPU too

Models are random, drawn on the device, and lie in a temporary folder. Every line is in the file as soon as it is
measured: the same command goes on where a time limit has ended it, and does again what failed. `floor` is the
arithmetic of a step at the rate that this card's matrix products reach; `MFU` is against its data sheet; `foretold` is
what `ee-scale check` says, without the process. `busy` is the share of time in which some kernel ran: far below 1 the
host cannot launch fast enough. `waits` are calls in which the host waited for the device.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from _children import run_timed
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
Line = tuple[str, str, str, tuple[Any, ...]]  # name, what measures it, on which model, and how

SHAPE = {"layers": 16, "hidden": 2048, "vocab": 128256}
SMALL = {"layers": 12, "hidden": 64, "vocab": 512}
LENGTH, SMALL_LENGTH = 1024, 32
AGREEMENT = 0.75  # of the first exit with the final layer, as of a trained one
COMMON = ["data=python", "train.verify_frozen=false", "exits.layers=[4,8,12]", "train.steps=100", "logging.every=1"]
BATCH = ["train.micro_batch_size=8", "train.global_batch_size=16"]
HALF = ["train.micro_batch_size=4", "train.global_batch_size=8"]
TUNE = {
    "frozen": BATCH,
    "full": [*HALF, "backbone=full"],
    "frozen, full heads": [*BATCH, "exits.head=full"],
    "low_rank": [*HALF, "backbone=low_rank"],
    "frozen, chunk 4096": [*BATCH, "exits.loss_chunk_tokens=4096"],
    "full, checkpointing": [*HALF, "backbone=full", "backbone.activation_checkpointing=true"],
    "frozen, Liger": [*BATCH, "train.loss_kernel=liger"],
    "frozen, kind layer": [*BATCH, "exits.kind=layer"],
    "frozen, KL": [*BATCH, "exits.kl_weight=0.5"],
    "frozen, micro-batch 1": [*BATCH, "train.micro_batch_size=1"],
    "frozen, fp32": [*BATCH, "train.precision=fp32"],
}
PROFILED = ("frozen", "full", "frozen, micro-batch 1")
SMALL_TUNE = ("frozen", "full")
DECODE = {"batch 1": ["--batches", "1"], "batch 8": ["--batches", "8"], "batch 32": ["--batches", "32"]}
FEW = ["--modes", "greedy", "--peers", "none"]
FULL_SIZE = [*FEW, "--prompts", "32", "--new-tokens", "48", "--seconds", "3"]
SMALL_SIZE = [*FEW, "--prompts", "1", "--prompt-tokens", "8", "--new-tokens", "4", "--seconds", "0.01"]
MOST = 150.0  # seconds of one line
NO_FORKS = ("forked subprocess", "initialization error")  # CUDA's words on a fork of a process that had started it


class Bench:
    """One run of the benchmark on a file of results, which may hold some already."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, console: Console):
        self.arguments, self.folder, self.console = arguments, folder, console
        self.begun, self.forks = time.monotonic(), True
        self.size = SMALL if arguments.small else SHAPE
        self.results: dict[str, Any] = {"shape": self.size, "machine": {}, "tune": {}, "decode": {}}
        if arguments.json.exists():
            self.results = json.loads(arguments.json.read_text())

    def run(self) -> None:
        """Every line that is not there yet, while there is time."""
        self.check_machine()
        for part in self.arguments.parts:
            lines = self.tune_lines() if part == "tune" else self.decode_lines()
            for name, target, model, given in lines:
                found = self.results[part].get(name, {"error": "not measured"})
                if "error" in found:
                    self.write(part, name, self.ask(target, self.model(model), *given))
                    self.tell(part, name)

    def check_machine(self) -> None:
        """Numbers of one file belong to one machine and one size."""
        found = self.ask("measure_machine", self.arguments.device, self.arguments.small)
        if "error" in found:
            raise SystemExit(f"the machine itself cannot be measured:\n{found['error']}")
        before = self.results["machine"]
        if self.results["shape"] != self.size or (before and before["device"] != found["device"]):
            raise SystemExit(
                f"--json {self.arguments.json}: holds numbers of another size or device; give another file"
            )
        self.results["machine"] = before or found
        self.save()

    def tune_lines(self) -> Iterator[Line]:
        length = SMALL_LENGTH if self.arguments.small else LENGTH
        small = ["train.micro_batch_size=1", "train.global_batch_size=2"] if self.arguments.small else []
        for name in SMALL_TUNE if self.arguments.small else TUNE:
            words = [
                *COMMON,
                *TUNE[name],
                f"data.seq_length={length}",
                f"parallel.device={self.arguments.device}",
                *small,
            ]
            yield name, "measure_tune", "plain", (words, name in PROFILED)

    def decode_lines(self) -> Iterator[Line]:
        words = ["--random", "given", "--device", self.arguments.device]
        words += SMALL_SIZE if self.arguments.small else FULL_SIZE
        for name in list(DECODE)[: 1 if self.arguments.small else None]:
            yield name, "measure_decode", "exits", ([*words, *DECODE[name]],)

    def model(self, name: str) -> str:
        """The folder of a model, drawn when it is first asked for."""
        if not (self.folder / "exits" / "config.json").exists():
            found = self.ask("write_models", str(self.folder), self.arguments.device, self.size, AGREEMENT)
            if "error" in found:
                raise SystemExit(f"no models:\n{found['error']}")
            self.write("machine", "models", found)
        return str(self.folder / name)

    def ask(self, target: str, *given: Any) -> Row:
        """A measurement in a process of its own; whatever becomes of it, the next one follows."""
        left = self.arguments.limit - (time.monotonic() - self.begun)
        if left < 5:
            return {"error": "no time left"}
        quiet = {"PYTHONWARNINGS": "ignore", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}
        # Asked through NVML, the number of GPUs starts no CUDA, which would not survive a fork.
        quiet |= {"DS_ACCELERATOR": self.arguments.device, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        if self.arguments.device == "cpu":
            quiet["OMP_NUM_THREADS"] = "1"
        limits = {"seconds": min(left, MOST), "forks": self.forks, "preload": ["_bench_gpu"]}
        try:
            return run_timed(f"_bench_gpu:{target}", *given, **limits, **quiet)
        except RuntimeError as error:
            if self.forks and any(word in str(error) for word in NO_FORKS):
                self.forks = False
                return self.ask(target, *given)
            return {"error": str(error)}

    def write(self, part: str, name: str, found: Row) -> None:
        self.results[part][name] = found
        self.save()

    def save(self) -> None:
        aside = self.arguments.json.with_suffix(".tmp")
        aside.write_text(json.dumps(self.results, indent=1) + "\n")
        aside.replace(self.arguments.json)

    def tell(self, part: str, name: str) -> None:
        """A line on what was just measured; decoding has printed its own table."""
        found = self.results[part][name]
        if "error" in found:
            self.console.print(f"{part}, {name}: {found['error']}", markup=False, highlight=False)
        elif part == "tune":
            self.console.print(f"tune, {name}: {found['step'] * 1e3:.1f} ms/step", highlight=False)
            for kind in ("kernel_ms", "host_ms"):
                for what, ms in list(found.get("profile", {}).get(kind, {}).items())[:8]:
                    self.console.print(f"{ms:12.3f} ms  {kind[:-3]}  {what}", markup=False, highlight=False)


def tune_table(results: dict[str, Any]) -> Table:
    """A line for each case; '-' for what was not measured."""
    machine, table = results["machine"], Table(title="tune", title_justify="left")
    columns = ["ms/step", "floor", "tokens/s", "MFU", "GiB at most", "foretold", "reserved", "context", "busy", "waits"]
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    sheet = machine.get("sheet_tflops")
    for name, row in results["tune"].items():
        if "error" in row:
            table.add_row(name, row["error"].strip().splitlines()[-1][:60])
            continue
        seen = row.get("profile", {})
        mfu = None if not sheet or row["dtype"] != "bfloat16" else row["flops"] / row["step"] / (sheet * 1e12)
        floor = 1e3 * row["flops"] / machine["flops"][row["dtype"]]
        cells = [f"{row['step'] * 1e3:.1f}", f"{floor:.1f}", f"{row['tokens_per_second']:.0f}", _text(mfu, ".1%")]
        cells += [_text(row.get(f"{key}_gib"), ".2f") for key in ("peak", "foretold", "reserved", "context")]
        table.add_row(name, *cells, _text(seen.get("busy"), ".0%"), _text(seen.get("waits"), "d"))
    return table


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="all numbers; what it has is skipped")
    parser.add_argument("--parts", nargs="+", choices=("tune", "decode"), default=["tune", "decode"])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds in all")
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="keep the models there, or find them")
    parser.add_argument("--small", action="store_true", help="a tiny model and few lines: does it run at all")
    arguments = parser.parse_args(words)
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    console = Console(width=170)
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(arguments, arguments.models or Path(temporary), console)
        bench.run()
    machine = bench.results["machine"]
    rates = ", ".join(f"{name} {value / 1e12:.3g} TFLOP/s" for name, value in machine["flops"].items())
    console.print(f"{machine['device']}: {rates}, memory {machine['bytes_per_second'] / 1e9:.3g} GB/s", highlight=False)
    console.print(tune_table(bench.results))


if __name__ == "__main__":
    main()
