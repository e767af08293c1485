"""A supernet in bf16 on the GPU: the debug config on one process and on two tensor ranks, and its palette."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ee_scale.palettes.manifest import read_manifest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GIVEN = ["+debug=supernet_cpu", "out=run", "train.precision=bf16", "parallel.device=cuda", "parallel.pp=1"]


def command(folder: Path, *arguments: str) -> None:
    folder.mkdir(exist_ok=True)
    finished = subprocess.run(
        [sys.executable, "-m", "ee_scale", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr


def losses(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def gpu_accelerator(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory) -> Path:
    """The folder of a finished run in bf16 on one GPU."""
    folder = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DS_ACCELERATOR", raising=False)
        command(folder, "supernet", *GIVEN)
    return folder


def test_bf16_on_the_gpu_follows_fp32_on_the_cpu(on_gpu, tmp_path):
    cpu = ["train.precision=fp32", "parallel.device=cpu"]
    command(tmp_path, "supernet", *GIVEN, *cpu)
    reference = losses(tmp_path)
    assert len(losses(on_gpu)) == len(reference) == 15
    for ours, theirs in zip(losses(on_gpu), reference, strict=True):
        # bf16 sorts units of nearly the same importance otherwise, so small subnets need not keep the same ones.
        assert set(ours) == set(theirs)
        assert ours["full"] == pytest.approx(theirs["full"], abs=3e-2)
        assert all(ours[role] == pytest.approx(theirs[role], abs=1e-1) for role in ours)


def test_palette_on_the_gpu(on_gpu):
    few = ["trials=8", "count=2", "samples=8", "seconds=0.2", "tokens=32", "new_tokens=4"]
    limits = ["objective=latency_ms", "max_memory_mb=500"]
    command(on_gpu, "palette", "src=run", "out=palette", "device=cuda", *few, *limits)
    manifest = read_manifest(on_gpu / "palette")
    assert manifest.members
    for member in manifest.members:
        assert 0 < member.memory_mb <= 500
        assert member.prefill_ms > 0
        model = AutoModelForCausalLM.from_pretrained(on_gpu / "palette" / member.folder).cuda()
        assert model(torch.arange(8, device="cuda")[None]).logits.isfinite().all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_tensor_ranks_follow_one(tmp_path):
    from helpers.models import write_model

    from ee_scale.data.builtin import tiny_model

    model = write_model(tmp_path / "model", "qwen3", vocab_size=512, num_hidden_layers=4, max_position_embeddings=128)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((tiny_model() / name).read_bytes())
    for folder, tp in (("one", 1), ("two", 2)):
        command(tmp_path / folder, "supernet", *GIVEN, f"model={model}", f"parallel.tp={tp}")
    for one, two in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert two["full"] == pytest.approx(one["full"], abs=5e-2)
