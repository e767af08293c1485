"""What crosses stages in a train step: activations downstream and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import p2p
from helpers.models import write_model
from helpers.reference import Job, Record, relative_error, train
from helpers.spawn import spawn
from helpers.tuning import build_engine, join_shards, my_micro_batches, train_on_grid
from torch.utils._python_dispatch import TorchDispatchMode

from ee_scale.backbone.stages import plan_stages
from ee_scale.grid import Grid, Layout, join_grid, leave_grid

FOUR_STAGES = Layout(1, 4, 1)
STEPS = 3
# Layers 1 | 2 | 3 | 4, 5: the two stages in the middle hold no exit.
GAP = Job("llama", "mlp", "low_rank", exit_layers=(1, 5), loss_weights=(1.0, 1.0), clip_grad=0.3, steps=STEPS)
GAP_STAGES = [1, 1, 1, 2]
KL = Job("llama", "norm", "low_rank", exit_layers=(1, 5), loss_weights=(1.0, 1.0), kl_weight=0.5, steps=STEPS)
MIXED = {Layout(2, 2, 1): GAP, Layout(1, 2, 2): GAP, Layout(2, 1, 2): GAP}


@dataclass(frozen=True)
class Collective:
    """One call: which operation, and the global ranks of its group."""

    name: str
    ranks: tuple[int, ...]


class Recorder(TorchDispatchMode):
    """Collects every collective below any library: all of torch.distributed goes through these operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            self.calls.append(Collective(func._overloadpacket._qualified_op_name, group_ranks(args)))
        return func(*args, **(kwargs or {}))


def group_ranks(args: tuple) -> tuple[int, ...]:
    """Global ranks of the process group among an operator's arguments."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(arg)))
    raise AssertionError("no process group among the arguments")


@contextmanager
def recorded_sends() -> Iterator[list[int]]:
    """Destination stages of DeepSpeed's point-to-point messages."""
    sends: list[int] = []
    real = p2p.send

    def send(tensor: torch.Tensor, dest_stage: int, async_op: bool = False) -> Any:
        sends.append(dest_stage)
        return real(tensor, dest_stage, async_op)

    with mock.patch.object(p2p, "send", send):
        yield sends


def run_messages(rank: int, root: Path) -> dict[str, Any]:
    """Four ranks: the gap job on four stages, the KL job as the counter-example, and mixed grids."""
    found: dict[str, Any] = {}
    grid = join_grid(FOUR_STAGES, torch.device("cpu"))
    plan = plan_stages(5, 4, GAP.exit_layers, given=GAP_STAGES)
    engine = build_engine(root, GAP, grid, plan=plan)
    with recorded_sends() as sends:
        found["record"] = train_on_grid(engine, GAP, grid)
    found["trained"], found["sends_in_all"] = engine.stage.exit_layers, list(sends)
    engine = build_engine(root, GAP, grid, plan=plan)
    found["sends"], found["collectives"] = watch(engine, GAP, grid)
    leave_grid()

    grid = join_grid(FOUR_STAGES, torch.device("cpu"))
    engine = build_engine(root, KL, grid, plan=plan_stages(5, 4, KL.exit_layers, given=GAP_STAGES, whole_model=True))
    found["kl_sends"], found["kl_collectives"] = watch(engine, KL, grid)
    leave_grid()
    for layout, job in MIXED.items():
        grid = join_grid(layout, torch.device("cpu"))
        engine = build_engine(root, job, grid)
        found[f"sends_{layout}"], found[f"collectives_{layout}"] = watch(engine, job, grid)
        leave_grid()
    return found


def watch(engine: Any, job: Job, grid: Grid) -> tuple[list[list[int]], list[Collective]]:
    """(destination stages of the messages of each step, all collectives but point-to-point)."""
    with recorded_sends() as sends, Recorder() as recorder:
        by_step = []
        for step in range(STEPS):
            engine.train_step(my_micro_batches(step, job, grid))
            by_step.append(list(sends))
            sends.clear()
    assert len([call for call in recorder.calls if call.name == "c10d::send"]) == sum(map(len, by_step))
    return by_step, [call for call in recorder.calls if call.name not in ("c10d::send", "c10d::recv_")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("messages"), "llama")


@pytest.fixture(scope="module")
def found(root: Path) -> list[dict[str, Any]]:
    return spawn(run_messages, 4, root)  # what a wrong group does is hang


@pytest.mark.parametrize("key", ["sends", "kl_sends"])
def test_only_activations_travel_and_only_downstream(found: list[dict], key: str) -> None:
    """One message per micro-batch to the next stage, one more with the shape in the first step; none upstream."""
    for stage, results in enumerate(found):
        following = [stage + 1] * GAP.micro_batches if stage < 3 else []
        assert results[key] == [following + following[:1], following, following], f"stage {stage}"


@pytest.mark.parametrize("layout", [layout for layout in MIXED if layout.pp > 1], ids=str)
def test_messages_of_mixed_grids(found: list[dict], layout: Layout) -> None:
    for rank, results in enumerate(found):
        is_first = layout.coordinates(rank)[0] == 0
        each = [1] * (GAP.micro_batches // layout.dp) if is_first else []
        assert results[f"sends_{layout}"] == [each + each[:1], each, each], f"rank {rank}"


@pytest.mark.parametrize("layout", [FOUR_STAGES, *MIXED], ids=str)
def test_no_collective_crosses_stages(found: list[dict], layout: Layout) -> None:
    """Run-ahead: the groups of a step are inside a stage, so nothing waits for another stage."""
    key = "collectives" if layout == FOUR_STAGES else f"collectives_{layout}"
    seen = 0
    for rank, results in enumerate(found):
        stage = layout.coordinates(rank)[0]
        for call in results[key]:
            assert {layout.coordinates(other)[0] for other in call.ranks} == {stage}, f"rank {rank}: {call}"
            seen += len(call.ranks) > 1
    assert (seen > 0) == (layout.tp * layout.dp > 1)


def test_the_kl_term_does_cross_stages(found: list[dict]) -> None:
    """The teacher's broadcast is the one exception; it also shows that the recorder sees the pipe group."""
    for results in found:
        crossing = [call for call in results["kl_collectives"] if len(call.ranks) > 1]
        assert crossing == [Collective("c10d::broadcast_", (0, 1, 2, 3))] * (KL.micro_batches * STEPS)


def test_a_stage_without_exits(root: Path, found: list[dict]) -> None:
    """It passes activations on, and the exits in front of it and behind it train as in one process."""
    assert [results["trained"] for results in found] == [[1], [], [], [5]]
    expected = train(root, GAP)
    records: list[Record] = [results["record"] for results in found]
    for step, wanted in enumerate(expected.losses):
        losses = {k: loss for record in records for k, loss in record.losses[step].items()}
        assert losses.keys() == wanted.keys()
        assert all(losses[k] == pytest.approx(wanted[k], rel=1e-5) for k in wanted)
    parameters: dict[str, torch.Tensor] = {}
    for record in records:
        parameters |= join_shards([record.parameters], expected.parameters)
    assert parameters.keys() == expected.parameters.keys()
    assert all(relative_error(parameters[name], wanted) < 1e-5 for name, wanted in expected.parameters.items())


def run_quarter(rank: int, root: Path, job: Job) -> dict[str, Any]:
    plan = plan_stages(8, 4, job.exit_layers)
    grid = join_grid(Layout(1, plan.launched, 1), torch.device("cpu"))
    engine = build_engine(root, job, grid, plan=plan)
    return {"layers": len(engine.stage.backbone.base.layers), "record": train_on_grid(engine, job, grid)}


def test_an_exit_at_a_quarter_needs_a_quarter_of_the_stages(tmp_path: Path) -> None:
    """8 layers on 4 stages, exits up to layer 2: one process with two layers gives the whole job's result."""
    root = write_model(tmp_path, "llama", num_hidden_layers=8)
    job = Job("llama", "norm", "low_rank", exit_layers=(1, 2), loss_weights=(1.0, 1.0), steps=STEPS)
    assert plan_stages(8, 4, job.exit_layers).launched == 1
    (result,) = spawn(run_quarter, 1, root, job)
    expected = train(root, job)
    assert result["layers"] == 2
    for losses, wanted in zip(result["record"].losses, expected.losses, strict=True):
        assert all(losses[k] == pytest.approx(wanted[k], rel=1e-5) for k in (1, 2))
