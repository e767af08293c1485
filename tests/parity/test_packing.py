"""Packed weights on a CPU: the same numbers for whoever asks, the same text from whoever decodes."""

import copy
import pickle

import pytest
import torch
from helpers.decoding import make_pair, prompts, script_drafts
from helpers.models import write_model
from torch import nn
from transformers import AutoModelForCausalLM

from ee_scale import EarlyExitForCausalLM
from ee_scale.inference import number_type
from ee_scale.inference.number_type import fastest_dtype, linear_seconds
from ee_scale.modeling import packing
from ee_scale.modeling.packing import PackedLinear, packed_linears, packs, plain_weight

NEW = 10
if not packs(torch.float32):
    pytest.skip("this torch packs nothing on this machine", allow_module_level=True)


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    """Tests have small matrices."""
    monkeypatch.setattr(packing, "SMALLEST", 1)


def count(model: nn.Module) -> int:
    return sum(type(layer) is PackedLinear for layer in model.modules())


def linears(model: nn.Module) -> int:
    return sum(isinstance(layer, nn.Linear) for layer in model.modules())


def layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 7, bias=False)).to(dtype).eval()


def pack(model: nn.Module) -> nn.Module:
    with packed_linears(model):
        pass
    assert count(model) == linears(model)
    return model


# -- decoding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind", "head"),
    [("llama", "mlp", "low_rank"), ("qwen3", "layer", "tied"), ("mistral", "norm", "full"), ("gemma2", "mlp", "tied")],
)
@pytest.mark.parametrize("pattern", ["natural", "mixed", "all"])
def test_text_is_that_of_transformers_with_plain_weights(tmp_path, monkeypatch, family, kind, head, pattern):
    pair, inputs = make_pair(tmp_path, family, kind, head, calm=0.3), prompts(5)
    want = pair.reference(inputs, max_new_tokens=NEW)
    script_drafts(monkeypatch, pattern, want)
    for policy, options in {"lossless": {}, "off": {}, "fixed": {"exit_layer": 1}}.items():
        said = pair.generate(inputs, policy, max_new_tokens=NEW, **options)
        assert count(pair.model) == linears(pair.model) > 20
        assert count(pair.base) == 0
        if policy != "fixed":
            assert torch.equal(said.sequences, want)
            continue
        pair.model.pack_weights = False
        packing_off = copy.deepcopy(pair.model)
        assert count(packing_off) == 0
        plain = packing_off.generate(**inputs, exit_policy=policy, max_new_tokens=NEW, do_sample=False, **options)
        assert count(packing_off) == 0
        assert torch.equal(said.sequences, plain)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_differ_by_rounding_only(tmp_path, family):
    pair, inputs = make_pair(tmp_path, family, "mlp", "low_rank"), prompts(3)
    with torch.no_grad():
        want = pair.base(**inputs).logits
        plain = pair.model(**inputs)
        pack(pair.model)
        packed = pair.model(**inputs)
    assert count(pair.model) == linears(pair.model)
    torch.testing.assert_close(packed.logits, want, rtol=1e-4, atol=1e-5)
    for k, logits in packed.exit_logits.items():
        torch.testing.assert_close(logits, plain.exit_logits[k], rtol=1e-4, atol=1e-5)


def test_shortlists_read_packed_heads_without_unpacking(tmp_path):
    pair, inputs = make_pair(tmp_path, "llama", "norm", "low_rank", tie_word_embeddings=False), prompts(3)
    want = pair.reference(inputs, max_new_tokens=NEW)
    options = {"exit_shortlist": list(range(3, 90)), "max_new_tokens": NEW}
    for _ in range(2):
        assert torch.equal(pair.generate(inputs, "lossless", **options).sequences, want)
        assert count(pair.model) == linears(pair.model)


def test_fp64_training_and_small_layers_stay_plain(monkeypatch):
    for model in (layers(torch.float64), layers().train()):
        with packed_linears(model):
            assert count(model) == 0
    monkeypatch.setattr(packing, "SMALLEST", 24 * 40)
    model = layers()
    with packed_linears(model):
        assert [type(model[i]) is PackedLinear for i in (0, 2)] == [True, False]


def test_without_the_op_weights_stay_plain_and_one_line_says_so(monkeypatch, caplog):
    packs.cache_clear()
    packing.logger.warning_once.cache_clear()
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    monkeypatch.setattr(packing.logger, "propagate", True)
    try:
        model = layers()
        for _ in range(2):
            with packed_linears(model):
                assert count(model) == 0
        lines = [record.getMessage() for record in caplog.records if "packed linear layers" in record.getMessage()]
        assert len(lines) == 1
        assert "\n" not in lines[0]
    finally:
        packs.cache_clear()


# -- whoever asks for plain weights gets them --------------------------------------------------------------------------


ASKS = {
    "state_dict": lambda model: model.state_dict(),
    "parameters": lambda model: list(model.parameters()),
    "weight": lambda model: [model[0].weight, model[2].weight],
    "apply": lambda model: model.cpu(),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "load": lambda model: model.load_state_dict(layers().state_dict()),
}


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_asking_unpacks_the_same_numbers_in_the_same_parameters(ask, dtype):
    if not packs(dtype):
        pytest.skip(f"no packed {dtype}")
    model = layers(dtype)
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    pack(model)
    assert all(parameter.isnan().all() for name, (parameter, _) in before.items() if name.endswith("weight"))
    with torch.inference_mode():
        ASKS[ask](model)
    assert count(model) == 0
    assert not [p for p in model.parameters() if p.is_inference()]
    for name, now in model.named_parameters():
        parameter, value = before[name]
        assert now is parameter
        assert torch.equal(now, value.to(now.dtype))
    pack(model)


def test_copies_are_plain_and_packed_on_their_own():
    model = pack(layers())
    twin, read = copy.deepcopy(model), pickle.loads(pickle.dumps(pack(model)))
    for other in (twin, read):
        assert count(other) == 0
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), layers().parameters(), strict=True))
        pack(other)


@torch.no_grad()
def test_what_is_written_into_a_packed_model_counts():
    x, model = torch.randn(3, 24), pack(layers())
    model[0].weight.mul_(2)
    model[2].weight = nn.Parameter(torch.ones(7, 40))
    want = model(x)
    assert count(model) == 0
    torch.testing.assert_close(pack(model)(x), want)


@torch.no_grad()
@pytest.mark.parametrize("write", ["in place", "data", "other storage"])
def test_tied_weights_are_kept_and_followed(tmp_path, write):
    write_model(tmp_path / "m", "llama", tie_word_embeddings=True)
    model, x = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval(), torch.randn(2, 64)
    table = model.model.embed_tokens.weight
    x = torch.randn(2, table.shape[1])
    before = table.clone()
    pack(model)
    assert torch.equal(table, before)
    if write == "in place":
        table[3:5] += 1
    elif write == "data":
        table.data[3:5] += 1
    else:
        table.data = table.data + 1
    pack(model)
    torch.testing.assert_close(model.lm_head(x), x @ table.T, rtol=1e-4, atol=1e-4)
    assert not torch.equal(table, before)


def test_gradients_flow_as_in_a_plain_model_and_into_its_optimizer():
    x, model, plain = torch.randn(3, 24), layers(), layers()
    steps = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    for _ in range(2):
        for m, step in zip((model, plain), steps, strict=True):
            step.zero_grad()
            m(x).square().sum().backward()
            step.step()
        for step in steps:
            step.zero_grad()
        pack(model)  # as generating between two steps does
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    pack(model).requires_grad_(False)
    pack(model)
    wanted = torch.randn(3, 24, requires_grad=True)
    model(wanted).sum().backward()
    assert wanted.grad is not None


def test_other_number_types_and_autocast_are_computed_plainly():
    x = torch.randn(3, 24)
    with torch.no_grad():
        model, plain = pack(layers()), layers()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(x), plain(x))
        pack(model)
        with pytest.raises(RuntimeError, match="dtype"):
            model(x.double())
        assert pack(model).to(torch.float64)(x.double()).dtype == torch.float64


def test_plain_weight_reads_without_unpacking():
    model, plain = pack(layers()), layers()
    assert torch.equal(plain_weight(model[0]), plain[0].weight)
    assert torch.equal(plain_weight(plain[0]), plain[0].weight)
    assert count(model) == 2


def test_nothing_is_packed_while_another_decodes():
    model = layers()
    with packed_linears(model):
        model[0].weight  # noqa: B018
        assert count(model) == 1
        with packed_linears(model):
            assert count(model) == 1
    pack(model)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 3, 24), (0, 24), (2, 0, 24)])
@torch.no_grad()
def test_every_shape(shape):
    x, model, plain = torch.randn(shape), pack(layers()), layers()
    torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(model(x.expand(2, *shape)), plain(x.expand(2, *shape)))
    assert count(model) == 2


# -- folders and settings ----------------------------------------------------------------------------------------------


def test_saved_after_decoding(tmp_path):
    pair, inputs = make_pair(tmp_path / "base", "llama", "mlp", "low_rank"), prompts(2)
    pair.model.save_pretrained(tmp_path / "before")
    said = pair.generate(inputs, "lossless", max_new_tokens=NEW).sequences
    assert count(pair.model) == linears(pair.model)
    pair.model.save_pretrained(tmp_path / "after")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    for options, packed in ({}, True), ({"pack_weights": False}, False):
        model = EarlyExitForCausalLM.from_pretrained(tmp_path / "after", **options)
        again = model.generate(**inputs, exit_policy="lossless", max_new_tokens=NEW, do_sample=False)
        assert torch.equal(again, said)
        assert count(model) == packed * linears(model)


def test_number_type_is_the_stored_one_unless_fp32_is_faster(tmp_path, monkeypatch):
    write_model(tmp_path / "m", "llama")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "m").config
    cpu = torch.device("cpu")
    assert fastest_dtype(config, cpu, True) == "auto"  # fp32 already: nothing narrower holds its numbers
    config.dtype = torch.bfloat16
    for seconds, want in ((1.0, "auto"), (1.1, "auto"), (1.3, torch.float32)):
        monkeypatch.setattr(
            number_type, "linear_seconds", lambda *_, s=seconds: {torch.bfloat16: s, torch.float32: 1.0}
        )
        assert fastest_dtype(config, cpu, True) == want
    assert fastest_dtype(config, torch.device("cuda"), True) == "auto"
    monkeypatch.setattr(number_type.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    assert fastest_dtype(config, cpu, True) == "auto"


@pytest.mark.parametrize("pack_weights", [True, False])
def test_number_types_are_timed(pack_weights):
    found = linear_seconds((torch.bfloat16, torch.float32), (40, 24), 3, pack_weights)
    assert set(found) == {torch.bfloat16, torch.float32}
    assert all(0 < seconds < 60 for seconds in found.values())
