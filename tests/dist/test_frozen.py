"""The backbone stays as it was, to the bit, and the optimizer sees the exits alone."""

from pathlib import Path

import pytest
import torch
from helpers.models import write_model
from helpers.reference import Job
from helpers.spawn import spawn
from helpers.tuning import build_engine, my_micro_batches

from ee_scale.grid import Layout, join_grid, leave_grid

LAYOUTS = [Layout(2, 2, 1), Layout(1, 2, 2)]
JOB = Job("qwen3", "layer", "low_rank", kl_weight=0.5, clip_grad=0.5, steps=4)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return spawn(run_cases, 4, write_model(tmp_path_factory.mktemp("frozen"), JOB.family))


def run_cases(rank: int, root: Path) -> dict[Layout, dict]:
    found = {}
    for layout in LAYOUTS:
        grid = join_grid(layout, torch.device("cpu"))
        engine = build_engine(root, JOB, grid)
        stage = engine.stage
        before = stage.frozen_digest(), [p.clone() for p in stage.backbone.parameters()]
        exits = {name: p.detach().clone() for name, p in stage.named_parameters()}
        for step in range(JOB.steps):
            engine.train_step(my_micro_batches(step, JOB, grid))
        result = {
            "digests": (before[0], stage.frozen_digest()),
            "same_bits": all(map(torch.equal, before[1], stage.backbone.parameters())),
            "requires_grad": {p.requires_grad for p in stage.backbone.parameters()},
            "gradients": [n for n, p in stage.backbone.named_parameters() if p.grad is not None],
            "unmoved": [name for name, p in stage.named_parameters() if torch.equal(p, exits[name])],
            "exit_layers": stage.exit_layers,
            "named": [name for name, _ in engine.module.named_parameters()],
            "optimised": optimised_names(engine),
        }
        with torch.no_grad():  # one bit of the last tensor
            tensor = list(stage.backbone.parameters())[-1]
            tensor.view(torch.int32).view(-1)[-1] ^= 1
        result["digest_of_a_flipped_bit"] = stage.frozen_digest()
        found[layout] = result
        leave_grid()
    return found


def optimised_names(engine: object) -> list[str]:
    """Names of what DeepSpeed's optimizer holds, by identity."""
    names = {id(p): name for name, p in engine.stage.named_parameters()}
    return [names[id(p)] for group in engine.optimizer.bit16_groups for p in group]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_backbone_does_not_change(layout: Layout, found: list[dict]) -> None:
    for results in found:
        result = results[layout]
        assert result["digests"][0] == result["digests"][1]
        assert result["same_bits"]
        assert result["requires_grad"] == {False}
        assert result["gradients"] == []


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_digest_sees_one_bit(layout: Layout, found: list[dict]) -> None:
    assert all(results[layout]["digest_of_a_flipped_bit"] != results[layout]["digests"][1] for results in found)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_optimizer_sees_the_exits_alone(layout: Layout, found: list[dict]) -> None:
    attention = [f"self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    mlp = [f"mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
    norms = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    per_exit = [f"layer.{name}" for name in (*attention, *mlp, *norms)]
    per_exit += ["norm.weight", "head.down.weight", "head.up.weight"]
    seen = set()
    for results in found:
        result = results[layout]
        expected = {f"exit_heads.{k}.{name}" for k in result["exit_layers"] for name in per_exit}
        assert sorted(result["optimised"]) == sorted(expected)
        assert {name.split(".", 1)[1] for name in result["named"]} == expected  # behind the pipe's own prefix
        assert result["unmoved"] == []
        seen |= set(result["exit_layers"])
    assert seen == set(JOB.exit_layers)
