"""The number type to generate in, where nobody named one."""

import time
from collections.abc import Sequence
from contextlib import ExitStack

import psutil
import torch
from torch import nn
from transformers import PreTrainedConfig

from ee_scale.families.sizes import shape_of
from ee_scale.log import log
from ee_scale.modeling.packing import packed_linears

READ = 1 << 28  # bytes of fp32 weights that are timed: more than the caches of a processor hold
ROUNDS = 5
FASTER = 1.2  # another type than the stored one must be so much faster


def fastest_dtype(config: PreTrainedConfig, device: torch.device, pack_weights: bool) -> torch.dtype | str:
    """The type of stored weights, or fp32, which holds the same numbers, where a CPU computes one token faster in it.

    'auto' (as stored) where there is nothing to choose, or memory for fp32 is short.
    """
    stored = getattr(config, "dtype", None)
    rows, columns = getattr(config, "intermediate_size", None), getattr(config, "hidden_size", None)
    if device.type != "cpu" or stored not in (torch.bfloat16, torch.float16) or not rows or not columns:
        return "auto"
    shape = shape_of(config)
    weights = sum(map(shape.held, range(shape.num_layers))) + config.vocab_size * columns
    if 4 * weights > psutil.virtual_memory().available / 2:
        return "auto"
    count = min(config.num_hidden_layers, max(1, READ // (4 * rows * columns)))
    seconds = linear_seconds((stored, torch.float32), (rows, columns), count, pack_weights)
    if seconds[stored] < FASTER * seconds[torch.float32]:
        return "auto"
    factor, name = seconds[stored] / seconds[torch.float32], str(stored).removeprefix("torch.")
    log.info(f"dtype=auto: fp32, here {factor:.1f} times as fast as the stored {name}, in twice the memory")
    return torch.float32


def linear_seconds(
    dtypes: Sequence[torch.dtype], size: tuple[int, int], count: int, pack_weights: bool
) -> dict[torch.dtype, float]:
    """Seconds for one row through `count` linear layers of a size (out, in), in turns; of each type its best time."""
    rows, columns = size
    layers = {
        dtype: nn.ModuleList(nn.Linear(columns, rows, bias=False, dtype=dtype) for _ in range(count)).eval()
        for dtype in dtypes
    }
    best = dict.fromkeys(dtypes, float("inf"))
    with torch.inference_mode(), ExitStack() as packed:
        for dtype in dtypes if pack_weights else ():
            packed.enter_context(packed_linears(layers[dtype]))
        for _ in range(ROUNDS):
            for dtype in dtypes:
                one = torch.ones(1, columns, dtype=dtype)
                start = time.perf_counter()
                for layer in layers[dtype]:
                    layer(one)
                best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best
