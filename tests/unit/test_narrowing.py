"""A number that a narrower type has not is an error that names it, wherever a type is changed."""

import re
from pathlib import Path

import pytest
import torch
from helpers.models import tiny_config, write_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ee_scale.artifact.trained_base import TrainedBase
from ee_scale.backbone.adapters import merged
from ee_scale.backbone.loading import LoadTask, TensorFolder, load_tensors
from ee_scale.backbone.narrowing import NarrowingError, fill, narrowed
from ee_scale.cli.main import main
from ee_scale.conversion.copying import Source, blocks_of
from ee_scale.conversion.formats.huggingface import whole_piece
from ee_scale.conversion.target_files import safetensors_extents
from ee_scale.conversion.tensors import Piece, Span, Stored, TensorInfo, Update
from ee_scale.inference.model import open_model

HUGE = {  # what it holds -> where it is to go
    (1e5, torch.float32): torch.float16,
    (-7e4, torch.bfloat16): torch.float16,
    (3.4e38, torch.float32): torch.bfloat16,
    (1e300, torch.float64): torch.float32,
    (-1e39, torch.float64): torch.bfloat16,
}
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(("given", "dtype"), HUGE.items(), ids=str)
def test_beyond_the_largest(given: tuple[float, torch.dtype], dtype: torch.dtype):
    value, before = given
    tensor = torch.tensor([1.0, value, float("inf")], dtype=before)
    with pytest.raises(NarrowingError, match=rf"'x' holds {re.escape(f'{tensor[1].item():g}')}, and the largest"):
        narrowed(tensor, dtype, "x")
    with pytest.raises(NarrowingError, match="'x'"):
        fill(torch.empty(3, dtype=dtype), tensor, "x")


def test_what_was_no_number_before_may_be_none_after():
    tensor = torch.tensor([float("nan"), float("inf"), -float("inf"), 65504.0, 1e-9])
    torch.testing.assert_close(narrowed(tensor, torch.float16, "x"), tensor.half(), equal_nan=True, rtol=0, atol=0)
    assert narrowed(torch.tensor([65504.0], dtype=torch.float16), torch.bfloat16, "x").item() == 65536


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Llama in fp32; one of its numbers is beyond fp16."""
    folder = write_model(tmp_path / "hf", "llama", num_hidden_layers=2)
    edit(folder, {NAME: 1e5})
    return folder


def edit(folder: Path, values: dict[str, float]) -> None:
    """Set the last number of some tensors."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in values.items():
        tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("settings", ["hf", "megatron_core tp=2", "megatron_legacy pp=2"])
def test_convert(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, settings: str):
    """One line, and nothing is left that would stand in the way of the next try."""
    arguments = ["convert", f"src={folder}", f"out={tmp_path / 'out'}", *f"to={settings}".split()]
    assert main([*arguments, "dtype=fp16"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == f"error: '{NAME}' holds 100000, and the largest number of fp16 is 65504; " + (
        "choose a type with a wider range (bf16 or fp32)"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
    assert main([*arguments, "dtype=bf16"]) == 0


def test_convert_says_what_it_cannot_keep(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Numbers that become zero, and those that were none: they pass, and are told."""
    edit(folder, {NAME: 1.0, "model.norm.weight": float("nan"), "lm_head.weight": 2e-8})
    main(["convert", f"src={folder}", "to=hf", f"out={tmp_path / 'half'}", "dtype=fp16"])
    said = capsys.readouterr().err
    assert "copied as they are: infinities or NaN in 'model.norm.weight'" in said
    assert re.search(r"too small for fp16, and zero now: numbers up to 2e-08 \('lm_head.weight'\)", said)
    assert load_file(tmp_path / "half" / "model.safetensors")["model.norm.weight"].isnan()[-1]
    main(["convert", f"src={folder}", "to=hf", f"out={tmp_path / 'same'}"])
    said = capsys.readouterr().err
    assert "infinities or NaN" in said
    assert "too small" not in said


def test_a_merged_head_is_rounded_once(tmp_path: Path):
    """The sum counts, not its parts: it may be back inside the range, or beyond it."""
    tensors = {"w": torch.tensor([[7e4], [6e4]]), "up": torch.tensor([[-1.0], [-1.0]]), "down": torch.tensor([[1e4]])}
    save_file(tensors, tmp_path / "x.safetensors")
    extents = safetensors_extents(tmp_path / "x.safetensors")
    source = Source(Stored(whole_piece(name, TensorInfo(extent.shape)), extent) for name, extent in extents.items())
    piece = Piece("w", 0, (Span("w", 0, 2, Update("up", "down")),), (2, 1))
    ((_, block),) = blocks_of(piece, source, torch.float16)
    assert torch.equal(block, torch.tensor([[6e4], [5e4]]).half())
    with pytest.raises(NarrowingError, match="'w' holds 70000"):
        list(blocks_of(Piece("w", 0, (Span("w", 0, 2),), (2, 1)), source, torch.float16))


def test_loading_into_a_run(folder: Path):
    tensors = TensorFolder(folder)
    target = torch.empty(tensors.shape(NAME), dtype=torch.float16)
    for task in (LoadTask(target, NAME), LoadTask(target, NAME, 0, target.shape[0])):
        with pytest.raises(NarrowingError, match=f"'{NAME}' holds 100000"):
            load_tensors([task], tensors, 0, 1)


def test_opening_in_a_narrower_type(folder: Path):
    with pytest.raises(NarrowingError, match=f"'{NAME}' holds 100000"):
        open_model(folder, dtype=torch.float16)
    edit(folder, {NAME: float("inf")})
    assert open_model(folder, dtype=torch.float16).dtype is torch.float16


def test_what_was_trained_of_a_base(tmp_path: Path):
    """A base in fp16 with weights, or an adapter, that training took beyond it."""
    AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=torch.float16).save_pretrained(tmp_path / "base")
    shape = TensorFolder(tmp_path / "base").shape(NAME)
    save_file({NAME: torch.full(shape, 7e4)}, tmp_path / "trained.safetensors")
    base = TrainedBase(tmp_path / "base", tmp_path, ["trained.safetensors"])
    with pytest.raises(NarrowingError, match=f"'{NAME}' holds 70000"):
        base.read(NAME)
    with pytest.raises(NarrowingError, match="'x' holds 65537"):
        merged(torch.ones(1, 1, dtype=torch.float16), torch.full((1, 1), 256.0), torch.full((1, 1), 256.0), "x")
