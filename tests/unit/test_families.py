"""One object per family says what is true of transformers' models, and nobody else says it again."""

import re
from pathlib import Path

import pytest
import torch
from helpers.models import tiny_config
from helpers.supernet import OF_ENCODERS, encoder_config
from transformers import CONFIG_MAPPING

import ee_scale
from ee_scale.backbone.proof import prove
from ee_scale.errors import UserError
from ee_scale.families.build import meta_model
from ee_scale.families.decoders import DECODERS
from ee_scale.families.family import Family
from ee_scale.families.registry import FAMILIES, megatron_family
from ee_scale.families.sizes import PER_LAYER, shape_of, with_layers

ROOT = Path(ee_scale.__file__).parents[1]


def config_of(name: str):
    if name in OF_ENCODERS:
        return encoder_config(name, intermediate_size=96)
    return tiny_config(name, num_hidden_layers=4)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.axes])
def test_every_parameter_lies_along_the_axes_that_the_family_names(name: str) -> None:
    config, family = config_of(name), FAMILIES[name]
    lengths, seen = shape_of(config).lengths, set()
    for full_name, parameter in meta_model(config, torch.float32, task=family.task).named_parameters():
        module, leaf = full_name.rsplit(".", 1)
        parts = family.parts_of(module)
        for part, tensor in zip(parts, parameter.chunk(len(parts)), strict=True):
            assert family.whole_of(f"{part}.{leaf}") == full_name
            axes = family.axes_of(part)[:1] if leaf == "bias" else family.axes_of(part)
            expected = [lengths.get(axis, size) for axis, size in zip(axes, tensor.shape, strict=True)]
            assert list(tensor.shape) == expected, full_name
            seen.add(re.sub(r"\.\d+\.", ".*.", part))
    assert seen == set(family.axes)
    assert set(family.heads) <= seen


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_with_fewer_layers_builds_those(name: str) -> None:
    config, family = config_of(name), FAMILIES[name]
    small = with_layers(config, (1, 3))
    assert config.num_hidden_layers == 4
    for setting in PER_LAYER:
        if values := getattr(config, setting, None):
            assert getattr(small, setting) == [values[1], values[3]]
    model = meta_model(small, torch.float32, task=family.task)
    assert len(model.base_model.get_submodule(family.layers)) == 2


@pytest.mark.parametrize("family", [family for family in DECODERS if family.axes], ids=lambda family: family.name)
def test_a_layer_counts_its_projections(family: Family) -> None:
    shape = shape_of(config_of(family.name))
    layer = [axes for name, axes in family.axes.items() if "*" in name and len(axes) == 2]
    assert shape.layer_parameters == sum(shape.lengths[out] * shape.lengths[inner] for out, inner in layer)


def test_families_with_a_map_to_megatron_have_no_norm_behind_their_mlp() -> None:
    assert all(family.mlp_output_norm is None for family in FAMILIES.values() if family.megatron)


@pytest.mark.parametrize("name", [family.name for family in DECODERS if family.beyond_megatron])
def test_what_megatron_lacks_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"config.model_type={name}: Megatron-Core's GPT model lacks .*; known: llama"):
        megatron_family(tiny_config(name))
    assert FAMILIES[name].megatron is None


REFUSED = {
    "phi": "into embed_tokens, embed_dropout, layers, final_layernorm, not into embed_tokens, layers, norm",
    "apertus": "'model.layers.0.mlp.act_fn.beta' is stored in files but is no weight, and is not read here",
    "granite_swa": "'rotary_embs.0.inv_freq' is computed when the model is built, not loaded",
    "deepseek_v2": "its attention keeps keys and values in one latent vector (kv_lora_rank=512)",
    "deepseek_v3": "its attention keeps keys and values in one latent vector (kv_lora_rank=512)",
    "gpt_oss": "the MLP of layer 1 returns a tuple, not hidden states",
}


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_lack_something_are_told_what(name: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    with pytest.raises(UserError, match=f"^model.path: architecture '{name}' is not supported: ") as caught:
        prove(CONFIG_MAPPING[name](**sizes, vocab_size=131))
    assert str(caught.value).endswith(REFUSED[name])


def test_lists_that_nobody_cuts_with_the_layers_are_refused() -> None:
    with pytest.raises(UserError, match="not supported: its config says 'bases' of each layer, which is not known"):
        prove(tiny_config("llama", bases=[1e4, 1e4, 1e4, 1e4, 1e2]))
    prove(tiny_config("llama", eos_token_id=[1, 2, 3, 4, 5]))


def test_what_they_lack_is_in_the_docs() -> None:
    table = (ROOT / "docs" / "extend.md").read_text().split("| refused |")[1].split("\n\n")[0]
    assert re.findall(r"^\| (\w+) \|", table, flags=re.M) == [*REFUSED, "aya_vision"]  # tests/parity/test_wrapped.py
