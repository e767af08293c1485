"""Step time, bubble, memory and communication of exit tuning on paper, from the schedules' own instruction streams.

    python scripts/simulate.py                    # Llama-2 on the grids of EE-Tuning and EE-LLM, and on 1,024 GPUs
    python scripts/simulate.py --gpu h100 --efficiency 0.4
    python scripts/simulate.py --check            # the same model of a step against real ranks on this machine's CPU

The table's machine is assumed: data-sheet numbers times `--efficiency`. `--check` measures this machine's (products of
the model's sizes, memory, loss per logit, messages and all-reduces over gloo) and compares the step times that follow
with those of real runs. On a machine that other work uses (load above 0.7) it checks the schedule and the messages
alone: forward and exits then take fixed times, slept through, on a tiny model (`--real` forces the other).
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _children import run_children
from rich.console import Console
from rich.table import Table

WANTED = 0.15
GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """What a rank can do. Rates in units per second; a link is (seconds per message, bytes per second).

    Attributes:
        flops: of matrix products. memory: bytes read and written by everything else. logits: logits whose loss goes
            forward and backward; None: by memory. cores: that all ranks share; None: each has its own.
        rendezvous: a send waits for its receiver.
    """

    flops: float
    memory: float
    stages: tuple[float, float]
    tensor: tuple[float, float]
    replicas: tuple[float, float]
    logits: float | None = None
    cores: float | None = None
    rendezvous: bool = True


# Data sheets: dense bf16, HBM, NVLink in one direction, one 200 or 400 Gbit/s adapter per GPU. Latencies are assumed.
SHEETS = {
    "a100": Machine(312e12, 2.0e12, (2e-5, 25e9), (1.5e-5, 300e9), (3e-5, 25e9)),
    "h100": Machine(989e12, 3.35e12, (2e-5, 50e9), (1.5e-5, 450e9), (3e-5, 50e9)),
}
LOSS_PASSES = 16  # times that a logit (fp32) is read or written by its loss, forward and backward
STEP_BYTES = 32  # read and written per trained number by AdamW and the copy back


def assumed(gpu: str, efficiency: float) -> Machine:
    """A data sheet times an efficiency."""
    sheet = SHEETS[gpu]
    links = [(latency, rate * efficiency) for latency, rate in (sheet.stages, sheet.tensor, sheet.replicas)]
    return Machine(sheet.flops * efficiency, sheet.memory * efficiency, *links)


def step_seconds(plan: Any, config: Any, machine: Machine, *, bf16: bool) -> Callable[[int, str, int], float]:
    """(stage, instruction, index) -> seconds on this machine."""
    import torch

    from ee_scale.planning.exit_costs import exit_passes
    from ee_scale.planning.passes import layer_passes, local_model

    tp, shape, joint = plan.layout.tp, plan.shape, plan.backbone.trains
    rows, length = config.train.micro_batch_size, config.data.seq_length
    tokens, size = rows * length, 2 if bf16 else 4
    work, traffic = plan.work(), plan.traffic(bf16=bf16)
    local = local_model(plan.model_config, tp, torch.bfloat16 if bf16 else torch.float32)
    layer = layer_passes(local, rows, length, None if joint else (), 0)
    body = exit_passes(local, plan.spec, rows, length, through=joint)
    logits = tokens * shape.vocab_size / tp
    loss = logits / machine.logits if machine.logits else logits * 4 * LOSS_PASSES / machine.memory
    table: list[dict[str, float]] = []
    for stage, cost in enumerate(work):
        layers, exits = len(plan.stages.layers(stage)), len(plan.stages.exits(stage))
        heads = exits + (1 if joint and plan.stages.is_last(stage) else 0)
        forward = cost.forward * tokens / tp / machine.flops + layers * layer.moved / machine.memory
        trained = plan.parameters(stage).trained
        reduces = traffic[stage].tensor_calls / plan.num_micro_batches
        tensor = reduces * machine.tensor[0] + traffic[stage].tensor / plan.num_micro_batches / machine.tensor[1]
        ahead = tensor * min(1.0, 2 * layers / max(1, reduces))
        behind = cost.exits * tokens / tp / machine.flops
        behind += exits * body.moved_training / machine.memory + heads * loss + tensor - ahead
        if joint:
            behind += cost.backward * tokens / tp / machine.flops
            behind += layers * (layer.moved_training - layer.moved) / machine.memory
        replicas = traffic[stage].reduce + traffic[stage].gather
        state = tokens * shape.hidden_size * size
        message = machine.stages[0] + state / machine.stages[1]
        table.append(
            {
                "ForwardPass": forward + ahead,
                "TrainExits": behind,
                "BackwardPass": behind,
                "SendActivation": message,
                "SendGrad": message,
                "OptimizerStep": trained / plan.layout.dp * STEP_BYTES / machine.memory,
                "ReduceGrads": replicas / machine.replicas[1] + 2 * machine.replicas[0] * (plan.layout.dp > 1),
            }
        )
    return lambda stage, name, index: table[stage].get(name, 0.0)


def schedules(plan: Any, config: Any) -> list[Any]:
    """One step's schedule of each stage, as the engines make it."""
    from deepspeed.runtime.pipe.schedule import TrainSchedule

    from ee_scale.engine.schedule import FrozenSchedule

    count, stages = plan.num_micro_batches, plan.stages.launched
    if plan.backbone.trains:
        return [TrainSchedule(count, stages, stage) for stage in range(stages)]
    return [
        FrozenSchedule(
            count, stages, stage, has_exits=bool(plan.stages.exits(stage)), share_final=config.exits.kl_weight > 0
        )
        for stage in range(stages)
    ]


def run_on_paper(plan: Any, config: Any, seconds: Callable[[int, str, int], float], machine: Machine) -> Any:
    """The replay of a few steps."""
    from replay import operations, replay

    made, steps = schedules(plan, config), 6
    streams = [
        [op for _ in range(steps) for op in operations(schedule.steps(), stage, len(made), seconds)]
        for stage, schedule in enumerate(made)
    ]
    ranks = plan.layout.tp * plan.layout.dp
    return replay(streams, machine.cores or float("inf"), ranks, machine.rendezvous)


# -- the paper's models ------------------------------------------------------------------------------------------------

LLAMAS = {  # Llama 2: layers, width, MLP, heads, KV heads
    "7B": (32, 4096, 11008, 32, 32),
    "13B": (40, 5120, 13824, 40, 40),
    "70B": (80, 8192, 28672, 64, 8),
}
EIGHT, TWO = [i / 8 for i in range(1, 9)], [0.25, 0.5]
GRIDS: list[tuple[str, str, tuple[int, int, int], int, int, list[float]]] = [
    # (model, mode, (tp, pp, dp), micro-batch, global batch, exits): EE-Tuning's scripts, EE-LLM's, 1,024 GPUs
    *((model, "frozen", (1, 4, 2), 4, 16, EIGHT) for model in ("7B", "13B", "70B")),
    ("70B", "frozen", (1, 4, 1), 4, 16, [0.25]),
    ("7B", "full", (1, 4, 4), 2, 2048, TWO),
    ("13B", "full", (2, 4, 2), 1, 2048, TWO),
    *((model, mode, grid, 1, 2048, TWO)
      for model, grid in (("7B", (1, 4, 256)), ("13B", (2, 4, 128)), ("70B", (8, 8, 16)))
      for mode in ("frozen", "low_rank", "full")),
]  # fmt: skip


def paper_plan(row: tuple[Any, ...]) -> tuple[Any, Any]:
    """(plan, config) of a row of GRIDS: MLP exits with their own heads, as in the paper."""
    from transformers import LlamaConfig

    from ee_scale.config.compose import compose_config
    from ee_scale.planning.tune import plan_tune

    model, mode, (tp, pp, dp), micro, batch, exits = row
    arguments = ["model=tiny", "data=python", "data.seq_length=2048", f"backbone={mode}", f"exits.layers={exits}"]
    arguments += [f"parallel.tp={tp}", f"parallel.pp={pp}", f"parallel.dp={dp}", "parallel.device=cuda"]
    arguments += [f"train.micro_batch_size={micro}", f"train.global_batch_size={batch}", "train.precision=bf16"]
    arguments += ["exits.kind=mlp" if mode == "frozen" else "exits.kind=norm", "exits.head=full"]
    arguments += ["backbone.activation_checkpointing=true"] if mode == "full" and model != "7B" else []
    layers, hidden, ffn, heads, kv = LLAMAS[model]
    llama = LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    config = compose_config("tune", arguments)
    return plan_tune(config, Path("nowhere"), llama), config


def paper_rows(machine: Machine, peak: float) -> list[dict[str, Any]]:
    """Every grid on this machine. MFU is against `peak`, the data sheet's."""
    rows = []
    for row in GRIDS:
        plan, config = paper_plan(row)
        found = run_on_paper(plan, config, step_seconds(plan, config, machine, bf16=True), machine)
        warm_up = 3 if row[1] == "frozen" else 1
        seconds = found.step_seconds(warm_up)
        tokens = config.train.global_batch_size * config.data.seq_length
        work = plan.flops_per_token * tokens
        idle = found.idle(warm_up)
        sent = max(plan.traffic(bf16=True), key=lambda traffic: traffic.total)
        rows.append(
            {
                "model": row[0],
                "mode": row[1],
                "grid": f"{plan.layout.tp}x{plan.layout.pp}x{plan.layout.dp}",
                "gpus": plan.layout.world_size,
                "micro_batches": plan.num_micro_batches,
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
                "mfu": work / seconds / plan.layout.world_size / peak,
                "idle": sum(idle) / len(idle),
                "memory": max(memory.total for memory in plan.memory(bf16=True)) / GIB,
                "sent": {name: getattr(sent, name) / GIB for name in ("stages", "tensor", "reduce", "gather")},
            }
        )
    return rows


def print_paper(console: Console, rows: list[dict[str, Any]], title: str) -> None:
    """The table."""
    table = Table(title=title, title_justify="left")
    names = ("model", "mode", "tp x pp x dp", "GPUs", "micro-batches", "step s", "tokens/s", "MFU", "idle", "GiB/rank")
    for column in (*names, "sent GiB: stages", "tensor", "replicas"):
        table.add_column(column, justify="right")
    for row in rows:
        sent = row["sent"]
        cells = [row["model"], row["mode"], row["grid"], str(row["gpus"]), str(row["micro_batches"])]
        cells += [f"{row['seconds']:.2f}", f"{row['tokens_per_second']:,.0f}", f"{row['mfu']:.0%}"]
        cells += [f"{row['idle']:.1%}", f"{row['memory']:.1f}" + (" !" if row["memory"] > 80 else "")]
        cells += [f"{sent['stages']:.2f}", f"{sent['tensor']:.2f}", f"{sent['reduce'] + sent['gather']:.2f}"]
        table.add_row(*cells)
    console.print(table)


# -- against real runs -------------------------------------------------------------------------------------------------

CHECKS = {"pp2": (1, 2, 1), "pp4": (1, 4, 1), "tp2": (2, 1, 1), "dp2": (1, 1, 2)}
REAL = {"hidden": 384, "layers": 8, "vocab": 8192, "sequence": 256, "micro_batch": 2}
TINY = {"hidden": 64, "layers": 4, "vocab": 256, "sequence": 32, "micro_batch": 1}
WAIT = {"ForwardPass": 0.04, "TrainExits": 0.02}  # seconds that these take where the clock is checked alone


def check_plan(size: dict[str, int], grid: tuple[int, int, int], folder: Path) -> tuple[Any, Any]:
    """(plan, config) of one of CHECKS."""
    from ee_scale.backbone.model_folder import ModelFolder
    from ee_scale.config.compose import compose_config
    from ee_scale.planning.tune import plan_tune

    tp, pp, dp = grid
    exits = [size["layers"] * i // 4 for i in (1, 2, 3, 4)]
    arguments = ["model=tiny", "data=python", f"data.seq_length={size['sequence']}", f"exits.layers={exits}"]
    arguments += [f"parallel.tp={tp}", f"parallel.pp={pp}", f"parallel.dp={dp}", "parallel.device=cpu"]
    arguments += [f"train.micro_batch_size={size['micro_batch']}", "exits.rank=16", "train.precision=fp32"]
    config = compose_config("tune", [*arguments, f"train.global_batch_size={4 * dp * size['micro_batch']}"])
    return plan_tune(config, folder, ModelFolder(folder).decoder_config), config


def measure_machine(size: dict[str, int], folder: str, rank: int, rendezvous: str) -> dict[str, Any]:
    """This machine's rates, one thread of each of two processes that share a gloo world and work at the same time.

    Operands change from call to call, as they do from layer to layer: what stays in a cache is faster than a run.
    """
    import time
    from itertools import cycle
    from statistics import median

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)

    def usual(work: Callable[[], Any], rounds: int = 16) -> float:
        found = []
        dist.barrier()
        for _ in range(rounds):
            start = time.perf_counter()
            work()
            found.append(time.perf_counter() - start)
        return median(found)

    tokens, hidden = size["micro_batch"] * size["sequence"], size["hidden"]
    shapes = [(hidden, hidden), (hidden, 3 * hidden), (3 * hidden, hidden), (hidden, size["vocab"])]
    layers = [[(torch.randn(tokens, a), torch.randn(b, a)) for a, b in shapes] for _ in range(size["layers"])]
    found: dict[str, Any] = {}
    taken = 0.0
    for index in range(len(shapes)):
        operands = cycle([layer[index] for layer in layers])
        taken += usual(lambda operands=operands: torch.nn.functional.linear(*next(operands)))
    found["flops"] = sum(2 * tokens * a * b for a, b in shapes) / taken
    states = cycle([torch.randn(tokens, 3 * hidden) for _ in range(4 * size["layers"])])
    found["memory"] = 2 * tokens * 3 * hidden * 4 / usual(lambda: next(states) * 1.5, 64)
    logits = torch.randn(tokens, size["vocab"], requires_grad=True)
    labels = torch.zeros(tokens, dtype=torch.long)

    def loss() -> None:
        copy = logits + 0.0
        torch.nn.functional.cross_entropy(copy, labels).backward()

    found["logits"] = logits.numel() / usual(loss, 5)
    for name, bytes_ in (("small", 1024), ("large", tokens * hidden * 4)):
        message = torch.zeros(bytes_ // 4)

        def round_trip(message: Any = message) -> None:
            dist.send(message, 1) if rank == 0 else dist.recv(message, 0)
            dist.recv(message, 1) if rank == 0 else dist.send(message, 0)

        found[f"send_{name}"] = usual(round_trip, 40) / 2
        found[f"reduce_{name}"] = usual(lambda message=message: dist.all_reduce(message), 40)
    return {**found, "bytes": tokens * hidden * 4}


def measured(found: dict[str, Any], cores: float) -> Machine:
    """This machine from its measurements; a ring over two sends a message's bytes once from each side."""

    def link(name: str) -> tuple[float, float]:
        small, large = found[f"{name}_small"], found[f"{name}_large"]
        return small, found["bytes"] / max(1e-9, large - small)

    reduces = link("reduce")
    return Machine(
        found["flops"], found["memory"], link("send"), reduces, reduces, found["logits"], cores, rendezvous=False
    )


def measure_run(size: dict[str, int], grid: tuple[int, int, int], folder: str, rank: int, rendezvous: str, waits: bool):
    """Seconds per step of a real run on this rank, after two steps."""
    import time

    import torch

    from ee_scale.grid import join_grid
    from ee_scale.training.tune import start_run

    torch.set_num_threads(1)
    plan, _ = check_plan(size, grid, Path(folder))
    where = {"init_method": f"file://{rendezvous}", "rank": rank}
    joined = join_grid(plan.layout, torch.device("cpu"), 5.0, **where)
    engine = start_run(plan, joined).engine
    if waits:
        take_fixed_times(engine)
    tokens = torch.randint(0, size["vocab"], (plan.num_micro_batches, size["micro_batch"], size["sequence"] + 1))
    mask = torch.ones(size["micro_batch"], size["sequence"])
    batch = [{"tokens": t[:, :-1].contiguous(), "labels": t[:, 1:].contiguous(), "loss_mask": mask} for t in tokens]
    steps, ends = 12 if waits else 8, []
    for _ in range(steps):
        engine.train_step(iter(batch))
        ends.append(time.perf_counter())
    torch.distributed.barrier()
    return (ends[-1] - ends[1]) / (steps - 2)


def take_fixed_times(engine: Any) -> None:
    """Forward and exits sleep until their time is over."""
    import time

    from deepspeed.runtime.pipe.schedule import ForwardPass

    from ee_scale.engine.schedule import TrainExits

    handlers = dict(engine._INSTRUCTION_MAP)
    for kind in (ForwardPass, TrainExits):

        def timed(engine: Any, _work: Any = handlers[kind], _wait: float = WAIT[kind.__name__], **fields: Any) -> None:
            end = time.perf_counter() + _wait
            _work(engine, **fields)
            time.sleep(max(0.0, end - time.perf_counter()))

        handlers[kind] = timed
    engine._INSTRUCTION_MAP = handlers


def write_model(size: dict[str, int], folder: str) -> None:
    """A random Llama."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    heads = size["hidden"] // 32
    config = LlamaConfig(
        vocab_size=size["vocab"], hidden_size=size["hidden"], intermediate_size=3 * size["hidden"],
        num_hidden_layers=size["layers"], num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=size["sequence"], tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def check_rows(console: Console, real: bool) -> list[dict[str, Any]]:
    """Foretold and measured step times."""
    size, rows = REAL if real else TINY, []
    variables = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "LOCAL_RANK": "0"}
    variables |= {"TRANSFORMERS_VERBOSITY": "error", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as name:
        folder = f"{name}/model"
        run_children("simulate:write_model", [(size, folder)], **variables)
        ranks = [(size, folder, rank, f"{name}/links") for rank in range(2)]
        found = run_children("simulate:measure_machine", ranks, **variables)[0]
        machine = measured(found, len(os.sched_getaffinity(0)) if real else float("inf"))
        console.print(f"measured: {machine}")
        for label, grid in CHECKS.items():
            if grid[0] > 1 and not real:
                continue  # tensor ranks exchange inside the forward pass: their time is not fixed
            plan, config = check_plan(size, grid, Path(folder))
            seconds = step_seconds(plan, config, machine, bf16=False)
            if not real:
                given = seconds

                def seconds(stage: int, name: str, index: int, given: Any = given) -> float:
                    return WAIT.get(name, given(stage, name, index))

            foretold = run_on_paper(plan, config, seconds, machine).step_seconds(2)
            world = plan.layout.world_size
            jobs = [(size, grid, folder, rank, f"{name}/{label}", not real) for rank in range(world)]
            taken = max(run_children("simulate:measure_run", jobs, **variables))
            load = os.getloadavg()[0]
            rows.append({"grid": label, "foretold": foretold, "measured": taken, "load": load})
    return rows


def print_checks(console: Console, rows: list[dict[str, Any]], real: bool) -> None:
    """The table."""
    what = "real work" if real else "fixed times for forward and exits: schedule and messages alone"
    table = Table(title=f"step time on {len(os.sched_getaffinity(0))} cores ({what})", title_justify="left")
    for column in ("grid", "foretold ms", "measured ms", "ratio", "load"):
        table.add_column(column, justify="right")
    for row in rows:
        ratio = row["foretold"] / row["measured"]
        colour = "green" if abs(ratio - 1) <= WANTED else "red"
        times = [f"{1000 * row[key]:.1f}" for key in ("foretold", "measured")]
        table.add_row(row["grid"], *times, f"[{colour}]{ratio:.2f}", f"{row['load']:.1f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=SHEETS, default="a100", help="data sheet of the table")
    parser.add_argument("--efficiency", type=float, default=0.5, help="share of the data sheet's rates that is reached")
    parser.add_argument("--check", action="store_true", help="compare with real runs on this machine")
    parser.add_argument("--real", action="store_true", help="with --check: real work whatever the load is")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    arguments = parser.parse_args()
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=150)
    if arguments.check:
        real = arguments.real or os.getloadavg()[0] < 0.7
        rows = check_rows(console, real)
        print_checks(console, rows, real)
    else:
        machine = assumed(arguments.gpu, arguments.efficiency)
        rows = paper_rows(machine, SHEETS[arguments.gpu].flops)
        title = f"assumed: {arguments.gpu.upper()} at {arguments.efficiency:.0%} of its data sheet, 2,048 tokens, bf16"
        print_paper(console, rows, title)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
