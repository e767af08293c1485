"""Whether a plan fits into the memory that there is, and which change of its config would."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from ee_scale.config.compose import with_value
from ee_scale.config.schema import TrainingConfig
from ee_scale.errors import UserError
from ee_scale.planning.estimates import Plan, uses_bf16

GIB = 2**30


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


def needs(plan: Plan, room: Room) -> tuple[float, int]:
    """(bytes, stage): of the rank that needs most; where memory is shared, of the machine's ranks together."""
    config = plan.config
    memory = [rank.total for rank in plan.memory(bf16=is_bf16(config), device=device_type(config))]
    worst = max(range(len(memory)), key=memory.__getitem__)
    if not room.shared:
        return memory[worst], worst
    world = plan.layout.world_size
    each = config.launcher.processes_per_node or -(-world // config.launcher.nodes)
    ranks = [memory[plan.layout.coordinates(rank)[0]] for rank in range(world)]
    return max(sum(ranks[first : first + each]) for first in range(0, world, each)), worst


def check_fits(plan: Plan) -> None:
    """Raises `UserError`, with a change of the config that helps, if a rank needs more than there is."""
    room = room_of(plan.config)
    if room is None:
        return
    wanted, stage = needs(plan, room)
    if wanted <= room.limit:
        return
    who = "the ranks of one machine need" if room.shared else f"a rank of stage {stage} needs"
    line = f"{who} {bytes_text(wanted)} and {room.name} {bytes_text(room.limit)}"
    tried = []
    for change, other in changes(plan):
        found = needs(other, room)[0]
        if found <= room.limit:
            raise UserError(f"{line}: {change} would need {bytes_text(found)}")
        tried.append((found, change))
    least = f"the best, {min(tried)[1]}, would need {bytes_text(min(tried)[0])}" if tried else "none can be made"
    raise UserError(f"{line}; no small change of the grid or the batch is enough ({least})")


def changes(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """(the change in words, plan) of what may help, the same model and exits, the mildest first."""
    config, parallel, train = plan.config, plan.config.parallel, plan.config.train
    single: list[dict[str, Any]] = [{"parallel.tp": parallel.tp * 2}, {"parallel.pp": parallel.pp * 2}]
    single += [{key: value} for key, value in plan.reliefs().items()]
    if train.micro_batch_size > 1:
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
            yield " ".join(f"{key}={_text(value)}" for key, value in change.items()), plan.with_config(other)
        except UserError:  # does not divide the heads, the batch, the layers
            continue


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def bytes_text(number: float) -> str:
    for size, unit in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} B" if number else ""
