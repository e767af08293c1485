"""What is said of GPUs before a run, and what is refused: on stand-ins for torch's queries."""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ee_scale.cli import check
from ee_scale.config.compose import compose_config
from ee_scale.errors import UserError
from ee_scale.gpu import check_capability, check_training, driver_version, gpu_facts
from ee_scale.grid import pick_device

GIB = 2**30
TUNE = ["model=tiny", "data=python", "exits.layers=[1]", "parallel.device=cuda"]


@dataclass
class Card:
    name: str = "NVIDIA H100 80GB HBM3"
    capability: tuple[int, int] = (9, 0)
    free: float = 78.5


def cards(monkeypatch: pytest.MonkeyPatch, *found: Card, built: str = "sm_80 sm_90", nccl: bool = True) -> None:
    """torch sees these GPUs, and is built for those architectures."""
    answers = {
        "is_available": lambda: bool(found),
        "device_count": lambda: len(found),
        "get_arch_list": built.split,
        "get_device_capability": lambda index: found[index].capability,
        "get_device_name": lambda index: found[index].name,
        "mem_get_info": lambda index: (int(found[index].free * GIB), 80 * GIB),
        "get_device_properties": lambda index: SimpleNamespace(total_memory=80 * GIB),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "580.95.05",
        nvmlSystemGetCudaDriverVersion=lambda: 13010,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)


def test_cards_driver_and_nccl_are_told(monkeypatch: pytest.MonkeyPatch):
    cards(monkeypatch, Card(), Card(free=3.0), Card("NVIDIA A100", (8, 0)))
    facts = gpu_facts()
    assert facts["GPUs"] == (
        "2 x NVIDIA H100 80GB HBM3 (compute capability 9.0, 80.0 GiB), free: 78.5, 3.0 GiB; "
        "1 x NVIDIA A100 (compute capability 8.0, 80.0 GiB), free: 78.5 GiB"
    )
    assert facts["driver"].startswith("580.95.05, for CUDA up to 13.1; torch ")
    assert facts["NCCL"] == "2.28.9"


def test_no_gpu_and_no_nvml(monkeypatch: pytest.MonkeyPatch):
    cards(monkeypatch)
    assert gpu_facts() == {}
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    assert "unknown" in driver_version()


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((9, 0), "sm_80 sm_90", True),
        ((8, 6), "sm_80 sm_90", True),  # binary code of an earlier minor version
        ((8, 0), "sm_86", False),
        ((7, 0), "sm_75 sm_80", False),
        ((12, 0), "sm_80 sm_90", False),  # binary code of another generation
        ((12, 0), "sm_80 compute_90", True),  # is compiled by the driver
        ((9, 0), "sm_80 compute_100", False),
        ((9, 0), "sm_90a", True),
        ((7, 0), "", True),  # nobody says
    ],
)
def test_a_card_that_torch_has_no_kernels_for(monkeypatch, capability, built, runs):
    cards(monkeypatch, Card("Card", capability), built=built)
    if runs:
        check_capability(0)
        return
    number = ".".join(map(str, capability))
    for refuse in (lambda: check_capability(0), lambda: pick_device("auto"), lambda: check_training(bf16=False)):
        with pytest.raises(UserError, match=rf"^Card has compute capability {number}, and this torch .* is built for"):
            refuse()


def test_what_training_needs(monkeypatch: pytest.MonkeyPatch):
    cards(monkeypatch, Card(), Card("Tesla T4", (7, 5)), built="sm_75 sm_90")
    check_training(bf16=False)
    with pytest.raises(
        UserError, match=r"^Tesla T4 \(compute capability 7\.5\) has no bf16.*use train\.precision=fp32$"
    ):
        check_training(bf16=True)
    cards(monkeypatch, Card(), nccl=False)
    assert gpu_facts()["NCCL"] == "missing"
    with pytest.raises(UserError, match=r"has no NCCL.*use parallel\.device=cpu$"):
        check_training(bf16=False)


def test_check_tells_and_refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    monkeypatch.setenv("COLUMNS", "200")
    cards(monkeypatch, Card(free=12.25))
    assert check.run("tune", compose_config("tune", TUNE), TUNE) == 0
    told = capsys.readouterr().out
    assert "free: 12.2 GiB" in told
    assert "580.95.05" in told
    assert "2.28.9" in told
    cards(monkeypatch, Card("Tesla T4", (7, 5)), built="sm_75")
    with pytest.raises(UserError, match=r"use train\.precision=fp32"):
        check.run("tune", compose_config("tune", TUNE), TUNE)
    assert check.run("tune", compose_config("tune", [*TUNE, "train.precision=fp32"]), TUNE) == 0
    capsys.readouterr()
    on_cpu = [*TUNE, "parallel.device=cpu"]
    assert check.run("tune", compose_config("tune", on_cpu), on_cpu) == 0
    assert "Tesla" not in capsys.readouterr().out
