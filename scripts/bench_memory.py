"""The memory that `ee-scale check` foretells against the peak of real ranks on this machine's CPU.

    python scripts/bench_memory.py                     # every case
    python scripts/bench_memory.py --cases pp2,supernet --json memory.json

Each rank is a fresh process; measured is the growth of its memory that no file backs, from the joined grid to the end
of three steps. glibc gives every block of 64 KiB and more back at once, so that what is resident is what is in use.
Models are random and lie in a temporary folder.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _children import run_child, run_children
from rich.console import Console
from rich.table import Table

WANTED = 0.10
STEPS = 3
COMMON = ["data=python", "parallel.device=cpu", "logging.every=1", "train.verify_frozen=false", "data.seq_length=256"]
TUNE = ["tune", *COMMON, "train.steps=3", "train.micro_batch_size=4", "exits.loss_chunk_tokens=512"]
SUPERNET = [
    "supernet", *COMMON, "train.micro_batch_size=4", "distill.loss_chunk_tokens=256",
    "space={hidden: [1.0, 0.5], ffn: [1.0, 0.5], depth: [1.0, 0.5]}",
]  # fmt: skip
ALL_AXES = "{name: all, axes: [hidden, ffn, depth], steps: 2, rank: 8}"
ALONE, TEACHER = f"stages=[{ALL_AXES}]", f"stages=[{{name: teacher, axes: [], steps: 2, rank: 8}}, {ALL_AXES}]"
ONE, THREE = "exits.layers=[4]", "exits.layers=[2,4,8]"
CASES: dict[str, tuple[int, list[str]]] = {
    # name: (ranks, the command)
    "exit1": (1, [*TUNE, ONE, "train.global_batch_size=8"]),
    "exits3": (1, [*TUNE, THREE, "train.global_batch_size=8"]),
    "full_head": (1, [*TUNE, THREE, "exits.head=full", "train.global_batch_size=8"]),
    "layer_kind": (1, [*TUNE, THREE, "exits.kind=layer", "train.global_batch_size=8"]),
    "kl": (1, [*TUNE, THREE, "exits.kl_weight=0.5", "train.global_batch_size=8"]),
    "bf16": (1, [*TUNE, THREE, "train.precision=bf16", "train.global_batch_size=8"]),
    "pp2": (2, [*TUNE, THREE, "parallel.pp=2", "train.global_batch_size=8"]),
    "tp2": (2, [*TUNE, THREE, "parallel.tp=2", "train.global_batch_size=8"]),
    "dp2": (2, [*TUNE, THREE, "parallel.dp=2", "train.global_batch_size=16"]),
    "full": (1, [*TUNE, THREE, "backbone=full", "train.global_batch_size=8"]),
    "full_pp2": (2, [*TUNE, THREE, "backbone=full", "parallel.pp=2", "train.global_batch_size=16"]),
    "low_rank_pp2": (2, [*TUNE, THREE, "backbone=low_rank", "parallel.pp=2", "train.global_batch_size=16"]),
    "checkpointing": (
        1,
        [*TUNE, THREE, "backbone=full", "backbone.activation_checkpointing=true", "train.global_batch_size=8"],
    ),
    "supernet": (1, [*SUPERNET, ALONE, "train.global_batch_size=8"]),
    "supernet_teacher": (1, [*SUPERNET, TEACHER, "train.global_batch_size=8"]),
    "supernet_pp2": (2, [*SUPERNET, ALONE, "parallel.pp=2", "train.global_batch_size=8"]),
}


def write_model(folder: str) -> None:
    """A random Llama of eight layers, some 120 MB."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1344, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=8, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def estimate(arguments: list[str]) -> list[dict[str, float]]:
    """What the preflight says of each stage, without the process."""
    from dataclasses import asdict

    config, plan = _plan(arguments)
    found = []
    for memory in plan.memory(bf16=config.train.precision == "bf16", device="cpu"):
        found.append({**asdict(memory), "total": memory.total - memory.overhead})
    return found


def measure(arguments: list[str], rank: int, world: int, rendezvous: str) -> dict[str, float]:
    """One rank's run: its stage, the process before it, and the peak beyond that."""
    import torch

    from ee_scale.grid import join_grid

    torch.set_num_threads(1)
    config, plan = _plan(arguments)
    where = {"init_method": f"file://{rendezvous}", "rank": rank} if world > 1 else {}
    grid = join_grid(plan.layout, torch.device("cpu"), 5.0, **where)
    run = _tune if arguments[0] == "tune" else _supernet
    before = anonymous_bytes()
    with peak_growth() as growth:
        loaded = run(config, plan, grid)
    torch.distributed.barrier()
    return {"stage": grid.stage, "before": before, "loaded": loaded - before, "peak": growth[0]}


def _plan(arguments: list[str]) -> tuple[Any, Any]:
    from ee_scale.config.compose import compose_config
    from ee_scale.training.recipe import recipe_of

    config = compose_config(arguments[0], arguments[1:])
    return config, recipe_of(arguments[0]).of(config).plan


def _tune(config: Any, plan: Any, grid: Any) -> int:
    from ee_scale.training.tune import start_run

    run, micro_batches = start_run(plan, grid), _random_text(config, plan.shape.vocab_size)
    loaded = anonymous_bytes()
    for _ in range(STEPS):
        run.engine.train_step(micro_batches)
    return loaded


def _supernet(config: Any, plan: Any, grid: Any) -> int:
    from ee_scale.elastic.order import UnitOrder
    from ee_scale.training.supernet import build_stage, open_phases, start_run

    run = start_run(plan, grid, build_stage(plan, grid), UnitOrder.identity(plan.map.shape))
    micro_batches, loaded = _random_text(config, plan.map.config.vocab_size), anonymous_bytes()
    for index in range(len(plan.phases)):
        open_phases(run, index)
        run.start_engine()
        for step in range(STEPS):
            run.engine.train_step(micro_batches, plan.draws(run.space, index, step, lambda spec: 1))
    return loaded


def _random_text(config: Any, vocab_size: int) -> Iterator[dict[str, Any]]:
    import torch

    shape = (config.train.micro_batch_size, config.data.seq_length + 1)
    while True:
        tokens = torch.randint(0, vocab_size, shape)
        mask = torch.ones(shape[0], shape[1] - 1)
        yield {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous(), "loss_mask": mask}


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@contextmanager
def peak_growth() -> Iterator[list[int]]:
    """Largest growth of `anonymous_bytes` inside the block, looked at every half millisecond."""
    start, found, stop = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            found[0] = max(found[0], anonymous_bytes() - start)
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def run_case(folder: Path, name: str, console: Console) -> list[dict[str, Any]]:
    """Estimate and measurement of each stage of a case: of its ranks, the one that needs most."""
    world, arguments = CASES[name]
    arguments = [*arguments, f"model={folder / 'model'}"]
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment |= {"TRANSFORMERS_VERBOSITY": "error", "GLOO_SOCKET_IFNAME": "lo", "LOCAL_RANK": "0"}
    stages = run_child("bench_memory:estimate", arguments, **environment)
    limits = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    rendezvous = str(folder / f"rendezvous-{name}")
    ranks = run_children(
        "bench_memory:measure", [(arguments, r, world, rendezvous) for r in range(world)], **environment, **limits
    )
    rows = []
    for stage, foretold in enumerate(stages):
        mine = max((rank for rank in ranks if rank["stage"] == stage), key=lambda rank: rank["peak"])
        rows.append({"case": name, "estimate": foretold, **mine, "ratio": foretold["total"] / mine["peak"]})
        console.print(f"{name} stage {stage}: {rows[-1]['ratio']:.2f}")
    return rows


def print_rows(console: Console, rows: list[dict[str, Any]]) -> None:
    """The table, in MB."""
    table = Table(title="memory of a rank beside its process, MB", title_justify="left")
    for column in ("case", "stage", "weights", "grad", "optim", "activ", "logits", "buffers", "estimate", "measured"):
        table.add_column(column, justify="right")
    table.add_column("ratio", justify="right")
    for row in rows:
        parts = [row["estimate"][key] for key in
                 ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "total")]  # fmt: skip
        numbers = [f"{value / 1e6:.0f}" for value in (*parts, row["peak"])]
        colour = "green" if abs(row["ratio"] - 1) <= WANTED else "red"
        table.add_row(row["case"], str(row["stage"]), *numbers, f"[{colour}]{row['ratio']:.2f}")
    console.print(table)
    before = ", ".join(f"{row['before'] / 1e6:.0f}" for row in rows)
    console.print(f"process before it, MB: {before}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="which cases, by name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    arguments = parser.parse_args()
    names = [name.strip() for name in arguments.cases.split(",")]
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"--cases: {unknown} of {', '.join(CASES)}")
    terminal = Console()
    console, rows = terminal if terminal.is_terminal else Console(width=140), []
    with tempfile.TemporaryDirectory() as name:
        run_child("bench_memory:write_model", str(Path(name) / "model"))
        for case in names:
            rows += run_case(Path(name), case, console)
    print_rows(console, rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
