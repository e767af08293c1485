"""GGUF files: weights as gguf decodes them, logits, tokenizer and settings as transformers has them."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from helpers.gguf_files import CHAT, TEXT, VOCAB, chat_model, write_gguf
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.backbone.model_path import plain_folder

MIXED = {
    "token_embd.weight": Kind.Q8_0,
    "attn_q.weight": Kind.Q4_0,
    "ffn_up.weight": Kind.Q4_1,
    "ffn_down.weight": Kind.Q5_0,
}
# What transformers takes for granted, since no GGUF file says it.
CHANGES = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 4096},  # llama.cpp calls it a Llama
    "qwen2": {},
    "qwen3": {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
    "gemma2": {
        **{"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 256},
        **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "tie_word_embeddings": True},
    },
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """The cache of a test of its own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("EE_SCALE_CACHE", str(folder))
    return folder / "gguf"


def theirs(file: Path) -> torch.nn.Module:
    """transformers' own model of a GGUF file, which is fp32."""
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", CHANGES)
def test_weights_and_logits_are_those_of_transformers(family: str, tmp_path: Path):
    source = chat_model(tmp_path / "model", family, num_hidden_layers=2, **CHANGES[family])
    file = write_gguf(tmp_path / "m.gguf", source, MIXED, name=f"Tiny {family}")
    folder, expected = plain_folder(file), theirs(file)
    ours = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(ours) is type(expected)
    assert ours.dtype == torch.float32
    state = ours.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert [name for name, value in expected.state_dict().items() if not torch.equal(value, state[name])] == []
    with torch.no_grad():
        assert torch.equal(ours(ids()).logits, expected(ids()).logits)
        original = AutoModelForCausalLM.from_pretrained(source).eval()(ids()).logits
    # And the file itself is right: its rounding apart, it is the model that was written.
    assert torch.nn.functional.cosine_similarity(ours(ids()).logits, original, dim=-1).min() > 0.9
    ModelFolder(folder).checked()


def test_every_type_is_what_gguf_makes_of_it(tmp_path: Path):
    """One matrix each; rows of 256 numbers are the shortest that all types have."""
    kinds = [kind for kind in Kind if kind in (Kind.F32, Kind.F16) or kind in gguf.quants._type_traits]
    assert len(kinds) > 20
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 32, "num_key_value_heads": 8}
    source = chat_model(tmp_path / "model", "llama", num_hidden_layers=7, **sizes)
    places = [f"blk.{i}.{part}.weight" for i in range(7) for part in ("attn_v", "attn_output", "ffn_gate", "ffn_down")]
    file = write_gguf(tmp_path / "m.gguf", source, dict(zip(places, kinds, strict=False)))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert {stored[place].tensor_type for place in places[: len(kinds)]} == set(kinds)
    names = {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj"}
    names["ffn_down"] = "mlp.down_proj"
    with safe_open(plain_folder(file) / "model.safetensors", "pt") as tensors:
        for place in places:
            _, layer, part, _ = place.split(".")
            found = tensors.get_tensor(f"model.layers.{layer}.{names[part]}.weight")
            wanted = gguf.dequantize(stored[place].data, stored[place].tensor_type)
            assert found.dtype == torch.float32
            assert np.array_equal(found.numpy(), wanted), stored[place].tensor_type


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.F16, torch.float16), (Kind.BF16, torch.bfloat16)])
def test_halves_stay_halves_where_nothing_is_lost(kind: Kind, dtype: torch.dtype, tmp_path: Path):
    source = chat_model(tmp_path / "model", "llama", num_hidden_layers=1)
    assert AutoModelForCausalLM.from_pretrained(plain_folder(write_gguf(tmp_path / "a.gguf", source, kind))).dtype == (
        torch.float32  # the norms have more digits
    )
    model = AutoModelForCausalLM.from_pretrained(source).to(dtype)
    model.save_pretrained(source)
    file = write_gguf(tmp_path / "b.gguf", source, kind)
    found = AutoModelForCausalLM.from_pretrained(plain_folder(file))
    assert found.dtype == dtype
    wanted = theirs(file).state_dict()
    assert all(torch.equal(value.float(), wanted[name]) for name, value in found.state_dict().items())


@pytest.mark.parametrize(
    ("family", "pieces"), [("llama", False), ("llama", True), ("qwen2", False), ("qwen3", False), ("gemma2", True)]
)
def test_tokenizer_and_settings_are_those_of_transformers(family: str, pieces: bool, tmp_path: Path):
    source = chat_model(tmp_path / "model", family, num_hidden_layers=1, **CHANGES[family])
    file = write_gguf(tmp_path / "m.gguf", source, pieces=pieces)
    folder = plain_folder(file)
    ours, expected = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert type(ours) is type(expected)
    chat = [{"role": "user", "content": "one <think>  token\n<|im_end|>"}, {"role": "assistant", "content": "é 1234"}]
    for text in (TEXT, " a", "", "<|im_start|>x<think>y<|end|>", "  two\n\n\tspaces é 漢", "1234567"):
        for special in (True, False):
            found = ours(text, add_special_tokens=special).input_ids
            assert found == expected(text, add_special_tokens=special).input_ids
            assert ours.decode(found) == expected.decode(found)
            assert ours.decode(found, skip_special_tokens=True) == expected.decode(found, skip_special_tokens=True)
    assert ours.get_vocab() == expected.get_vocab()
    assert ours.special_tokens_map == expected.special_tokens_map
    assert set(ours.all_special_ids) == set(expected.all_special_ids)
    assert ours.chat_template == expected.chat_template == CHAT
    told = [t.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for t in (ours, expected)]
    assert told[0] == told[1]
    if not pieces:  # those that the file was written with
        assert ours.encode(told[0]) == PreTrainedTokenizerFast.from_pretrained(source).encode(told[0])
    settings, model = GenerationConfig.from_pretrained(folder), theirs(file)
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        assert getattr(settings, name) == getattr(model.generation_config, name)
        assert getattr(ModelFolder(folder).config, name) == getattr(model.config, name)
    assert settings.eos_token_id == (2 if pieces else VOCAB - 2)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_the_rotary_scaling_of_llama_3(tmp_path: Path):
    """transformers' reader leaves it out; a file holds the factors alone."""
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    sizes = {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16384}
    source = chat_model(tmp_path / "model", "llama", rope_parameters=rope, **sizes)
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    plain = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
    factors = (plain / model.model.rotary_emb.inv_freq).numpy()
    assert factors.max() > 7.9
    file = write_gguf(tmp_path / "m.gguf", source, Kind.F32, extra={"rope_freqs.weight": factors})
    found = AutoModelForCausalLM.from_pretrained(plain_folder(file)).eval()
    far = {"input_ids": ids(), "position_ids": torch.arange(24).expand(2, -1) * 300}
    with torch.no_grad():
        torch.testing.assert_close(found(**far).logits, model(**far).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(theirs(file)(**far).logits, model(**far).logits, rtol=0.01, atol=0.01)
