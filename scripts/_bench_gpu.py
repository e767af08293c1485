"""The measurements of `bench_gpu.py`, each run in a process of its own."""

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _bench import seconds, synchronize
from _bench_models import llama, write_exits, write_model
from _profile import profile
from bench_decode import parse_arguments, run_tables
from rich.console import Console
from transformers import logging

from ee_scale.config.compose import compose_config
from ee_scale.gpu import gpu_facts
from ee_scale.grid import join_grid, pick_device
from ee_scale.planning.fits import is_bf16
from ee_scale.training.meter import sheet_tflops
from ee_scale.training.tune import Tune, start_run

GIB = 2**30
WARM_UP, STEPS = 2, 5
DECODED_EXITS = (4, 8)


def measure_machine(device: str, small: bool) -> dict[str, Any]:
    """What ran it, and two rates that everything else is held against: FLOP/s of matrices, bytes/s of memory."""
    where = pick_device(device)
    gpu, size = where.type == "cuda", 256 if small else 8192
    found: dict[str, Any] = {"torch": torch.__version__, "facts": gpu_facts() if gpu else {}}
    found["device"] = torch.cuda.get_device_name() if gpu else "cpu"
    found["flops"] = {name: _matrix_rate(getattr(torch, name), size, where) for name in ("bfloat16", "float32")}
    found["bytes_per_second"] = _copy_rate(2**22 if small else 2**30, where)
    if gpu:
        found["sheet_tflops"] = sheet_tflops(found["device"])
        backends = ("cudnn", "flash", "mem_efficient", "math")
        found["attention"] = {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in backends}
    return found


def _matrix_rate(dtype: torch.dtype, size: int, device: torch.device) -> float:
    """FLOP/s of the best of some products of square matrices."""
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(seconds(lambda: matrix @ matrix, device) for _ in range(10))


def _copy_rate(size: int, device: torch.device) -> float:
    """Bytes that are read and written per second when memory is copied."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(seconds(lambda: target.copy_(source), device) for _ in range(10))


def write_models(folder: str, device: str, shape: dict[str, int], agreement: float) -> dict[str, Any]:
    """`plain`, to be tuned, and `exits`, to decode with."""
    where = pick_device(device)
    config = llama(**shape)
    start = time.perf_counter()
    write_model(Path(folder, "plain"), config, str(where), torch.bfloat16 if where.type == "cuda" else torch.float32)
    agreed = write_exits(Path(folder, "exits"), Path(folder, "plain"), DECODED_EXITS, agreement, str(where))
    return {"seconds": time.perf_counter() - start, "agreement": agreed}


def measure_tune(folder: str, arguments: list[str], profiles: bool) -> dict[str, Any]:
    """Steps of `ee-scale tune` on random tokens, with stage and engine as the command builds them."""
    logging.set_verbosity_error()
    config = compose_config("tune", [f"model={folder}", *arguments])
    plan, where = Tune.of(config).plan, pick_device(config.parallel.device)
    (foretold,) = plan.memory(bf16=is_bf16(config), device=where.type)
    run = start_run(plan, join_grid(plan.layout, where, 5.0))
    batches = _random_tokens(config.train.micro_batch_size, config.data.seq_length, plan.shape.vocab_size)
    run.engine.set_lr(1e-5)
    times = [seconds(lambda: run.engine.train_step(batches), where) for _ in range(WARM_UP + STEPS)]
    step, tokens = sorted(times[WARM_UP:])[STEPS // 2], config.train.global_batch_size * config.data.seq_length
    found: dict[str, Any] = {
        "first_step": times[0],
        "step": step,
        "tokens_per_second": tokens / step,
        "flops": tokens * plan.flops_per_token,
        "dtype": "bfloat16" if is_bf16(config) else "float32",
        "trained": plan.parameters(0).trained,
        "foretold_gib": (foretold.total - foretold.overhead) / GIB,
        **_gpu_memory(where),
    }
    if profiles:
        found["profile"] = asdict(profile(lambda: run.engine.train_step(batches), where))
    return found


def _gpu_memory(device: torch.device) -> dict[str, float]:
    """What torch held at most, what it keeps, and what CUDA's context and NCCL hold beside it."""
    if device.type != "cuda":
        return {}
    synchronize(device)
    free, total = torch.cuda.mem_get_info()
    return {
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "context_gib": (total - free - torch.cuda.memory_reserved()) / GIB,
    }


def _random_tokens(rows: int, length: int, vocab: int) -> Iterator[dict[str, torch.Tensor]]:
    mask = torch.ones(rows, length)
    while True:
        tokens = torch.randint(0, vocab, (rows, length + 1))
        yield {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous(), "loss_mask": mask}


def measure_decode(folder: str, words: list[str]) -> dict[str, Any]:
    """The tables of `bench_decode.py` for a model that lies there already."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    arguments: argparse.Namespace = parse_arguments(words)
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {"seconds": {}, "tables": {}}
    for _ in run_tables(arguments, folder, Console(width=170), result):
        pass
    return result
