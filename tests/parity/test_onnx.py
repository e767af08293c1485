"""The ONNX file says what torch says: in every shape, with its cache, and nearly so with int8 weights."""

import importlib
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.clutter import check_copy, clutter
from helpers.models import VOCAB, load_whole, write_model
from helpers.supernet import encoder_config
from transformers import AutoConfig, AutoModelForSequenceClassification

from ee_scale.errors import UserError
from ee_scale.families.registry import FAMILIES

MISSING = "not installed: pip install 'ee-scale[edge]'"
onnx = pytest.importorskip("onnx", reason=MISSING)
onnxruntime = pytest.importorskip("onnxruntime", reason=MISSING)
pytest.importorskip("onnxscript", reason=MISSING)
ours = importlib.import_module("ee_scale.artifact.onnx")
export_onnx = ours.export_onnx


def session(folder: Path) -> Any:
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A decoder with a sliding window of 8 tokens, tied, and a width that is no multiple of the blocks of int8."""
    folder = tmp_path_factory.mktemp("model")
    changes = {"hidden_size": 80, "num_hidden_layers": 2, "tie_word_embeddings": True}
    write_model(folder / "decoder", "mistral", **changes)
    return folder


@pytest.fixture(scope="module")
def exported(folder):
    """Of a folder with everything beside the model."""
    base = clutter(Path(shutil.copytree(folder / "decoder", folder / "base")))
    return export_onnx(base, folder / "fp32", "causal_lm")


@pytest.fixture(scope="module")
def quantized(folder):
    return export_onnx(folder / "decoder", folder / "int8", "causal_lm", int8=True)


def feed(running, text: torch.Tensor, past: dict | None = None) -> dict[str, np.ndarray]:
    """Inputs as the docstring describes them; `past` is what the last call said."""
    caches = [value for value in running.get_inputs() if value.name.startswith("past_key_values.")]
    if past is None:
        values = {v.name: np.zeros((len(text), int(v.shape[1]), 0, int(v.shape[3])), np.float32) for v in caches}
    else:
        values = {v.name: past[v.name.replace("past_key_values", "present")] for v in caches}
    length = values["past_key_values.0.key"].shape[2] + text.shape[1]
    mask = np.ones((len(text), length), np.int64)
    return {"input_ids": text.numpy(), "attention_mask": mask, **values}


def test_what_is_copied_is_true_in_the_copy(folder, exported):
    check_copy(folder / "fp32", folder / "base", {"model.onnx", "model.onnx.data"})
    assert AutoConfig.from_pretrained(folder / "fp32").dtype is torch.float32


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (4, 11)])
def test_prompts_of_any_shape(folder, exported, shape):
    running, model = session(folder / "fp32"), load_whole(folder / "decoder")
    (logits,) = running.run(["logits"], feed(running, ids(*shape)))
    np.testing.assert_allclose(logits, model(ids(*shape)).logits, atol=1e-4, rtol=0)


def test_its_cache_continues_a_text(folder, exported):
    running, model, text = session(folder / "fp32"), load_whole(folder / "decoder"), ids(2, 20)
    names, past, pieces = [value.name for value in running.get_outputs()], None, []
    assert names == ["logits", *(f"present.{layer}.{what}" for layer in (0, 1) for what in ("key", "value"))]
    for start, stop in ((0, 5), (5, 6), (6, 19), (19, 20)):
        past = dict(zip(names, running.run(names, feed(running, text[:, start:stop], past)), strict=True))
        pieces.append(past["logits"])
    np.testing.assert_allclose(np.concatenate(pieces, 1), model(text).logits, atol=1e-4, rtol=0)


BATCH, LENGTH, PAST = "batch_size", "sequence_length", "past_sequence_length"
WHOLE = f"{PAST} + {LENGTH}"


def shapes(values: Any) -> dict[str, list[int | str]]:
    """By name, as the file declares them."""
    return {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim] for value in values
    }


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_declared_shapes(folder, exported, quantized, tmp_path, kind):
    """Numbers for heads and head size, one name for each free length; inference by onnx finds nothing else."""
    path = folder / kind / "model.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    cache = {f"{layer}.{what}" for layer in (0, 1) for what in ("key", "value")}
    expected = {"input_ids": [BATCH, LENGTH], "attention_mask": [BATCH, WHOLE]}
    assert shapes(graph.input) == expected | {f"past_key_values.{name}": [BATCH, 4, PAST, 16] for name in cache}
    expected = {"logits": [BATCH, LENGTH, VOCAB]} | {f"present.{name}": [BATCH, 4, WHOLE, 16] for name in cache}
    assert shapes(graph.output) == expected
    inside = {size for shape in shapes(graph.value_info).values() for size in shape if isinstance(size, str)}
    assert inside <= {BATCH, LENGTH, PAST, WHOLE}
    onnx.checker.check_model(path)
    found = tmp_path / "model.onnx"
    onnx.shape_inference.infer_shapes_path(path, found, check_type=True, strict_mode=True, data_prop=True)
    assert shapes(onnx.load(found, load_external_data=False).graph.output) == expected


def test_the_runtime_agrees_with_the_declared_shapes(folder, exported, capfd):
    """It warns of every output that has another shape than the file says."""
    running = session(folder / "fp32")
    names = [value.name for value in running.get_outputs()]
    text, past = ids(3, 9), None
    for start, stop in ((0, 5), (5, 6), (6, 9)):
        past = dict(zip(names, running.run(names, feed(running, text[:, start:stop], past)), strict=True))
    assert "shape" not in capfd.readouterr().err.lower()


def test_padding_is_masked(folder, exported):
    running, model, text = session(folder / "fp32"), load_whole(folder / "decoder"), ids(1, 9)
    padded = feed(running, torch.cat([text, text.new_zeros(1, 3)], 1))
    padded["attention_mask"][:, 9:] = 0
    (logits,) = running.run(["logits"], padded)
    np.testing.assert_allclose(logits[:, :9], model(text).logits, atol=1e-4, rtol=0)


def test_what_lies_beside_the_model_and_what_is_reported(folder, exported):
    names = {path.name for path in (folder / "fp32").iterdir()}
    assert {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json", "LICENSE"} <= names
    assert not any(name.endswith(".safetensors") for name in names)
    assert json.loads((folder / "fp32" / "config.json").read_text())["model_type"] == "mistral"
    sizes = {name: (folder / "fp32" / name).stat().st_size for name in ("model.onnx", "model.onnx.data")}
    assert exported.files == sizes
    assert 0 < exported.largest_difference < 1e-4 < 0.1 < exported.logit_scale
    assert exported.agreement == 1
    assert min(exported.torch_ms, exported.onnx_ms) > 0
    assert exported.tokens == 64


def test_int8_is_small_and_near(folder, exported, quantized):
    # A byte per weight, a scale per 32, no second copy in fp32; the tied matrix is there twice, and 80 is padded to 96.
    assert quantized.files["model.onnx.data"] < 0.5 * exported.files["model.onnx.data"]
    running, model = session(folder / "int8"), load_whole(folder / "decoder")
    (logits,) = running.run(["logits"], feed(running, ids(3, 25)))
    expected = model(ids(3, 25)).logits.numpy()
    error = np.abs(logits - expected)
    assert 0 < error.mean() < 0.03 * np.abs(expected).max()
    assert quantized.agreement > 0.8
    assert quantized.largest_difference > exported.largest_difference
    graph = onnx.load(folder / "int8" / "model.onnx").graph
    matrices = [tensor for tensor in graph.initializer if len(tensor.dims) > 1 and tensor.data_type == 1]
    assert all(1 in tensor.dims or tensor.name.endswith("_scales") for tensor in matrices), [t.name for t in matrices]
    assert sum(node.op_type == "MatMulNBits" for node in graph.node) == 2 * 7 + 1


def test_a_row_of_a_table_comes_back_within_half_a_step():
    table = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32) * np.arange(9, dtype=np.float32)[:, None]
    inputs = [onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, [None])]
    outputs = [onnx.helper.make_tensor_value_info("rows", onnx.TensorProto.FLOAT, [None, 5])]
    node = onnx.helper.make_node("Gather", ["table", "ids"], ["rows"])
    values = [onnx.numpy_helper.from_array(table, "table")]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", inputs, outputs, values),
        opset_imports=[onnx.helper.make_opsetid("", 18)],
        ir_version=10,
    )
    ours._quantize_tables(model.graph)
    assert {tensor.name for tensor in model.graph.initializer} == {"table_int8", "table_scale"}
    running = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (rows,) = running.run(None, {"ids": np.arange(9)[::-1].copy()})
    step = np.abs(table).max(1, keepdims=True) / 127
    assert np.all(np.abs(rows[::-1] - table) <= step / 2 + 1e-6)


# RoBERTa counts positions from behind its padding's; of ModernBERT two layers, one with a window.
@pytest.mark.parametrize(
    ("family", "changes", "reads"),
    [
        ("bert", {"num_hidden_layers": 1}, 40),
        ("roberta", {"num_hidden_layers": 1}, 38),
        ("modernbert", {"num_hidden_layers": 2, "initializer_range": 0.1}, 40),
    ],
)
def test_a_classifier(family, changes, reads, tmp_path):
    config = encoder_config(family, **changes, max_position_embeddings=40)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        model.get_submodule(FAMILIES[family].classifier).weight.mul_(20)
    model.save_pretrained(tmp_path / "whole")
    report = export_onnx(tmp_path / "whole", tmp_path / "out", "classify", int8=True)
    assert (report.agreement, report.tokens) == (1, reads)
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    assert shapes(graph.input) == {"input_ids": [BATCH, LENGTH], "attention_mask": [BATCH, LENGTH]}
    assert shapes(graph.output) == {"logits": [BATCH, 5]}
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[1, 9:] = 0
    given = {"input_ids": ids(3, 17).masked_fill(mask == 0, config.pad_token_id), "attention_mask": mask}
    (logits,) = session(tmp_path / "out").run(["logits"], {name: tensor.numpy() for name, tensor in given.items()})
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole").eval()
    expected = whole(**given).logits.detach().numpy()
    assert np.abs(logits - expected).max() < 0.05 * np.abs(expected).max()


def test_a_file_that_says_something_else_is_not_published(folder, exported, tmp_path, monkeypatch):
    changes = {"hidden_size": 80, "num_hidden_layers": 2, "tie_word_embeddings": True}
    write_model(tmp_path / "other", "mistral", seed=1, **changes)
    wrong = ours.onnx_ir.load(folder / "fp32" / "model.onnx")
    monkeypatch.setattr(ours, "_converted", lambda *_, **__: wrong)
    with pytest.raises(
        UserError, match=r"the ONNX file is off by [\d.]+ on logits up to [\d.]+ .* nothing was written"
    ):
        export_onnx(tmp_path / "other", tmp_path / "out", "causal_lm")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(UserError, match="src="):
        export_onnx(tmp_path, tmp_path / "out", "causal_lm")


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "ee_scale.artifact.onnx")
    with pytest.raises(UserError, match=r"pip install 'ee-scale\[edge\]'"):
        importlib.import_module("ee_scale.artifact.onnx")


def test_the_logging_of_the_process_is_left_alone():
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level

    @ours.quiet()
    def take_over() -> None:
        logging.getLogger().addHandler(logging.NullHandler())
        logging.getLogger().setLevel(logging.DEBUG)
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        take_over()
    assert (logging.getLogger().handlers, logging.getLogger().level) == (handlers, level)
    assert logging.getLogger().manager.disable == 0
