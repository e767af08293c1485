"""LoRA adapters are merged while converting: as peft's formula has it, the same at every grid and in every format."""

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.convert import convert
from helpers.experts import write_expert_model
from helpers.models import load_whole, write_model
from safetensors.torch import load_file, save_file

from ee_scale.backbone.loading import TensorFolder
from ee_scale.config.convert import ConvertConfig
from ee_scale.conversion.check.verify import verify
from ee_scale.conversion.execute import run
from ee_scale.conversion.plan import make_conversion, open_result
from ee_scale.errors import UserError

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
RANK, ALPHA = 4, 6
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More rows than are computed in one product."""
    return write_model(tmp_path_factory.mktemp("base") / "llama", "llama", num_hidden_layers=2, intermediate_size=600)


def write_adapter(folder: Path, model: Path, targets: list[str] = TARGETS, **changes: Any) -> Path:
    """As peft's save_pretrained leaves it, with random halves."""
    folder.mkdir(parents=True)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "bias": "none"}
    settings |= {"base_model_name_or_path": "x", "task_type": "CAUSAL_LM", "rank_pattern": {}, "alpha_pattern": {}}
    settings |= {"use_rslora": False, "use_dora": False, "modules_to_save": None, "init_lora_weights": True} | changes
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    generator, tensors = torch.Generator().manual_seed(5), {}
    for name, tensor in load_file(model / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if tensor.ndim == 2 and module.endswith(tuple(targets)):
            ranks = [rank for end, rank in settings["rank_pattern"].items() if module.endswith(f".{end}")]
            rank = ranks[0] if ranks else RANK
            for half, shape in (("A", (rank, tensor.shape[1])), ("B", (tensor.shape[0], rank))):
                tensors[f"{PREFIX}{module}.lora_{half}.weight"] = torch.randn(shape, generator=generator) / 4
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def merged(model: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """peft's formula: weight + (B @ A) x alpha / r, or alpha / sqrt(r)."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    tensors, halves = load_file(model / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name in tensors:
        module = name.removesuffix(".weight")
        if f"{PREFIX}{module}.lora_A.weight" in halves:
            down, up = (halves[f"{PREFIX}{module}.lora_{half}.weight"].float() for half in "AB")
            alphas = [alpha for end, alpha in settings["alpha_pattern"].items() if module.endswith(f".{end}")]
            rank = len(down)
            scale = (alphas or [settings["lora_alpha"]])[0] / (math.sqrt(rank) if settings["use_rslora"] else rank)
            tensors[name] = (tensors[name].float() + (up @ down) * scale).to(tensors[name].dtype)
    return tensors


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = TensorFolder(folder)
    return {name: found.read(name) for name in found.files}


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same but for the last bits of a sum of fp32."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"layers.1.mlp.up_proj": 2.5}},
        {"targets": ["q_proj", "lm_head"]},
    ],
    ids=str,
)
def test_formula(model: Path, tmp_path: Path, changes: dict[str, Any]):
    adapter = write_adapter(tmp_path / "adapter", model, **changes)
    expected = merged(model, adapter)
    base = load_file(model / "model.safetensors")
    assert any(not torch.allclose(base[name], tensor) for name, tensor in expected.items())
    close(tensors_of(convert(model, tmp_path / "hf", "hf", adapter=adapter)), expected)


def test_every_grid_gives_the_same_bits(model: Path, tmp_path: Path):
    adapter = write_adapter(tmp_path / "adapter", model)
    expected = tensors_of(convert(model, tmp_path / "hf", "hf", adapter=adapter))
    for to, (tp, pp) in product(("megatron_core", "megatron_legacy"), ((1, 1), (4, 2))):
        there = convert(model, tmp_path / f"{to}-{tp}" / "there", to, adapter=adapter, tp=tp, pp=pp)
        found = tensors_of(convert(there, tmp_path / f"{to}-{tp}" / "back", "hf"))
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        plain = convert(model, tmp_path / f"{to}-{tp}" / "plain", to, tp=tp, pp=pp)
        found = tensors_of(convert(plain, tmp_path / f"{to}-{tp}" / "later", "hf", adapter=adapter))
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_experts_of_their_own(tmp_path: Path):
    """An adapter that was trained on experts that are modules of their own, as transformers 4 had them."""
    model = write_expert_model(tmp_path / "mixtral", "mixtral", num_hidden_layers=2)
    adapter = write_adapter(tmp_path / "adapter", model, ["w2", "block_sparse_moe.gate", "k_proj"])
    there = convert(model, tmp_path / "there", "megatron_legacy", adapter=adapter, tp=2, ep=2)
    close(tensors_of(convert(there, tmp_path / "back", "hf")), merged(model, adapter))


@pytest.mark.parametrize("dtype", ["auto", "fp32"])
def test_bf16_and_verify(model: Path, tmp_path: Path, dtype: str):
    """Rounded once; `verify` runs the merged model, and notices one that is not."""
    small = convert(model, tmp_path / "bf16", "hf", dtype="bf16")
    adapter = write_adapter(tmp_path / "adapter", model)
    config = ConvertConfig(src=small, out=tmp_path / "there", to="megatron_core", adapter=adapter, tp=2, dtype=dtype)
    conversion = make_conversion(config)
    run(conversion, 2, lambda size: None)
    result = open_result(config, tmp_path / "there")
    verify(conversion.opened, result)
    if dtype == "auto":
        close(tensors_of(convert(tmp_path / "there", tmp_path / "back", "hf")), merged(small, adapter))
    plain = make_conversion(ConvertConfig(src=small, out=tmp_path / "no", to="hf"))
    with pytest.raises(UserError, match="verify: layer 1 departs first"):
        verify(plain.opened, result)


def test_as_peft_merges(model: Path, tmp_path: Path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, use_rslora=True, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(load_whole(model), settings)
    torch.manual_seed(3)
    for name, parameter in tuned.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    tuned.save_pretrained(tmp_path / "adapter")
    base = peft.PeftModel.from_pretrained(load_whole(model), tmp_path / "adapter")
    expected = base.merge_and_unload().state_dict()
    found = tensors_of(convert(model, tmp_path / "hf", "hf", adapter=tmp_path / "adapter"))
    close(found, {name: expected[name] for name in found})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA': only LORA is merged"),
        ({"use_dora": True}, "use_dora=True: is not merged here; merge it"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]: is not merged here"),
        ({"bias": "lora_only"}, "bias='lora_only': is not merged here"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication="),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters="),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"something_new": 1}, "something_new=1: is not merged here"),
        ({"r": "4"}, "adapter_config.json: r='4': input should be a valid integer"),
        ({"r": 8}, "r=8 for 'model.layers.0.mlp.down_proj', but its matrices in .* have rank 4"),
        ({"alpha_pattern": {"layers.[01].*": 2}}, r"alpha_pattern: 'layers.\[01\].\*' is no plain name"),
    ],
    ids=str,
)
def test_refused_settings(model: Path, tmp_path: Path, changes: dict[str, Any], message: str):
    refused(model, write_adapter(tmp_path / "adapter", model, **changes), message)


def test_refused_weights(model: Path, tmp_path: Path):
    """Embeddings, unknown modules, halves that are missing or of another shape, targets without weights."""
    adapter = write_adapter(tmp_path / "adapter", model)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    key = f"{PREFIX}model.layers.1.self_attn.q_proj.lora_A.weight"
    for wrong, message in (
        (
            tensors | {f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.zeros(4, 131)},
            "embed_tokens.lora_embedding_A'",
        ),
        (
            tensors | {f"{PREFIX}model.layers.2.mlp.up_proj.lora_A.weight": torch.zeros(4, 64)},
            r"layers.2.mlp.up_proj.lora_A",
        ),
        (tensors | {f"{PREFIX}lm_head.weight": torch.zeros(131, 64)}, "'base_model.model.lm_head.weight'"),
        ({name: tensor for name, tensor in tensors.items() if name != key}, "q_proj.weight' has lora_B alone"),
        (
            tensors | {key: torch.zeros(4, 65)},
            r"B \[128, 4\] x A \[4, 65\] do not make 'model.layers.1.self_attn.q_proj",
        ),
        (
            {name: tensor for name, tensor in tensors.items() if "layers.1.self_attn.q_proj" not in name},
            "names 'q_proj', but 'model.layers.1.self_attn.q_proj.weight' has no update",
        ),
    ):
        save_file(wrong, path, metadata={"format": "pt"})
        refused(model, adapter, message)
    path.unlink()
    refused(model, adapter, "no adapter_model.safetensors in it")
    refused(model, write_adapter(tmp_path / "odd", model, ["q_proj", "c_attn"]), "the model has no matrix 'c_attn'")
    refused(model, tmp_path / "nowhere", "no adapter_config.json in it")


def test_tied_output_matrix(tmp_path: Path):
    """The embedding would change with it."""
    model = write_model(tmp_path / "tied", "llama", num_hidden_layers=1)
    adapter = write_adapter(tmp_path / "adapter", model, ["lm_head"])
    tied = write_model(tmp_path / "model", "llama", num_hidden_layers=1, tie_word_embeddings=True)
    refused(tied, adapter, "lm_head.lora_A.weight': not the half of an update of a matrix of this model")


def refused(src: Path, adapter: Path, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_conversion(ConvertConfig(src=src, out=adapter.with_name("never"), to="hf", adapter=adapter))
