"""The measurements of `bench_tune.py`, each run in processes of its own."""

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from _bench import MicroBatches, build_engine, dtype_of, exit_loss, load_reference, make_batch, seconds, synchronize
from _children import Job
from deepspeed.runtime.pipe.schedule import ForwardPass, OptimizerStep, ReduceGrads
from torch import nn

from ee_scale.engine.frozen import FrozenPipelineEngine
from ee_scale.engine.schedule import TrainExits
from ee_scale.exits.taps import TapCache, TapShape, tap_name
from ee_scale.grid import Layout, join_grid, pick_device
from ee_scale.modeling.kinds import Tap

# (a) step time


class IdealStep:
    """What no engine can beat: the frozen forward pass to the deepest exit, and the exits' own training, each alone."""

    def __init__(self, job: Job, batch: MicroBatches, taps: list[dict[int, Tap]], device: torch.device):
        model, self.heads = load_reference(job, device)
        self.lm_head, self.base = model.lm_head, model.model
        self.base.layers, self.base.norm = self.base.layers[: max(job.exits)], nn.Identity()
        self.batch, self.taps = batch, taps
        self.optimizer = torch.optim.AdamW(self.heads.parameters(), lr=1e-4)

    @torch.no_grad()
    def forward(self) -> None:
        """The frozen layers."""
        for part in self.batch:
            self.base(part["tokens"], use_cache=False)

    def train(self) -> list[float]:
        """The exits, on what they read, recorded before. Returns the loss of each on the last micro-batch."""
        for part, taps in zip(self.batch, self.taps, strict=True):
            losses = []
            for k, head in self.heads.items():
                loss = exit_loss(head, taps[int(k)], self.lm_head, part["labels"])
                (loss / len(self.batch)).backward()
                losses.append(loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return [loss.item() for loss in losses]


class NaiveStep:
    """The loop that people write first: all layers, all hidden states, one sum of losses, one backward pass.

    Its exits are stacked on the hidden state (same cost). The final logits, which nobody reads, are left out.
    """

    def __init__(self, job: Job, batch: MicroBatches, device: torch.device):
        self.model, self.heads = load_reference(job, device)
        self.batch = batch
        self.optimizer = torch.optim.AdamW(self.heads.parameters(), lr=1e-4)

    def __call__(self) -> None:
        for part in self.batch:
            out = self.model(part["tokens"], output_hidden_states=True, use_cache=False, logits_to_keep=1)
            states = {k: out.hidden_states[int(k)] for k in self.heads}
            losses = [
                exit_loss(head, Tap(states[k], states[k]), self.model.lm_head, part["labels"])
                for k, head in self.heads.items()
            ]
            (torch.stack(losses).sum() / len(self.batch)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure_steps(job: Job) -> dict[str, Any]:
    """Median step times of ours, ideal (two parts) and naive, in interleaved rounds.

    Ratios twice: the median of the rounds' ratios, and between the fastest rounds (for machines that others use too).
    """
    device = pick_device(job.device)
    grid = join_grid(Layout(), device)
    batch = make_batch(job, device)
    engine = build_engine(job, grid)
    ideal = IdealStep(job, batch, [engine.stage(part["tokens"])[1] for part in batch], device)
    naive = NaiveStep(job, batch, device)
    engine.set_lr(0.0)
    ours = [loss[0].item() for loss in engine.train_step(iter(batch)).values()]
    _assert_same_exits(ours, ideal.train())
    engine.set_lr(1e-4)
    contenders = {
        "ours": lambda: engine.train_step(iter(batch)),
        "ideal_forward": ideal.forward,
        "ideal_exits": ideal.train,
        "naive": naive,
    }
    for work in contenders.values():
        work()
    rounds = [{name: seconds(work, device) for name, work in contenders.items()} for _ in range(job.rounds)]
    times = {name: statistics.median(r[name] for r in rounds) for name in contenders}
    best = {name: min(r[name] for r in rounds) for name in contenders}
    ideals = [r["ideal_forward"] + r["ideal_exits"] for r in rounds]
    return {
        "head": job.head,
        "seconds": {**times, "ideal": statistics.median(ideals)},
        "over_ideal": statistics.median(r["ours"] / i for r, i in zip(rounds, ideals, strict=True)),
        "over_naive": statistics.median(r["ours"] / r["naive"] for r in rounds),
        "over_ideal_fastest": best["ours"] / (best["ideal_forward"] + best["ideal_exits"]),
        "over_naive_fastest": best["ours"] / best["naive"],
        "tokens_per_second": job.tokens / times["ours"],
    }


def _assert_same_exits(ours: list[float], ideal: list[float]) -> None:
    # Both start as copies of the backbone; ours is a mean over micro-batches of random tokens.
    for a, b in zip(ours, ideal, strict=True):
        if abs(a - b) > 0.02 * abs(b):
            raise RuntimeError(f"the engine's exits and the plain ones disagree before training: {ours} and {ideal}")


# (b) idle share per stage


class TimedEngine(FrozenPipelineEngine):
    """Keeps the time of each instruction, as (name, start, end)."""

    spans: list[tuple[str, float, float]]

    def _exec_schedule(self, pipe_schedule: Any) -> None:
        self._INSTRUCTION_MAP = {
            kind: _timed(kind.__name__, run) for kind, run in FrozenPipelineEngine._INSTRUCTION_MAP.items()
        }
        super()._exec_schedule(pipe_schedule)


def _timed(name: str, run: Callable[..., None]) -> Callable[..., None]:
    def call(engine: TimedEngine, **kwargs: Any) -> None:
        synchronize(engine.device)
        start = time.perf_counter()
        MethodType(run, engine)(**kwargs)
        synchronize(engine.device)
        engine.spans.append((name, start, time.perf_counter()))

    return call


def _take_at_least(module: nn.Module, wait: float) -> None:
    """A forward pass of `module` lasts `wait` seconds, most of it asleep."""
    forward = module.forward

    def waiting(*args: Any) -> Any:
        end = time.perf_counter() + wait
        out = forward(*args)
        time.sleep(max(0.0, end - time.perf_counter()))
        return out

    module.forward = waiting


def measure_idle(job: Job, rank: int, rendezvous: str, batches: int, warm_up: int) -> dict[str, Any]:
    """One rank of the pipeline: shares of its time, flushed and run-ahead."""
    device = pick_device(job.device, rank)
    grid = join_grid(Layout(pp=job.stages), device, init_method=f"file://{rendezvous}", rank=rank)
    engine = build_engine(job, grid, TimedEngine)
    if job.wait:
        _take_at_least(engine.stage.backbone, job.wait)
    batch = make_batch(job, device)
    shares = {}
    for mode in ("flushed", "run_ahead"):
        engine.flush = mode == "flushed"
        engine.spans = []
        torch.distributed.barrier()
        for _ in range(batches):
            engine.train_step(iter(batch))
        shares[mode] = shares_of(engine.spans, job.micro_batches * warm_up)
        torch.distributed.barrier()
    return {"stage": grid.stage, **shares}


def shares_of(spans: list[tuple[str, float, float]], skip: int) -> dict[str, float]:
    """Shares of the wall time between the forward pass number `skip` and the last batch's first one.

    That is a whole number of batches. compute: forward passes and exits; idle: all the rest; optimizer: the part of
    idle that goes to the reduction over replicas, clipping and AdamW (a wait for other stages would hide there too).
    """
    forwards = [start for name, start, _ in spans if name == ForwardPass.__name__]
    last_step = [end for name, _, end in spans if name == OptimizerStep.__name__][-2]
    begin, end = forwards[skip], next(start for start in forwards if start > last_step)

    def share(*kinds: type) -> float:
        names = {kind.__name__ for kind in kinds}
        return sum(b - a for name, a, b in spans if name in names and begin <= a < end) / (end - begin)

    compute, optimizer = share(ForwardPass, TrainExits), share(ReduceGrads, OptimizerStep)
    return {"compute": compute, "optimizer": optimizer, "idle": 1 - compute, "seconds": end - begin}


# (c) peak memory


def measure_memory(job: Job, naive: bool) -> dict[str, float]:
    """Peak of this process in MiB, and what of it is the heads' own state."""
    device = pick_device(job.device)
    batch = make_batch(job, device)
    if naive:
        step = NaiveStep(job, batch, device)
        step()
        state = 4 * sum(p.nbytes for p in step.heads.parameters())  # with gradient and two moments
        step()
        parameters = sum(p.numel() for p in step.heads.parameters())
    else:
        engine = build_engine(job, join_grid(Layout(), device))
        found = _watch_state(engine)
        for _ in range(3):
            engine.train_step(iter(batch))
        state, parameters = max(found), sum(p.numel() for p in engine.stage.exit_heads.parameters())
    return {
        "exits": len(job.exits),
        "peak": peak_bytes(device) / 2**20,
        "state": state / 2**20,
        "bytes_per_parameter": state / parameters,
    }


def _watch_state(engine: Any) -> list[int]:
    """Before each optimizer step, count what the heads own then: parameters, ZeRO's copies, gradients, moments."""
    found: list[int] = []
    step = engine._exec_optimizer_step

    def counting() -> None:
        storages = [tensor.untyped_storage() for tensor in head_state(engine)]
        found.append(sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()))
        step()

    engine._exec_optimizer_step = counting
    return found


def head_state(engine: Any) -> Iterator[torch.Tensor]:
    """Tensors that exist because the heads exist, where DeepSpeed's two ZeRO-1 optimizers (fp32, bf16) keep them."""
    zero = engine.optimizer
    for parameter in engine.stage.exit_heads.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_groups_gradients_flat"):
        yield from getattr(zero, name, [])
    for gradients in getattr(zero, "averaged_gradients", {}).values():
        yield from gradients or []
    for moments in zero.optimizer.state.values():
        yield from (m for m in moments.values() if torch.is_tensor(m))


def peak_bytes(device: torch.device) -> int:
    """Highest memory of this process so far: allocated on the GPU, or resident (Linux) on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


# (d) kept taps

EPOCH = 6  # optimizer steps


def measure_taps(job: Job, folder: str) -> dict[str, Any]:
    """Seconds of an epoch, medians over rounds of a new cache each: computed, kept (the first one), read."""
    device = pick_device(job.device)
    engine = build_engine(job, join_grid(Layout(), device))
    engine.set_lr(1e-4)
    batch = make_batch(job, device)
    size = job.micro_batches * job.micro_batch
    shape = TapShape(job.sequence, job.hidden, dtype_of(job))
    names = [tap_name(engine.stage.spec, k) for k in job.exits]

    def epoch(cache: TapCache | None) -> None:
        for start in range(0, EPOCH * size, size):
            numbers = torch.arange(start, start + size)
            step = None if cache is None else cache.step(numbers, numbers.view(-1, job.micro_batch))
            engine.train_step(iter(batch), step)

    rows = []
    epoch(None)
    for number in range(job.rounds):
        root = Path(folder, str(number))
        root.mkdir(parents=True)
        cache = TapCache(root, names, shape, torch.zeros(EPOCH * size, dtype=torch.bool))
        row = {"computed": seconds(lambda: epoch(None), device)}
        row["kept"] = seconds(lambda: epoch(cache), device)  # noqa: B023
        epoch(cache)  # compares its first step
        row["read"] = seconds(lambda: epoch(cache), device)  # noqa: B023
        rows.append(row)
    kept = sum(path.stat().st_size for path in root.rglob("*.safetensors"))
    times = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    return {"head": job.head, "seconds": times, "mib": kept / 2**20}
