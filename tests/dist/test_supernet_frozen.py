"""A phase moves its own factors alone: backbone and earlier phases stay as they were, to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from helpers.spawn import spawn
from helpers.supernet import (
    MICRO_BATCHES,
    SEED,
    SupernetJob,
    batch,
    config_of,
    scrambled_order,
    small_space,
    write_base,
)

from ee_scale.backbone.loading import read_config
from ee_scale.backbone.stages import plan_stages
from ee_scale.elastic.architecture import ElasticMap
from ee_scale.elastic.factors import FactorPlan, FactorSet
from ee_scale.elastic.sampling import draw_stream
from ee_scale.elastic.stage import ElasticStage, base_tensors
from ee_scale.engine.supernet import SupernetEngine
from ee_scale.grid import Grid, Layout, join_grid, leave_grid

REPLICAS = Layout(1, 2, 2)  # splits optimizer states (ZeRO-1)
JOBS = {"qwen3": SupernetJob("qwen3"), "bert": SupernetJob("bert")}
CASES = [(Layout(2, 2, 1), "qwen3"), (Layout(2, 2, 1), "bert"), (REPLICAS, "qwen3")]
RECIPE = ((), ("ffn",), ("hidden", "heads", "ffn", "depth"))  # the second one's factors stay unmerged in the third
STEPS, BF16_STEPS = 2, 5


class Trainer:
    """What a run does, without its commands."""

    def __init__(self, folder: Path, job: SupernetJob, grid: Grid, dtype: torch.dtype = torch.float32):
        self.job, self.grid, self.map = job, grid, ElasticMap(read_config(folder), job.task)
        order, layers = scrambled_order(self.map.shape), self.map.shape.num_layers
        self.space = small_space(self.map.shape, order)
        plan = plan_stages(layers, grid.layout.pp, [layers], whole_model=True)
        self.stage = ElasticStage(self.map, plan, grid, dtype)
        self.stage.load(base_tensors(folder, self.map), order)
        self.factors: list[FactorSet] = []

    def begin(self, lr: float = 1e-2) -> SupernetEngine:
        """The next phase: what it starts with is frozen, the teacher is merged."""
        for factors in self.factors:
            factors.freeze()
        index = len(self.factors)
        config = config_of(self.job, lr, eps=1e-6, weight_decay=0.01)
        config.optim.clip_grad = 1.0
        self.sampling = config.sampling
        self.plan = FactorPlan(self.map, config.factors, self.job.rank, self.stage.new)
        self.factors.append(FactorSet(self.stage, self.plan, index, seed=1))
        if index:
            for module in self.stage.elastic.values():
                module.merge(0)
        self.engine = SupernetEngine.build(self.stage, self.factors[-1], self.grid, config, 1 if index else None)
        return self.engine

    def step(self, step: int, data_step: int) -> torch.Tensor:
        each = MICRO_BATCHES // self.grid.layout.dp
        mine = range(self.grid.dp_rank * each, (self.grid.dp_rank + 1) * each)
        axes = RECIPE[len(self.factors) - 1]
        stream = draw_stream(self.space, axes, step, each, self.sampling, SEED, self.plan.parameters)
        return self.engine.train_step(iter([batch(data_step, i, self.job) for i in mine]), stream)

    def frozen(self) -> dict[str, torch.Tensor]:
        """Backbone, and factors of earlier phases."""
        tensors = {
            f"{name}.{leaf}": p for name, module in self.stage.elastic.items() for leaf, p in module.named_parameters()
        }
        for factors in self.factors[:-1]:
            tensors |= factors.named
        return tensors


def run_cases(rank: int, folders: dict[str, Path]) -> dict:
    found: dict[Any, Any] = {}
    for layout, name in CASES:
        grid = join_grid(layout, torch.device("cpu"))
        found[layout, name] = freeze_case(Trainer(folders[name], JOBS[name], grid))
        if layout == REPLICAS:
            found |= {bf16: bf16_case(folders[name], grid, bf16) for bf16 in (False, True)}
        leave_grid()
    return found


def freeze_case(trainer: Trainer) -> list[dict]:
    """For every phase: what its training left as it was, and what it did not."""
    stages = []
    for _ in RECIPE:
        engine = trainer.begin()
        frozen, mine = trainer.frozen(), trainer.factors[-1].named
        before = {name: p.detach().clone() for name, p in (frozen | mine).items()}
        digest = trainer.stage.frozen_digest()
        for step in range(STEPS):
            trainer.step(step, step)
        result = {
            "digests": (digest, trainer.stage.frozen_digest()),
            "changed": {name for name, p in frozen.items() if not torch.equal(p, before[name])},
            "wants gradients": {name for name, p in frozen.items() if p.requires_grad or p.grad is not None},
            "unmoved": {name for name, p in mine.items() if torch.equal(p, before[name])},
            "factors": set(mine),
            "optimised": names_of([p for group in engine.optimizer.bit16_groups for p in group], mine),
            "engine's": names_of(list(engine.module.parameters()), mine),
            "flipped": {name: digest_of_a_flip(trainer.stage, p) for name, p in flips(frozen).items()},
        }
        stages.append(result)
    return stages


def names_of(parameters: list[torch.nn.Parameter], mine: dict[str, torch.nn.Parameter]) -> list[str]:
    """By identity; '?' is something that is no factor of this phase."""
    names = {id(p): name for name, p in mine.items()}
    return sorted(names.get(id(p), "?") for p in parameters)


def flips(frozen: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The first and the last backbone tensor, and one of every earlier phase."""
    backbone = [name for name in frozen if not name[0].isdigit()]
    earlier = {name[0]: name for name in frozen if name[0].isdigit()}.values()
    return {name: frozen[name] for name in (backbone[0], backbone[-1], *earlier)}


@torch.no_grad()
def digest_of_a_flip(stage: ElasticStage, tensor: torch.Tensor) -> str:
    bits = tensor.detach().view(-1).view(torch.int32)
    bits[-1] ^= 1
    digest = stage.frozen_digest()
    bits[-1] ^= 1
    return digest


def bf16_case(folder: Path, grid: Grid, bf16: bool) -> dict:
    """The third kind of phase on the same samples in every step, so that the losses have to fall."""
    trainer = Trainer(folder, JOBS["qwen3"], grid, torch.bfloat16 if bf16 else torch.float32)
    trainer.begin()
    trainer.step(0, 0)
    trainer.begin()  # distils as well
    losses = []
    for _ in range(BF16_STEPS):
        mean = trainer.step(0, 0)
        dist.all_reduce(mean)  # features from every stage, the others from the last one
        losses.append(mean[:2] / grid.layout.tp / grid.layout.dp)
    engine, parameters = trainer.engine, trainer.factors[-1].named.values()
    masters = [safe_get_full_fp32_param(p).view(p.shape) for p in parameters]
    return {
        "losses": torch.stack(losses),
        "optimizer": type(engine.optimizer).__name__,
        "types": {p.dtype for p in parameters} | {p.dtype for p in trainer.stage.parameters()},
        "masters": {master.dtype for master in masters},
        "rounded": all(torch.equal(m.to(p.dtype), p) for m, p in zip(masters, parameters, strict=True)),
        "finer": any(not torch.equal(m, p.float()) for m, p in zip(masters, parameters, strict=True)),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    root = tmp_path_factory.mktemp("frozen")
    return spawn(run_cases, 4, {name: write_base(root / name, job) for name, job in JOBS.items()})


@pytest.mark.parametrize(("layout", "name"), CASES, ids=str)
def test_what_is_frozen_does_not_change(layout: Layout, name: str, found: list[dict]) -> None:
    for results in found:
        for result in results[layout, name]:
            assert result["digests"][0] == result["digests"][1]
            assert result["changed"] == set()
            assert result["wants gradients"] == set()


@pytest.mark.parametrize(("layout", "name"), CASES, ids=str)
def test_the_digest_sees_one_bit(layout: Layout, name: str, found: list[dict]) -> None:
    for results in found:
        for index, result in enumerate(results[layout, name]):
            assert len(result["flipped"]) == 2 + index
            for tensor, digest in result["flipped"].items():
                assert digest != result["digests"][1], tensor


@pytest.mark.parametrize(("layout", "name"), CASES, ids=str)
def test_the_engine_sees_the_current_factors_alone(layout: Layout, name: str, found: list[dict]) -> None:
    for results in found:
        for index, result in enumerate(results[layout, name]):
            assert all(factor.startswith(f"{index}.") for factor in result["factors"])
            assert result["optimised"] == result["engine's"] == sorted(result["factors"])
            # An encoder's key biases shift all scores alike: nothing but rounding moves them.
            assert {factor for factor in result["unmoved"] if not factor.endswith("self.key.bias")} == set()
    everywhere = set().union(*(results[layout, name][0]["factors"] for results in found))
    assert {factor.split(".")[-1] for factor in everywhere} >= {"A", "B", "weight"}


def test_bf16_trains_beside_fp32(found: list[dict]) -> None:
    job = JOBS["qwen3"]
    for results in found:
        fp32, bf16 = results[False], results[True]
        assert (bf16["optimizer"], bf16["types"]) == ("BF16_Optimizer", {torch.bfloat16})
        assert (fp32["types"], bf16["masters"]) == ({torch.float32}, {torch.float32})
        assert bf16["rounded"]
        assert bf16["finer"]
        for losses in (fp32["losses"], bf16["losses"]):  # [steps, full and smallest, (task, KL, features)]
            assert losses.isfinite().all()
            total = losses @ torch.tensor([1 - job.kl_weight, job.kl_weight, job.feature_weight])
            assert (total[-1] < 0.95 * total[0]).all(), losses
        torch.testing.assert_close(bf16["losses"][..., 0], fp32["losses"][..., 0], rtol=3e-2, atol=0)
