"""Out of memory in a run: one line with the forecast and the first setting to change, whichever rank it is."""

from pathlib import Path

import pytest
import torch
from helpers.cli import run_cli

FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.20 GiB is "
    "free. Including non-PyTorch memory, this process has 77.90 GiB memory in use. Of the allocated memory 70.00 "
    "GiB is allocated by PyTorch, and 4.00 GiB is reserved by PyTorch but unallocated."
)


def full_in_step(rank: int) -> None:
    """The last rank finds its device full in the second step, inside a forward pass."""
    from deepspeed.runtime.pipe.schedule import ForwardPass

    from ee_scale.engine.frozen import FrozenPipelineEngine

    instructions, calls = FrozenPipelineEngine._INSTRUCTION_MAP, []
    original = instructions[ForwardPass]

    def forward(self: FrozenPipelineEngine, *args: object, **options: object) -> None:
        calls.append(rank)
        if rank == torch.distributed.get_world_size() - 1 and len(calls) > 4:
            raise torch.OutOfMemoryError(FULL)
        original(self, *args, **options)

    instructions[ForwardPass] = forward


def really_full(rank: int) -> None:
    """What torch says on a CPU."""
    from ee_scale.training import loop

    loop.Loop.begin = lambda self: torch.empty(2**60, dtype=torch.uint8)


def full_in_decoding(rank: int) -> None:
    from ee_scale.modeling.loop import DecodeLoop

    def run(self: DecodeLoop, *_: object) -> None:
        raise torch.OutOfMemoryError(FULL)

    DecodeLoop.run = run


def full_in_judging(rank: int) -> None:
    from ee_scale.palettes.judge import Judge

    def judge(self: Judge, spec: object) -> None:
        raise torch.OutOfMemoryError(FULL)

    Judge.judge = judge


def full_in_measuring(rank: int) -> None:
    from ee_scale.palettes import edge

    class Done:
        returncode, stdout = 1, ""
        stderr = f"Traceback (most recent call last):\n...\ntorch.OutOfMemoryError: {FULL}\n"

    edge.subprocess.run = lambda *_, **__: Done


def last_line(output: str) -> str:
    assert "Traceback" not in output, output
    return output.splitlines()[-1]


@pytest.mark.parametrize("world", [1, 2])
def test_in_a_step(tune_arguments, tmp_path: Path, world: int):
    grid = [f"parallel.pp={world}", "out=run"]
    finished = run_cli([*tune_arguments, *grid], tmp_path, world, inject=full_in_step)
    assert finished.codes[-1] == 1, finished.outputs
    line = last_line(finished.outputs[-1])
    assert line.startswith("error: rank 1: out of memory" if world > 1 else "error: out of memory")
    assert "Tried to allocate 2.00 GiB" in line
    assert "70.00 GiB" not in line
    assert f"for a rank of stage {world - 1}" in line
    assert "; train.micro_batch_size=1 would need" in line  # needs no more ranks, as parallel.tp=2 would
    for output in finished.outputs:
        last_line(output)


def test_what_torch_says_on_a_cpu(tune_arguments, tmp_path: Path):
    finished = run_cli([*tune_arguments, "out=run"], tmp_path, inject=really_full)
    assert finished.code == 1, finished.output
    line = last_line(finished.output)
    assert line.startswith("error: out of memory (")
    assert "1152921504606846976 bytes" in line
    assert "enforce" not in line


def test_where_nothing_smaller_is_left(tune_arguments, tmp_path: Path):
    least = ["train.micro_batch_size=1", "train.global_batch_size=1", "parallel.pp=2", "parallel.tp=2"]
    finished = run_cli([*tune_arguments, *least, "out=run"], tmp_path, 4, inject=full_in_step)
    assert finished.codes[-1] == 1, finished.outputs
    assert "would need" in last_line(finished.outputs[-1])  # more ranks


def test_in_decoding(finished_run: Path, tmp_path: Path):
    assert run_cli(["export", f"src={finished_run}", "out=model"], tmp_path).code == 0
    command = ["generate", "model=model", "prompt=the layer", "max_new_tokens=4", "device=cpu"]
    for more, change in (["policy=lossless"], "batch_size=4"), (["policy=threshold", "batch_size=1"], "parallel.tp=2"):
        more = [*more, "dtype=bf16", "threshold=0.5"] if "batch_size=1" in more else more
        finished = run_cli([*command, *more], tmp_path, inject=full_in_decoding)
        assert finished.code == 1, finished.output
        line = last_line(finished.output)
        assert line.startswith("error: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB")
        assert "MiB of weights" in line
        assert line.endswith(f"; {change} needs less")


@pytest.mark.parametrize("inject", [full_in_judging, full_in_measuring])
def test_in_a_palette(supernet_run: Path, tmp_path: Path, inject):
    few = ["trials=2", "count=1", "samples=4", "seconds=0.1", "tokens=8", "new_tokens=2", "device=cpu"]
    finished = run_cli(["palette", f"src={supernet_run}", "out=palette", *few], tmp_path, inject=inject)
    assert finished.code == 1, finished.output
    line = last_line(finished.output)
    assert "out of memory" in line
    assert line.endswith("batch_size=8 needs less")
    assert not (tmp_path / "palette").exists()
