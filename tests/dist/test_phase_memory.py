"""What the engine of a finished phase held is free when the next one trains."""

import gc
import weakref

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from helpers.spawn import spawn
from torch.multiprocessing.reductions import StorageWeakRef

from ee_scale.config.compose import compose_config
from ee_scale.data.builtin import tiny_model
from ee_scale.elastic.order import UnitOrder
from ee_scale.grid import join_grid, leave_grid
from ee_scale.training.supernet import Supernet, SupernetRun, build_stage, start_run

WORDS = ["+debug=supernet_cpu", "parallel.pp=1", "train.precision=bf16"]


def step(run: SupernetRun) -> None:
    config = run.config
    run.ready()
    generator = torch.Generator().manual_seed(run.step)

    def batch() -> dict[str, torch.Tensor]:
        shape = (config.train.micro_batch_size, config.data.seq_length)
        tokens = torch.randint(0, 512, shape, generator=generator)
        return {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(shape)}

    run.__dict__["_micro_batches"] = iter(batch, None)
    run.train_step()


def state_of(optimizer: BF16_Optimizer) -> dict[str, torch.Tensor]:
    """Master copies, moments, gradients: what it holds beside the parameters themselves."""
    found = {}
    for i, group in enumerate(optimizer.optimizer.param_groups):
        (master,) = group["params"]
        found[f"master {i}"] = master
        found |= {f"{name} {i}": optimizer.optimizer.state[master][name] for name in ("exp_avg", "exp_avg_sq")}
        found[f"gradients {i}"] = optimizer.fp32_groups_gradients_flat[i]
    return found


def what_lives(rank: int) -> tuple[list[str], list[str], bool, int]:
    """(names of the first engine's tensors, those that outlive it, whether it does itself, times that the peak of the
    device's memory was forgotten)."""
    forgotten: list[int] = []
    get_accelerator().reset_peak_memory_stats = lambda *_: forgotten.append(1)
    plan = Supernet.of(compose_config("supernet", WORDS)).plan
    grid = join_grid(plan.layout, torch.device("cpu"))
    run = start_run(plan, grid, build_stage(plan, grid), UnitOrder.identity(plan.map.shape))
    step(run)
    engine = weakref.ref(run.engine)
    stored = {name: StorageWeakRef(t.untyped_storage()) for name, t in state_of(run.engine.optimizer).items()}
    run.step = plan.phases.start(1)
    step(run)
    gc.collect()
    alive = [name for name, storage in stored.items() if not storage.expired()]
    leave_grid()
    return list(stored), alive, engine() is not None, len(forgotten)


def test_a_finished_phase_leaves_nothing_but_its_factors() -> None:
    tiny_model()
    ((stored, alive, engine, forgotten),) = spawn(what_lives, 1)
    assert len(stored) >= 4
    assert (alive, engine) == ([], False)
    assert forgotten == 0  # DeepSpeed does so while it builds: what that took would not be told
