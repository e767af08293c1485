"""Out of memory: one line with what was foretold and the first setting to change."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.config.schema import CalibrateConfig, EvaluateConfig, GenerateConfig, ProbeConfig
from ee_scale.errors import OutOfMemoryError
from ee_scale.families.sizes import shape_of
from ee_scale.grid import launch_info
from ee_scale.planning.estimates import Plan
from ee_scale.planning.fits import bytes_text, changes, device_type, is_bf16, room_of

# What says the same without being torch's own error: of a CPU, of libraries that find nothing left, of the driver.
WORDS = ("can't allocate memory", "_ALLOC_FAILED", "CUDA error: out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device, or the machine, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS)


@contextmanager
def told_when_full(advice: Callable[[], str]) -> Iterator[None]:
    """Raises `OutOfMemoryError` where memory runs out inside; `advice`: what was foretold, and what to change."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        launched = launch_info()
        who = f"rank {launched.rank}: " if launched is not None and launched.world_size > 1 else ""
        raise OutOfMemoryError(f"{who}out of memory ({_what(error)}); {advice()}") from error


def _what(error: BaseException) -> str:
    """What could not be had: the sentences of torch on sizes, without its C++ and its advice."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else "no word on how much"
    line = re.sub(r"^\[enforce fail at [^]]*\] *(\. *)?(\w+: )?", "", line)
    return line.split(" Of the allocated memory")[0].rstrip(". ")[:400]


def training_advice(plan: Plan, stage: int) -> str:
    """For a rank of this stage; of the changes that need less, one that takes no more ranks comes first."""
    bf16, kind, room = is_bf16(plan.config), device_type(plan.config), room_of(plan.config)
    memory = plan.memory(bf16=bf16, device=kind)
    most = max(rank.total for rank in memory)
    line = f"foretold were {bytes_text(memory[stage].total)} for a rank of stage {stage}"
    if room is not None:
        line += f", and {room.name} {bytes_text(room.limit)}"
    found = []
    for change, other in changes(plan):
        needed = max(rank.total for rank in other.memory(bf16=bf16, device=kind))
        if needed < most:
            found.append((other.layout.world_size, change, needed))
    if not found:
        return f"{line}; no small change of the grid or the batch needs less"
    _, change, needed = min(found, key=lambda one: one[0])
    return f"{line}; {change} would need {bytes_text(needed)}"


def model_advice(weights: float, change: str, *more: str) -> str:
    """For a model of this many bytes that only runs; `more`: what else was foretold."""
    told = ", ".join([f"{bytes_text(weights)} of weights", *more])
    return f"foretold were {told}, and what a pass needs; {change} needs less"


def reading_advice(config: EvaluateConfig | CalibrateConfig | ProbeConfig) -> str:
    """For a command that reads text with a model."""
    if isinstance(config, ProbeConfig):
        change = f"new_tokens={max(1, config.new_tokens // 2)}"
    elif config.batch_size > 1:
        change = f"batch_size={config.batch_size // 2}"
    else:
        change = f"seq_length={max(1, config.seq_length // 2)}"
    return model_advice(_stored(ModelFolder.named(config.model)), change)


def decoding_advice(config: GenerateConfig, folder: ModelFolder, longest: int) -> str:
    """For a rank of a `generate` command whose longest prompt has `longest` tokens."""
    parallel, shape, dtype = config.parallel, shape_of(folder.config), getattr(folder.config, "dtype", None)
    stored = (dtype or torch.float32).itemsize
    size = {"fp32": 4, "bf16": 2, "fp16": 2}.get(config.dtype, stored)
    ranks, tokens = parallel.tp * parallel.pp, longest + config.max_new_tokens
    numbers = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * config.batch_size * tokens
    cache = f"{bytes_text(numbers * size / ranks)} of cache for {config.batch_size} x {tokens} tokens"
    if config.batch_size > 1:
        change = f"batch_size={config.batch_size // 2}"
    else:
        change = "dtype=bf16" if size == 4 else f"parallel.tp={2 * parallel.tp}"
    return model_advice(_stored(folder) * size / stored / ranks, change, cache)


def _stored(folder: ModelFolder) -> int:
    """Bytes of the weights on disk, with those of exits."""
    return sum(path.stat().st_size for path in folder.weight_files)
