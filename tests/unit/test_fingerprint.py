"""Which model a folder holds: every tensor and the config count, and what an earlier version stored is still known."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ee_scale.backbone.fingerprint import _first_fingerprint, fingerprint, is_model

# As ee_scale computed it before configs counted, for the folder below.
FIRST = _first_fingerprint


@pytest.fixture
def folder(tmp_path) -> Path:
    write(tmp_path, big(), torch.zeros(7))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "rope_theta": 1e4, "dtype": "float32"}))
    return tmp_path


def big() -> torch.Tensor:
    return torch.arange(1 << 21, dtype=torch.float32)


def write(folder: Path, matrix: torch.Tensor, norm: torch.Tensor) -> None:
    save_file({"a.weight": matrix, "b.norm": norm, "c.weight": matrix[:-100_000] + 1}, folder / "model.safetensors")


@pytest.mark.parametrize("whole", [True, False])
def test_a_small_tensor_in_a_big_file_counts(folder, whole, monkeypatch):
    monkeypatch.setattr("ee_scale.backbone.fingerprint.READ_WHOLE", 1 << 30 if whole else 1 << 20)
    before, first = fingerprint(folder), FIRST(folder)
    assert before == fingerprint(folder)
    write(folder, big(), torch.tensor([0.0] * 6 + [1.0]))
    assert fingerprint(folder) != before
    assert FIRST(folder) == first, "64 blocks spread over the file do not meet it"
    one = big()
    one[1234567] = 0
    write(folder, one, torch.zeros(7))
    assert (fingerprint(folder) != before) is whole


def test_the_config_counts_but_not_who_saved_it(folder):
    before, values = fingerprint(folder), json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"transformers_version": "9", "dtype": "bfloat16"}))
    assert fingerprint(folder) == before
    (folder / "config.json").write_text(json.dumps(values | {"rope_theta": 2e4}))
    assert fingerprint(folder) != before
    assert not is_model(folder, before)


def test_what_an_earlier_version_stored_is_known(folder):
    stored = FIRST(folder)
    assert is_model(folder, stored)
    write(folder, big() + 1, torch.zeros(7))
    assert not is_model(folder, stored)
