"""`ee-scale check <command>`: what a run would be, said before any process starts, and refused if it cannot fit."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ee_scale.cli import supernet
from ee_scale.cli.console import console
from ee_scale.config.compose import with_value
from ee_scale.config.schema import VERBS, TrainingConfig
from ee_scale.errors import UserError
from ee_scale.training import tune
from ee_scale.training.cost import draws_per_micro_batch, flops_per_token
from ee_scale.training.memory import Parameters, rank_memory, supernet_parameters, tune_parameters
from ee_scale.training.plan import TunePlan, plan_tune, uses_bf16
from ee_scale.training.supernet_plan import SupernetPlan, plan_supernet
from ee_scale.training.traffic import step_traffic

GIB = 2**30
Plan = TunePlan | SupernetPlan
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "overhead")


def run(verb: str, config: TrainingConfig, overrides: Sequence[str]) -> int:
    """Print the plan. Raises `UserError` if a rank needs more memory than its device has."""
    plan, terminal = (tune if verb == "tune" else supernet).make_plan(config), console()
    print_settings(terminal, verb, config)
    print_stages(terminal, plan, config)
    print_traffic(terminal, plan, config)
    print_summary(terminal, plan, config)
    check_fits(plan, config)
    return 0


# -- fits --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Room:
    """Bytes that ranks may use: each its own device's, or all of a machine one memory together."""

    limit: float
    shared: bool

    @property
    def name(self) -> str:
        return "this machine has" if self.shared else "the device has"


def device_type(config: TrainingConfig) -> str:
    """'cuda' or 'cpu', without asking for a GPU that a login node does not have."""
    name = config.parallel.device
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def is_bf16(config: TrainingConfig) -> bool:
    """Whether the run trains in bf16."""
    return uses_bf16(config.train.precision, torch.device(device_type(config)))


def room_of(config: TrainingConfig) -> Room | None:
    """What there is; None for a GPU that is not here and of which nothing was said."""
    if (given := config.parallel.device_memory_gb) is not None:
        return Room(given * GIB, False)
    if device_type(config) == "cpu":
        return Room(float(psutil.virtual_memory().available), True)
    if torch.cuda.is_available():
        return Room(float(torch.cuda.get_device_properties(0).total_memory), False)
    return None


def needs(plan: Plan, config: TrainingConfig, room: Room) -> tuple[float, int]:
    """(bytes, stage): of the rank that needs most; where memory is shared, of the machine's ranks together."""
    memory = [rank.total for rank in rank_memory(plan, config, bf16=is_bf16(config), device=device_type(config))]
    worst = max(range(len(memory)), key=memory.__getitem__)
    if not room.shared:
        return memory[worst], worst
    world = plan.layout.world_size
    each = config.launcher.processes_per_node or -(-world // config.launcher.nodes)
    ranks = [memory[plan.layout.coordinates(rank)[0]] for rank in range(world)]
    return max(sum(ranks[first : first + each]) for first in range(0, world, each)), worst


def check_fits(plan: Plan, config: TrainingConfig) -> None:
    """Raises `UserError`, with a change of the config that helps, if a rank needs more than there is."""
    room = room_of(config)
    if room is None:
        return
    wanted, stage = needs(plan, config, room)
    if wanted <= room.limit:
        return
    who = "the ranks of one machine need" if room.shared else f"a rank of stage {stage} needs"
    line = f"{who} {_bytes(wanted)} and {room.name} {_bytes(room.limit)}"
    tried = []
    for change, other_plan, other in changes(plan, config):
        found = needs(other_plan, other, room)[0]
        if found <= room.limit:
            raise UserError(f"{line}: {change} would need {_bytes(found)}")
        tried.append((found, change))
    least = f"the best, {min(tried)[1]}, would need {_bytes(min(tried)[0])}" if tried else "none can be made"
    raise UserError(f"{line}; no small change of the grid or the batch is enough ({least})")


def changes(plan: Plan, config: TrainingConfig) -> Iterator[tuple[str, Plan, TrainingConfig]]:
    """(the change in words, plan, config) of what may help, the same model and exits, the mildest first."""
    parallel, train = config.parallel, config.train
    single: list[dict[str, Any]] = [{"parallel.tp": parallel.tp * 2}, {"parallel.pp": parallel.pp * 2}]
    if isinstance(plan, TunePlan) and plan.backbone.mode != "frozen":
        single.append({"backbone.activation_checkpointing": True})
    single.append({"train.micro_batch_size": train.micro_batch_size // 2})
    both = {"parallel.tp": parallel.tp * 2, "parallel.pp": parallel.pp * 2}
    more = [{"parallel.tp": parallel.tp * 4}, {"parallel.pp": parallel.pp * 4}, both]
    more += [{"parallel.tp": parallel.tp * 4, "parallel.pp": parallel.pp * n} for n in (2, 4)]
    for change in [*single, *more]:
        other = config
        for key, value in change.items():
            other = with_value(other, key, value)
        if other == config:
            continue
        try:
            yield " ".join(f"{key}={_text(value)}" for key, value in change.items()), _plan_again(plan, other), other
        except UserError:  # does not divide the heads, the batch, the layers
            continue


def _plan_again(plan: Plan, config: TrainingConfig) -> Plan:
    if isinstance(plan, TunePlan):
        return plan_tune(config, plan.model_dir, plan.model_config)
    return plan_supernet(config, plan.model_dir, plan.map.config, plan.labels)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# -- tables ------------------------------------------------------------------------------------------------------------


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


def parameters_of(plan: Plan, config: TrainingConfig, stage: int) -> Parameters:
    """Of one rank; of a supernet: in its last recipe stage."""
    if isinstance(plan, TunePlan):
        return tune_parameters(plan, config, stage)
    return supernet_parameters(plan, len(plan.recipe.stages) - 1, stage)


def print_stages(terminal: Console, plan: Plan, config: TrainingConfig) -> None:
    """Layers, exits, parameters and memory of each stage."""
    bf16, kind = is_bf16(config), device_type(config)
    memory = rank_memory(plan, config, bf16=bf16, device=kind)
    flops = flops_per_token(plan, config)
    unit, scale = ("GiB", GIB) if max(rank.total - rank.overhead for rank in memory) > GIB else ("MiB", 2**20)
    title = f"stages; memory of one rank in {unit} ({'bf16' if bf16 else 'fp32'}, {kind})"
    table = Table(title=title, title_justify="left")
    for column in ("stage", "layers", "exits", "held", "trained", *PARTS, "rank", "FLOPs"):
        table.add_column(column.replace("overhead", "process"), justify="right", no_wrap=column == "exits")
    for stage, rank in enumerate(memory):
        layers, parameters = plan.stages.layers(stage), parameters_of(plan, config, stage)
        exits = ", ".join(map(str, plan.stages.exits(stage))) if isinstance(plan, TunePlan) else ""
        numbers = [f"{getattr(rank, part) / scale:.2f}" for part in PARTS]
        row = [str(stage), f"{layers.start + 1}-{layers.stop}", exits]
        row += [_count(parameters.held), _count(parameters.trained), *numbers]
        table.add_row(*row, Text(f"{rank.total / scale:.2f}", style="bold"), f"{flops[stage] / sum(flops):.0%}")
    for stage in range(plan.stages.launched, len(plan.stages.bounds) - 1):
        first, last = plan.stages.bounds[stage] + 1, plan.stages.bounds[stage + 1]
        table.add_row(str(stage), f"{first}-{last}", "not launched")
    terminal.print(table)


def print_traffic(terminal: Console, plan: Plan, config: TrainingConfig) -> None:
    """What one rank of each stage sends in a step."""
    table = Table(title="what one rank sends per step", title_justify="left")
    for column in (
        "stage",
        "to stages",
        "tensor all-reduce",
        "calls",
        "gradients to replicas",
        "parameters to replicas",
    ):
        table.add_column(column, justify="right")
    for stage, traffic in enumerate(step_traffic(plan, config, bf16=is_bf16(config))):
        sent = [_bytes(value) for value in (traffic.stages, traffic.tensor, traffic.reduce, traffic.gather)]
        table.add_row(str(stage), sent[0], sent[1], str(traffic.tensor_calls), *sent[2:])
    terminal.print(table)


def print_summary(terminal: Console, plan: Plan, config: TrainingConfig) -> None:
    """The grid, the batch, the work of a step, the bubble and the room there is."""
    layout, train, room = plan.layout, config.train, room_of(config)
    tokens = train.global_batch_size * config.data.seq_length
    steps = config.train.steps if isinstance(plan, TunePlan) else plan.recipe.total_steps
    flops = sum(flops_per_token(plan, config)) * tokens
    share, why = bubble(plan, config)
    rows = {
        "ranks": f"{layout.world_size} = tp {layout.tp} x pp {layout.pp} x dp {layout.dp}",
        "micro-batches": f"{plan.num_micro_batches} per step and rank, of {train.micro_batch_size} sequences",
        "tokens": f"{tokens:,} per step, {tokens * steps:,} in {steps:,} steps",
        "FLOPs": f"{flops:.3g} per step, {flops * steps:.3g} in all",
        "bubble": f"{share:.1%} ({why})",
        "memory": "of the device unknown here: give parallel.device_memory_gb"
        if room is None
        else f"{room.name} {_bytes(room.limit)}{', shared by its ranks' if room.shared else ''}",
    }
    table = Table(box=None, show_header=False)
    for name, text in rows.items():
        table.add_row(name, text)
    terminal.print(table)


def bubble(plan: Plan, config: TrainingConfig) -> tuple[float, str]:
    """(share of a step in which an evenly loaded stage waits, the formula)."""
    p, m = plan.layout.pp, plan.num_micro_batches
    if p == 1:
        return 0.0, "one stage"
    if isinstance(plan, TunePlan) and plan.backbone.mode == "frozen":
        if config.exits.kl_weight == 0:
            return 0.0, "nothing flows backwards: stages run ahead into the next step"
        return (p - 1) / (m + p - 1), "(p-1)/(m+p-1): exits wait for the final layer"
    if isinstance(plan, SupernetPlan):
        m *= draws_per_micro_batch(plan, len(plan.recipe.stages) - 1)
    return (p - 1) / (m + p - 1), f"(p-1)/(m+p-1), p={p}, m={m} forward-backward pairs"


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)


def _bytes(number: float) -> str:
    for size, unit in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} B" if number else ""
