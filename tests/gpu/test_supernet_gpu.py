"""A supernet in bf16 on the device, and its palette; on two tensor ranks."""

from pathlib import Path

import pytest
import torch
from helpers.cli import run_cli
from helpers.device import DEVICE, metrics, train, train_on_cpu, two_gpus
from helpers.runs import recipe
from transformers import AutoModelForCausalLM

from ee_scale.palettes.manifest import read_manifest

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def arguments(supernet_arguments) -> list[str]:
    """Ten steps that are small enough for the losses of two number types to stay together."""
    return [*supernet_arguments, recipe((3, 3, 4), 1e-3, 4)]


@pytest.fixture(scope="module")
def supernet(arguments, tmp_path_factory) -> Path:
    """The folder of a finished run in bf16."""
    folder = tmp_path_factory.mktemp("supernet-on-device")
    train(folder, arguments)
    return folder


def test_bf16_follows_fp32_on_a_cpu(supernet, arguments, tmp_path):
    ours, reference = metrics(supernet / "run"), train_on_cpu(tmp_path, arguments)
    assert len(ours) == len(reference) == 10
    for mine, theirs in zip(ours, reference, strict=True):
        # bf16 sorts units of nearly the same importance otherwise, so small subnets need not keep the same ones.
        assert set(mine["loss"]) == set(theirs["loss"])
        assert mine["loss"]["full"] == pytest.approx(theirs["loss"]["full"], abs=3e-2)
        assert all(mine["loss"][role] == pytest.approx(theirs["loss"][role], abs=1e-1) for role in mine["loss"])


def test_palette(supernet):
    few = ["trials=4", "count=1", "samples=8", "seconds=0.1", "tokens=16", "new_tokens=2", f"device={DEVICE}"]
    limits = ["objective=latency_ms", "max_memory_mb=500"]
    words = ["palette", "src=run", "out=palette", *few, *limits]
    # On a GPU as a person runs it: each folder is measured in a process of its own.
    finished = run_cli(words, supernet, device=DEVICE, measure_here=DEVICE == "cpu")
    assert finished.code == 0, finished.output
    manifest = read_manifest(supernet / "palette")
    assert manifest.members
    for member in manifest.members:
        assert 0 < member.memory_mb <= 500
        assert member.prefill_ms > 0
        model = AutoModelForCausalLM.from_pretrained(supernet / "palette" / member.folder).to(DEVICE)
        assert model(torch.arange(8, device=DEVICE)[None]).logits.isfinite().all()


@two_gpus
def test_two_tensor_ranks_follow_one(supernet, arguments, tmp_path):
    ours = train(tmp_path, [*arguments, "parallel.tp=2"], 2)
    for two, one in zip(ours, metrics(supernet / "run"), strict=True):
        assert two["loss"]["full"] == pytest.approx(one["loss"]["full"], abs=5e-2)
