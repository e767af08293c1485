"""Properties of all readers of model folders: config.json, safetensors and their index, orders of units."""

import json
import struct
from typing import Any

import pytest
import torch
from helpers.hostile import DEEP, as_json, damaged, examples, hostile_json, json_files, json_values, mutated, refused
from helpers.models import tiny_config
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save

from ee_scale.backbone.fingerprint import fingerprint
from ee_scale.backbone.loading import INDEX_NAME, SINGLE_NAME, TensorFolder, weight_files
from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.backbone.shard import tensor_plan
from ee_scale.backbone.stages import plan_stages
from ee_scale.conversion.args import check_config, to_args
from ee_scale.conversion.target_files import ST_DTYPES, safetensors_extents
from ee_scale.elastic.architecture import ElasticMap
from ee_scale.elastic.order import UnitOrder
from ee_scale.elastic.subnet import ElasticShape
from ee_scale.exits.placement import exit_cost, exit_parameters, exit_spec
from ee_scale.families.build import meta_model
from ee_scale.families.sizes import shape_of

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.int16), "c": torch.ones(2, 2).half()}
FILE = save(TENSORS, {"format": "pt"})
HEADER_SIZE = struct.unpack("<Q", FILE[:8])[0]
HEADER, DATA = json.loads(FILE[8 : 8 + HEADER_SIZE]), FILE[8 + HEADER_SIZE :]
LARGEST_BUILT = 1 << 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Any:
    return tmp_path_factory.mktemp("model")


# --- config.json


def _config(family: str) -> dict[str, Any]:
    values = tiny_config(family).to_dict()
    kept = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    kept += ("num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps")
    kept += (
        "rope_parameters",
        "hidden_act",
        "attention_bias",
        "sliding_window",
        "layer_types",
        "dtype",
        "eos_token_id",
    )
    kept += ("final_logit_softcapping", "attention_dropout", "initializer_range", "query_pre_attn_scalar")
    return {"architectures": ["X"], **{name: values[name] for name in kept if name in values}, "num_hidden_layers": 2}


CONFIGS = {family: json.loads(as_json(_config(family))) for family in ("llama", "qwen2", "gemma2", "mistral", "qwen3")}
for values in CONFIGS.values():
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][:2]
LLAMA = CONFIGS["llama"]


def _plan(folder) -> Any:
    """What every command computes from a config before it reads a weight."""
    config = ModelFolder(folder).decoder_config
    shape = shape_of(config)
    assert shape.layer_parameters > 0
    assert min(shape.num_layers, shape.hidden_size, shape.num_heads, shape.num_kv_heads, shape.head_dim) > 0
    tensor_plan(config, 1)
    refused(lambda: tensor_plan(config, 2))
    plan_stages(shape.num_layers, 1, [1], layer_cost=shape.layer_parameters)
    spec = exit_spec(config, [1], "mlp", "low_rank", 4)
    assert exit_parameters(spec, shape) > 0
    assert exit_cost(spec, shape) > 0
    if shape.num_layers < 8 and max(shape.hidden_size, shape.intermediate_size, shape.vocab_size) < LARGEST_BUILT:
        meta_model(config, torch.float32)
    if config.model_type != "gemma2":
        refused(lambda: ElasticMap(config, "causal_lm"))
        if refused(lambda: check_config(config) or True):
            to_args(config, torch.float32, 1, 1, shape.vocab_size, 1)
    return config


@given(st.sampled_from(list(CONFIGS)).flatmap(lambda family: json_files(CONFIGS[family])))
@example(as_json({**LLAMA, "num_attention_heads": 0}))
@example(as_json({**LLAMA, "num_hidden_layers": -1}))
@example(as_json({**LLAMA, "num_hidden_layers": 10**12}))
@example(as_json({**CONFIGS["qwen2"], "num_hidden_layers": 10**12}))
@example(as_json({**LLAMA, "hidden_size": "64"}))
@example(as_json({**LLAMA, "hidden_size": None}))
@example(as_json({**LLAMA, "num_key_value_heads": 3}))
@example(as_json({**LLAMA, "hidden_size": 4, "head_dim": None}))
@example(as_json({**LLAMA, "rms_norm_eps": float("nan")}))
@example(as_json({**LLAMA, "rms_norm_eps": -1}))
@example(as_json({**LLAMA, "hidden_act": "nothing"}))
@example(as_json({**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 0}}))
@example(as_json({**LLAMA, "rope_parameters": {"rope_type": "linear"}}))
@example(as_json({**LLAMA, "rope_parameters": []}))
@example(as_json({**LLAMA, "model_type": ["llama"]}))
@example(as_json({**LLAMA, "model_type": "gpt2"}))
@example(as_json({**CONFIGS["gemma2"], "final_logit_softcapping": 0}))
@example(as_json({**CONFIGS["gemma2"], "layer_types": ["none"] * 2}))
@example(as_json({**LLAMA, "dtype": "float99"}))
@example(b"[" * DEEP)
@examples(150)
def test_configs(folder, content) -> None:
    (folder / "config.json").write_bytes(content)
    config = refused(lambda: _plan(folder), megabytes=50)
    if config is not None:
        told = json.loads(content)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
            assert getattr(config, name) == told.get(name, getattr(config, name))
        assert config.rms_norm_eps > 0
        assert config.rope_parameters is None or not config.rope_parameters["rope_theta"] <= 0


# --- safetensors


def _file(header: Any, data: bytes = DATA) -> bytes:
    text = header if isinstance(header, bytes) else as_json(header)
    return struct.pack("<Q", len(text)) + text + data


def _check_file(path) -> None:
    """Both readers agree with each other and with the header; neither reads what is not there."""
    found = refused(lambda: {name: TensorFolder(path.parent, [path]).read(name) for name in _names(path)}, megabytes=20)
    extents = refused(lambda: safetensors_extents(path), megabytes=20)
    refused(lambda: fingerprint(path.parent), megabytes=20)
    content = path.read_bytes()
    for name, extent in (extents or {}).items():
        assert extent.offset >= 8
        assert extent.offset + extent.nbytes <= len(content)
        raw = content[extent.offset : extent.offset + extent.nbytes]
        if found is not None and raw:
            assert found[name].dtype == extent.dtype
            assert tuple(found[name].shape) == extent.shape
            assert found[name].contiguous().view(torch.uint8).numpy().tobytes() == raw


def _names(path) -> list[str]:
    return list(TensorFolder(path.parent, [path]).files)


safetensors_files = st.one_of(
    damaged(FILE),
    mutated(HEADER).map(_file),
    hostile_json.map(_file),
    json_values.map(_file),
    st.integers(0, 2**64 - 1).map(lambda size: struct.pack("<Q", size) + FILE[8:]),
    st.sampled_from(sorted(ST_DTYPES)).map(lambda name: _file({**HEADER, "a": {**HEADER["a"], "dtype": name}})),
)
HUGE = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}


@given(safetensors_files)
@example(_file({"a": HUGE}, b""))
@example(_file({"a": {**HUGE, "shape": [1 << 62, 1 << 62], "data_offsets": [0, 0]}}, b""))
@example(struct.pack("<Q", 1 << 63) + b"{}")
@example(struct.pack("<Q", (1 << 64) - 1))
@example(_file({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"\0"))
@example(_file({"a": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}}, b"\7"))
@example(b"")
@examples(200)
def test_safetensors(folder, content) -> None:
    (folder / SINGLE_NAME).write_bytes(content)
    _check_file(folder / SINGLE_NAME)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("indexed")
    (folder / "one.safetensors").write_bytes(save({"a": TENSORS["a"]}))
    (folder / "two.safetensors").write_bytes(save({"b": TENSORS["b"]}))
    return folder


INDEX = {"metadata": {"total_size": 32}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}


@given(json_files(INDEX))
@example(as_json({"weight_map": {"a": 5, "b": 6}}))
@example(as_json({"weight_map": {"a": "x" * 600}}))
@example(as_json({"weight_map": {"a": "\x00"}}))
@example(as_json({"weight_map": ["one.safetensors"]}))
@example(b"[" * DEEP)
@examples(100)
def test_indexes(indexed, content) -> None:
    (indexed / INDEX_NAME).write_bytes(content)
    found = refused(lambda: weight_files(indexed), megabytes=20)
    if found is not None:
        assert {path.name for path in found} <= {"one.safetensors", "two.safetensors"}
        assert refused(lambda: TensorFolder(indexed)) is not None


SHAPE = ElasticShape(4, 2, 4, 2, 2, 1, False)
ORDER = {name: getattr(UnitOrder.identity(SHAPE), name).contiguous() for name in ("hidden", "groups", "ffn", "drop")}


@given(damaged(save(ORDER)))
@example(save({**ORDER, "hidden": ORDER["hidden"].float()}))
@example(save({**ORDER, "hidden": torch.tensor(3)}))
@example(save({name: value for name, value in ORDER.items() if name != "drop"}))
@examples(100)
def test_orders_of_units(folder, content) -> None:
    path = folder / "order.safetensors"
    path.write_bytes(content)
    found = refused(lambda: UnitOrder.load(path, SHAPE))
    if found is not None:
        for name, value in ORDER.items():
            assert getattr(found, name).dtype == torch.int64
            assert torch.equal(getattr(found, name).sort(-1).values, value.sort(-1).values)
