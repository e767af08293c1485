"""`ee-scale check <command>`: what a run would be, said before any process starts, and refused if it cannot fit."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ee_scale.cli.console import console
from ee_scale.config.schema import VERBS, TrainingConfig
from ee_scale.gpu import check_training, gpu_facts
from ee_scale.log import titled_table
from ee_scale.planning.estimates import Plan
from ee_scale.planning.fits import GIB, bytes_text, check_fits, device_type, is_bf16, room_of
from ee_scale.training.recipe import recipe_of

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "overhead")


def run(verb: str, config: TrainingConfig, overrides: Sequence[str]) -> int:
    """Print the plan. Raises `UserError` for GPUs that cannot run it, and if a rank needs more memory than there is."""
    plan, terminal = recipe_of(verb).of(config).plan, console()
    print_settings(terminal, verb, config)
    print_stages(terminal, plan)
    print_traffic(terminal, plan)
    print_summary(terminal, plan)
    if device_type(config) == "cuda" and torch.cuda.is_available():
        check_training(bf16=is_bf16(config))
    check_fits(plan)
    return 0


def print_settings(terminal: Console, verb: str, config: TrainingConfig) -> None:
    """The settings that differ from their defaults; all of them: `ee-scale <command> ... --cfg`."""
    terminal.print(f"[bold]{verb}[/], settings that are not the default (--cfg shows all):", markup=True)
    table = Table(box=None, show_header=False)
    table.add_column("setting")
    table.add_column("value", overflow="fold")
    standard = dict(_flat(asdict(VERBS[verb]())))
    for key, value in _flat(asdict(config)):
        if standard.get(key) != value:
            table.add_row(key, str(value))
    terminal.print(table)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def print_stages(terminal: Console, plan: Plan) -> None:
    """Layers, exits, parameters and memory of each stage."""
    bf16, kind = is_bf16(plan.config), device_type(plan.config)
    memory = plan.memory(bf16=bf16, device=kind)
    flops = [work.total for work in plan.work()]
    unit, scale = ("GiB", GIB) if max(rank.total - rank.overhead for rank in memory) > GIB else ("MiB", 2**20)
    title = f"stages; memory of one rank in {unit} ({'bf16' if bf16 else 'fp32'}, {kind})"
    table = Table(title=title, title_justify="left")
    experts = any(plan.parameters(stage).idle for stage in range(len(memory)))
    active = ["active"] * experts
    for column in ("stage", "layers", "exits", "held", *active, "trained", *PARTS, "rank", "FLOPs"):
        table.add_column(column.replace("overhead", "process"), justify="right", no_wrap=column == "exits")
    for stage, rank in enumerate(memory):
        layers, parameters = plan.stages.layers(stage), plan.parameters(stage)
        exits = ", ".join(map(str, plan.exits(stage)))
        numbers = [f"{getattr(rank, part) / scale:.2f}" for part in PARTS]
        row = [str(stage), f"{layers.start + 1}-{layers.stop}", exits]
        row += [_count(parameters.held), *[_count(parameters.active)] * experts, _count(parameters.trained), *numbers]
        table.add_row(*row, Text(f"{rank.total / scale:.2f}", style="bold"), f"{flops[stage] / sum(flops):.0%}")
    for stage in range(plan.stages.launched, len(plan.stages.bounds) - 1):
        first, last = plan.stages.bounds[stage] + 1, plan.stages.bounds[stage + 1]
        table.add_row(str(stage), f"{first}-{last}", "not launched")
    terminal.print(table)


def print_traffic(terminal: Console, plan: Plan) -> None:
    """What one rank of each stage sends in a step."""
    columns = ("to stages", "in tensor groups", "calls", "gradients to replicas", "parameters to replicas")
    table = titled_table("what one rank sends per step", ("stage", *columns))
    for stage, traffic in enumerate(plan.traffic(bf16=is_bf16(plan.config))):
        sent = [bytes_text(value) for value in (traffic.stages, traffic.tensor, traffic.reduce, traffic.gather)]
        table.add_row(str(stage), sent[0], sent[1], str(traffic.tensor_calls), *sent[2:])
    terminal.print(table)


def print_summary(terminal: Console, plan: Plan) -> None:
    """The grid, the batch, the work of a step, the bubble and the room there is."""
    layout, config = plan.layout, plan.config
    train, room = config.train, room_of(config)
    tokens = train.global_batch_size * config.data.seq_length
    steps, flops = plan.total_steps, plan.flops_per_token * tokens
    share, why = plan.bubble()
    rows = {
        "ranks": f"{layout.world_size} = tp {layout.tp} x pp {layout.pp} x dp {layout.dp}",
        "micro-batches": f"{plan.num_micro_batches} per step and rank, of {train.micro_batch_size} sequences",
        "tokens": f"{tokens:,} per step, {tokens * steps:,} in {steps:,} steps",
        "FLOPs": f"{flops:.3g} per step, {flops * steps:.3g} in all",
        "bubble": f"{share:.1%} ({why})",
        "memory": "of the device unknown here: give parallel.device_memory_gb"
        if room is None
        else f"{room.name} {bytes_text(room.limit)}{', shared by its ranks' if room.shared else ''}",
        **(gpu_facts() if device_type(config) == "cuda" else {}),
        **plan.notes(),
    }
    table = Table(box=None, show_header=False)
    for name, text in rows.items():
        table.add_row(name, text)
    terminal.print(table)


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)
