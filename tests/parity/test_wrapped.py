"""The language model inside a model that reads images too: found in its folder, and equal to the whole on text."""

import json
from pathlib import Path

import pytest
import torch
from helpers.models import load_whole, spec_of
from helpers.wrapped import WRAPPED, ids, write_wrapped
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from ee_scale.backbone.loading import read_config
from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.errors import UserError
from ee_scale.families.registry import WRAPPERS
from ee_scale.inference.model import EarlyExitForCausalLM, open_model, untrained_exits


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(ids()).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("wrapped")
    return {name: write_wrapped(root / name, name) for name in WRAPPED}


def whole_logits(folder: Path) -> torch.Tensor:
    return logits(AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval())


@pytest.mark.parametrize("name", WRAPPED)
def test_the_language_model_is_the_whole_on_text(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder, expected = folders[name], whole_logits(folders[name])
    assert expected.std() > 0.05
    config = ModelFolder(folder).checked().config
    assert config.model_type == WRAPPED[name][0]
    torch.testing.assert_close(logits(open_model(folder)), expected, atol=1e-5, rtol=1e-5)
    model = untrained_exits(folder, spec_of(config, [2, 4], "norm", "tied"))
    found = model(ids())
    torch.testing.assert_close(found.logits, expected, atol=1e-5, rtol=1e-5)
    # Saved, it is a language model with exits, by the names of one.
    model.save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert {key.split(".")[0] for key in stored} == {"model", "lm_head", "exit_heads"}
    assert "model.layers.0.self_attn.q_proj.weight" in stored
    again = EarlyExitForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids()).exit_logits[2], found.exit_logits[2])
    torch.testing.assert_close(logits(load_whole(tmp_path / "saved")), expected, atol=1e-5, rtol=1e-5)


def test_all_wrappers_are_tested() -> None:
    assert set(WRAPPED) == set(WRAPPERS)


def test_names_of_older_versions(folders: dict[str, Path], tmp_path: Path) -> None:
    """Gemma 3 on the hub says 'language_model.model.' and, where it has one, 'language_model.lm_head.'."""
    tensors = {}
    for key, value in load_file(folders["gemma3"] / "model.safetensors").items():
        old = key.replace("model.language_model.", "language_model.model.").replace("model.vision", "vision")
        tensors[f"language_model.{old}" if old.startswith("lm_head") else old] = value
    assert any(key.startswith("language_model.model.layers.") for key in tensors)
    (tmp_path / "config.json").write_text((folders["gemma3"] / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ModelFolder(tmp_path).checked()
    torch.testing.assert_close(logits(open_model(tmp_path)), whole_logits(folders["gemma3"]), atol=1e-5, rtol=1e-5)


def test_a_tied_one(tmp_path: Path) -> None:
    folder = write_wrapped(tmp_path / "tied", "gemma3", tied=True)
    assert read_config(folder).tie_word_embeddings
    torch.testing.assert_close(logits(open_model(folder)), whole_logits(folder), atol=1e-5, rtol=1e-5)


def test_odd_sizes_inside_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    values = json.loads((folders["gemma3"] / "config.json").read_text())
    values["text_config"]["hidden_size"] = -1
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="text_config: hidden_size=-1: give a whole number from 1 to"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "setting"), [("gemma3", {"final_logit_softcapping": 4.0}), ("aya_vision", {"logit_scale": 0.25})]
)
def test_what_its_own_code_leaves_out_is_refused(
    name: str, setting: dict[str, float], folders: dict[str, Path], tmp_path: Path
) -> None:
    values = json.loads((folders[name] / "config.json").read_text())
    values["text_config"] |= setting
    (tmp_path / "config.json").write_text(json.dumps(values))
    ((said, value),) = setting.items()
    with pytest.raises(UserError, match=f"text_config: {said}={value}: '{name}' does not apply it to its logits"):
        read_config(tmp_path)
