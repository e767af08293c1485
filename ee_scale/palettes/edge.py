"""What a plain Hugging Face folder costs on the machine that runs it: size, work, time, memory, energy.

`python -m ee_scale.palettes.edge <request as JSON>` measures in its own process and prints JSON; `measure_edge`
starts it. The model is transformers' own: nothing of ours touches it.
"""

import ctypes
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ee_scale.backbone.loading import weight_bytes
from ee_scale.errors import UserError
from ee_scale.families.build import AUTO_CLASS
from ee_scale.families.sizes import max_length, with_layers
from ee_scale.modeling.attention import without_cudnn
from ee_scale.modeling.versions import CACHE
from ee_scale.palettes.energy import EnergyMeter, find_meter
from ee_scale.reading import checked

MIN_ROUNDS = 5
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class EdgeMeasure:
    """One model on one machine. MB are 10^6 bytes.

    Attributes:
        parameters: numbers in the model, shared matrices once.
        weights_mb: safetensors on disk.
        prefill_ms, prefill_p90_ms: median and 90th percentile of that forward, batch 1; a decoder fills its cache.
        token_ms: median of a greedily decoded token behind those; None for encoders.
        memory_mb: what the model adds to the process, from before its weights are loaded to the end, at its highest.
            CPU: resident memory, with the parts of mapped weight files that were read. CUDA: torch's memory.
        joules_per_token: energy of the timed runs per token that was read or decoded, or None; `energy` says of what,
            or why not.
        threads: of torch.
        verify_ms: (rows, median) of a forward over several tokens behind those, as verifying drafts takes it.
    """

    parameters: int
    weights_mb: float
    prefill_ms: float
    prefill_p90_ms: float
    token_ms: float | None
    memory_mb: float
    joules_per_token: float | None
    energy: str
    tokens: int
    device: str
    threads: int
    verify_ms: list[tuple[int, float]] = field(default_factory=list)


def measure_edge(
    folder: Path,
    task: str,
    *,
    tokens: int = 128,
    new_tokens: int = 32,
    seconds: float = 3.0,
    device: str = "cpu",
    threads: int | None = None,
    verify: Sequence[int] = (),
) -> EdgeMeasure:
    """Measure the model of `folder` in a process of its own, for about `seconds` after loading.

    task: 'causal_lm' or 'classify'; device: 'cpu' or 'cuda'; verify: rows of further forwards, timed for as long again.
    Raises `UserError` with the last line of the process if it fails, `torch.OutOfMemoryError` if it found no memory
    left.
    """
    request = {"folder": str(folder), "task": task, "tokens": tokens, "new_tokens": new_tokens}
    request |= {"seconds": seconds, "device": device, "threads": threads, "verify": list(verify)}
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", __name__, json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        if lines[-1].startswith("torch.OutOfMemoryError"):
            raise torch.OutOfMemoryError(f"{folder}: {lines[-1].partition(': ')[2]}")
        raise UserError(f"{folder}: cannot be measured ({lines[-1].removeprefix('ee_scale.errors.UserError: ')})")
    return checked(EdgeMeasure, json.loads(done.stdout.splitlines()[-1]), folder)


def time_forward(call: Callable[[], Any], seconds: float) -> float:
    """Median milliseconds of `call` in this process, after a warm-up: for tables of what parts of a model cost."""
    _timed(call)
    times, begun = [], time.perf_counter()
    while len(times) < MIN_ROUNDS or time.perf_counter() - begun < seconds:
        times.append(_timed(call)[0])
    return 1e3 * median(times)


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result) of a call, with whatever it started on a GPU."""
    _finish()
    start = time.perf_counter()
    result = call()
    _finish()
    return time.perf_counter() - start, result


def _finish() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


# -- in the process that measures --------------------------------------------------------------------------------------


@dataclass
class Timings:
    """Seconds of every forward over the prompt and of every decoded token."""

    prefill: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)


@torch.no_grad()
def _measure(
    folder: str,
    task: str,
    tokens: int,
    new_tokens: int,
    seconds: float,
    device: str,
    threads: int | None,
    verify: Sequence[int] = (),
) -> EdgeMeasure:
    if threads is not None:
        torch.set_num_threads(threads)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    _check_length(config, tokens + max(new_tokens if task == "causal_lm" else 0, sum(verify)))
    steps = new_tokens if task == "causal_lm" else 0
    ids = torch.randint(config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    _warm_up(config, task, ids, steps)
    memory = PeakMemory(device)
    # Number types as stored: what the folder is, not what it could be.
    opened = AUTO_CLASS[task].from_pretrained(folder, dtype="auto", trust_remote_code=False)
    model = opened.to(device).eval()
    meter, energy = find_meter(device)
    timings, joules = _run(model, ids, steps, seconds, meter)
    read = len(timings.prefill) * tokens + len(timings.token)
    return EdgeMeasure(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weights_mb=weight_bytes(Path(folder)) / 1e6,
        prefill_ms=1e3 * median(timings.prefill),
        prefill_p90_ms=1e3 * sorted(timings.prefill)[math.ceil(0.9 * len(timings.prefill)) - 1],
        token_ms=1e3 * median(timings.token) if timings.token else None,
        memory_mb=memory.grown() / 1e6,
        joules_per_token=None if joules is None else joules / read,
        energy=energy,
        tokens=tokens,
        device=device,
        threads=torch.get_num_threads(),
        verify_ms=_verify(model, ids, verify, seconds) if verify else [],
    )


def _check_length(config: PreTrainedConfig, length: int) -> None:
    most = max_length(config) if hasattr(config, "max_position_embeddings") else None
    if most is not None and length > most:
        raise UserError(f"tokens: {length} with the decoded ones, but the model reads at most {most}")


def _warm_up(config: PreTrainedConfig, task: str, ids: torch.Tensor, steps: int) -> None:
    """Run one layer of zeros: code, and buffers of libraries, that the first model brings in are no memory of it."""
    with torch.device("meta"):
        model = AUTO_CLASS[task].from_config(with_layers(config, range(1))).eval()
    model.to_empty(device=ids.device)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.zero_()
    _round(model, ids, min(steps, 2), Timings())


@without_cudnn()
def _run(
    model: PreTrainedModel, ids: torch.Tensor, steps: int, seconds: float, meter: EnergyMeter | None
) -> tuple[Timings, float | None]:
    """Rounds of a prompt and `steps` greedy tokens behind it; the first round is a warm-up. (times, joules)."""
    _round(model, ids, steps, Timings())
    timings, begun = Timings(), time.perf_counter()
    before = meter.read() if meter else None
    while len(timings.prefill) < MIN_ROUNDS or time.perf_counter() - begun < seconds:
        _round(model, ids, steps, timings)
    return timings, meter.joules(before, meter.read()) if meter else None


def _round(model: PreTrainedModel, ids: torch.Tensor, steps: int, timings: Timings) -> None:
    if not steps:
        timings.prefill.append(_timed(lambda: model(ids))[0])
        return
    spent, output = _timed(lambda: model(ids, use_cache=True))
    timings.prefill.append(spent)
    for _ in range(steps):
        spent, output = _timed(partial(_next_token, model, output))
        timings.token.append(spent)


def _next_token(model: PreTrainedModel, last: ModelOutput) -> ModelOutput:
    """One greedy step: the token of `last`'s logits goes through the model behind `last`'s cache."""
    token = last.logits[:, -1:].argmax(-1)
    return model(token, use_cache=True, **{CACHE: last[CACHE]})


@without_cudnn()
def _verify(model: PreTrainedModel, ids: torch.Tensor, rows: Sequence[int], seconds: float) -> list[tuple[int, float]]:
    """(rows, median milliseconds) of forwards over so many tokens, one behind another after the prompt."""
    times: dict[int, list[float]] = {count: [] for count in rows}
    rounds, begun = -1, time.perf_counter()  # the first round is a warm-up
    while rounds < MIN_ROUNDS or time.perf_counter() - begun < seconds:
        output = model(ids, use_cache=True)
        for count in rows:
            spent, output = _timed(partial(_read, model, output, count))
            if rounds >= 0:
                times[count].append(spent)
        rounds += 1
    return [(count, 1e3 * median(spent)) for count, spent in times.items()]


def _read(model: PreTrainedModel, last: ModelOutput, count: int) -> ModelOutput:
    """`count` tokens behind `last`'s cache, and the choice of each of their positions."""
    tokens = last.logits[:, -1:].argmax(-1).expand(-1, count)
    output = model(tokens, use_cache=True, **{CACHE: last[CACHE]})
    output.logits.argmax(-1)
    return output


class PeakMemory:
    """Growth of a device's memory since now, at its highest.

    CPU: peak resident memory (VmHWM, which Linux resets on request) over what is resident now. Where it cannot be
    reset the peak of the whole life of the process stands in, which is at least as high. CUDA: torch's allocator.
    """

    def __init__(self, device: str):
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return
        with suppress(OSError, AttributeError):  # what was freed goes back first, or the model would hide in it
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):
            CLEAR_REFS.write_text("5")
        self.start = psutil.Process().memory_info().rss

    def grown(self) -> int:
        """Bytes."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() - self.start
        if STATUS.is_file():
            values = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
            return 1024 * int(values["VmHWM"].split()[0]) - self.start
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.start


def main() -> None:
    """Measure as asked by the only argument, and print the answer as the last line."""
    sys.stdout.write(json.dumps(asdict(_measure(**json.loads(sys.argv[1])))) + "\n")


if __name__ == "__main__":
    main()
