"""Benchmark of lossless decoding over pipeline stages, against plain decoding on the same stages.

    python scripts/bench_pipeline_decode.py --json pipeline.json

Each stage is a process on one thread, of a small random model whose exit behind the first stage agrees with the final
layer on a chosen share of random tokens. With fewer cores than stages their real work could not overlap: so each pass
of a stage sleeps `--stage-ms` before it computes, which takes much less. What is measured is thus the schedule and its
messages, not kernels: ratios say what drafting in idle stages brings where a stage's time is that of its layers, and
how near that comes to the cost model, for the acceptance that was counted in the same run. Greedy text of lossless
decoding is compared with that of plain decoding. Prompts are random; ways take turns.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _bench_models import llama, write_exits, write_model
from _children import run_children
from rich.console import Console
from rich.table import Table

from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.files import write_text
from ee_scale.grid import Layout, join_grid, leave_grid
from ee_scale.inference.pipeline import Decoded, PipelineDecoder
from ee_scale.inference.pipeline_lossless import speedup
from ee_scale.inference.pipeline_model import load_decoding_stage, plan_decoding
from ee_scale.modeling.policies import resolve_policy

LAYERS, HIDDEN, VOCAB, PROMPT = 8, 64, 512, 16
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}


def slowed(forward: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """A stage's pass that waits first."""

    def waits(*args: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return forward(*args, **options)

    return waits


def measure_rank(
    rank: int, stages: int, meeting: str, folders: dict[float, str], rows: Sequence[int], new: int, seconds: float
) -> list[dict[str, Any]]:
    """One stage's part in everything at this number of stages; the first stage returns a result per case."""
    torch.set_num_threads(1)
    grid = join_grid(Layout(pp=stages), torch.device("cpu"), init_method=f"file://{meeting}", rank=rank)
    found = []
    for agreement, path in folders.items():
        folder = ModelFolder(Path(path))
        cut = [LAYERS // stages] * stages
        plan = plan_decoding(folder, 1, stages, folder.exits.layers, cut, drafts=True)
        stage = load_decoding_stage(folder, plan, grid, torch.float32)
        stage.backbone.forward = slowed(stage.backbone.forward, seconds)
        decoder = PipelineDecoder(stage, plan, grid, folder.generation_config())
        for count in rows:
            row = measure(decoder, plan.exit_layers, count, new)
            if rank == 0:
                found.append({"stages": stages, "agreement": agreement, "rows": count, **row})
    leave_grid()
    return found


def measure(decoder: PipelineDecoder, exits: Sequence[int], rows: int, new: int) -> dict[str, Any]:
    """Tokens per second plainly and losslessly, and what became of the drafts."""
    prompts = torch.randint(VOCAB, (rows, PROMPT), generator=torch.Generator().manual_seed(rows)).tolist()
    settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": -1}
    said: dict[str, Decoded] = {}
    took: dict[str, float] = {}
    for name in ("off", "lossless") * 2:  # the first turn warms up
        policy = resolve_policy(name, exits)
        start = time.perf_counter()
        said[name] = decoder.generate(prompts, policy, **settings)
        took[name] = time.perf_counter() - start
    if said["lossless"] is None:
        return {}
    accepted = said["lossless"].stats["accepted"] / (rows * (new - 1))
    return {
        "plain": rows * new / took["off"],
        "lossless": rows * new / took["lossless"],
        "ratio": took["off"] / took["lossless"],
        "accepted": accepted,
        **said["lossless"].stats,
        "predicted": speedup(decoder.plan.launched, 0, accepted) if rows == 1 else None,
        "same": said["lossless"].tokens == said["off"].tokens,
    }


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """One line per case."""
    table = Table(title="tokens per second over stages", title_justify="left")
    for name in ("stages", "rows", "agreement", "plain", "lossless", "ratio", "cost model", "accepted", "same text"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["stages"]),
            str(row["rows"]),
            f"{row['agreement']:.0%}",
            f"{row['plain']:.1f}",
            f"{row['lossless']:.1f}",
            f"{row['ratio']:.2f}x",
            "" if row["predicted"] is None else f"{row['predicted']:.2f}x",
            f"{row['accepted']:.0%} of tokens",
            "yes" if row["same"] else "no",
        )
    Console(width=150).print(table)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4], choices=[2, 4, 8])
    parser.add_argument("--agreements", type=float, nargs="+", default=[0.0, 0.6, 0.8, 0.95])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--stage-ms", type=float, default=20.0, help="time of a stage's pass, beside its own work")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(words)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for stages in arguments.stages:
            folders = {}
            for agreement in arguments.agreements:
                folder = Path(name) / f"{stages}-{agreement}"
                write_model(folder / "plain", llama(LAYERS, HIDDEN, VOCAB), "cpu", torch.float32)
                write_exits(folder / "exits", folder / "plain", [LAYERS // stages], agreement, "cpu")
                folders[agreement] = str(folder / "exits")
            given = (stages, f"{name}/meet-{stages}", folders, arguments.rows, arguments.new_tokens)
            ranks = [(rank, *given, arguments.stage_ms / 1000) for rank in range(stages)]
            rows += run_children("bench_pipeline_decode:measure_rank", ranks, **ENVIRONMENT)[0]
            if arguments.json:
                write_text(arguments.json, json.dumps({"stage_ms": arguments.stage_ms, "rows": rows}, indent=1) + "\n")
    print_table(rows)


if __name__ == "__main__":
    main()
