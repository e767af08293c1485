"""Everything here runs on the first GPU, or on a CPU where there is none."""

from pathlib import Path

import pytest
from helpers.device import DEVICE, train

from ee_scale.cli.main import main


@pytest.fixture(scope="session")
def device() -> str:
    """'cuda', else 'cpu'."""
    return DEVICE


@pytest.fixture(scope="session")
def tuned(tune_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of frozen exits that learn from the final layer as well, in bf16 on the device."""
    folder = tmp_path_factory.mktemp("tuned")
    train(folder, [*tune_arguments, "exits.kl_weight=0.5"])
    return folder / "run"


@pytest.fixture(scope="session")
def exported(tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its model with exits."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert main(["export", f"src={tuned}", f"out={folder}"]) == 0
    return folder
