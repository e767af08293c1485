"""Drafts of int8 layers: the text stays the model's, whatever they say; its layers and cache stay its own."""

import gc
import threading
import weakref

import pytest
import torch
from helpers.decoding import (
    LAYERS,
    PATTERNS,
    after_each_step,
    cache_error,
    make_pair,
    one_row,
    prompts,
    script_drafts,
    spoil,
    watch_drafts,
)
from torch import nn

from ee_scale.modeling import int8_layers as module
from ee_scale.modeling import packing
from ee_scale.modeling.drafting import Drafting
from ee_scale.modeling.int8_layers import Int8Linear, int8_layers

NEW = 14
INT8 = {"exit_draft_weights": "int8"}
FAMILIES = {
    "llama": ("mlp", "low_rank"),
    "qwen3": ("layer", "full"),
    "mistral": ("norm", "shortlist"),
    "gemma2": ("mlp", "tied"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("int8")


@pytest.fixture(scope="module", params=FAMILIES)
def small(request, folder):
    pair = make_pair(folder, request.param, *FAMILIES[request.param], calm=0.15)
    inputs = prompts(5)
    return pair, inputs, pair.reference(inputs, max_new_tokens=NEW)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (0, 64)])
@torch.no_grad()
def test_an_int8_layer_is_its_linear_layer_up_to_rounding(dtype, shape):
    torch.manual_seed(0)
    plain, x = nn.Linear(64, 48).to(dtype), torch.randn(shape, dtype=dtype)
    got, want = Int8Linear(plain.weight, plain.bias)(x), plain(x)
    assert got.dtype == dtype
    assert got.shape == want.shape
    assert float((got - want).float().norm()) <= 0.02 * float(want.float().norm())
    assert torch.equal(Int8Linear(torch.zeros(48, 64))(torch.ones(1, 64)), torch.zeros(1, 48))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("length", [1, 4])
def test_any_drafts_leave_text_and_cache_right(small, monkeypatch, length, pattern):
    pair, inputs, want = small
    errors: list[float] = []
    after_each_step(monkeypatch, lambda loop: errors.append(cache_error(loop, pair.base)))
    script_drafts(monkeypatch, pattern, want)
    for layer in (1, 3):
        options = {"exit_layer": layer, "exit_draft_length": length, **INT8}
        got = pair.generate(inputs, "lossless", max_new_tokens=NEW, **options)
        assert torch.equal(got.sequences, want)
        assert max(errors) < 1e-4
        stats = got.exit_stats
        assert set(stats["sources"]) == {f"exit {layer} int8"}
        assert stats["layer_calls"] == [1 + stats["cycles"]] * LAYERS  # every layer verifies, none drafts
        assert int((got.exit_layers == layer).sum()) == stats["accepted"]
        if pattern == "all":
            assert stats["cycles"] == -(-(NEW - 1) // (length + 1))
        if pattern == "none":
            assert stats["accepted"] == 0


@pytest.mark.parametrize("pattern", ["natural", "mixed"])
def test_rejected_columns_are_never_read(small, monkeypatch, pattern):
    pair, inputs, want = small
    logs = []
    for look in (None, spoil):
        with monkeypatch.context() as patch:
            if look is not None:
                after_each_step(patch, look)
            logs.append(script_drafts(patch, pattern, want))
            options = {"exit_layer": 3, "exit_draft_length": 3, **INT8}
            got = pair.generate(inputs, "lossless", max_new_tokens=NEW, **options)
        assert torch.equal(got.sequences, want)
    assert logs[0] == logs[1]


def test_drafts_are_nearly_those_of_the_exit(small, monkeypatch):
    """Wrong drafts would only be slow: nothing else notices a hole in what they look back at."""
    pair, inputs, _ = small
    seen = watch_drafts(monkeypatch)
    for layer in (1, 3):
        for batch in (inputs, one_row(inputs, 1)):
            options = {"exit_layer": layer, "exit_draft_length": 3, **INT8}
            pair.generate(batch, "lossless", max_new_tokens=NEW, **options)
    right = []
    with torch.no_grad():
        for k, text, token, _ in seen:
            logits = pair.model(torch.tensor([text]), use_cache=False).exit_logits[k][0, -1]
            right.append(float(logits.max() - logits[token]) <= 0.1 * float(logits[logits.isfinite()].std()))
    assert len(right) > 50
    assert sum(right) >= 0.95 * len(right)


def test_both_kinds_of_drafts_take_turns(small, monkeypatch):
    pair, inputs, want = small

    def turns(self: Drafting, matches: list[int]) -> str:
        self.current = sorted(self.sources)[self.cycles % len(self.sources)]
        return self.current

    monkeypatch.setattr(Drafting, "start", turns)
    monkeypatch.setattr(Drafting, "goes_on", lambda self, drafted, chances: drafted < 2)
    got = pair.generate(inputs, "lossless", max_new_tokens=NEW, exit_draft_sources="exits", **INT8)
    assert torch.equal(got.sequences, want)
    sources = got.exit_stats["sources"]
    assert set(sources) == {"exit 1", "exit 1 int8", "exit 3", "exit 3 int8"}
    assert sum(fate["cycles"] > 0 for fate in sources.values()) >= 3


def test_the_model_stays_as_it_is(folder, monkeypatch):
    monkeypatch.setattr(packing, "SMALLEST", 1)
    pair, inputs = make_pair(folder, "llama", "mlp", "full", calm=0.15), prompts(3)
    want = pair.reference(inputs, max_new_tokens=NEW)
    before = {name: value.clone() for name, value in pair.model.state_dict().items()}
    for _ in range(2):
        assert torch.equal(pair.generate(inputs, "lossless", max_new_tokens=NEW, **INT8).sequences, want)
        kinds = {type(part) for part in pair.model.modules()}
        assert Int8Linear not in kinds
        if packing.packs(torch.float32):
            assert nn.Linear not in kinds  # still packed
    copies = int8_layers(pair.model, 1)
    assert copies[0] is int8_layers(pair.model, 3)[0]
    assert not [part for part in copies[0].modules() if isinstance(part, nn.Linear)]
    assert copies[0].input_layernorm.weight is pair.model.model.layers[0].input_layernorm.weight
    assert all(torch.equal(value, before[name]) for name, value in pair.model.state_dict().items())


def test_hooks_of_others_are_not_copied(folder):
    """Another generation may be watching the layers while copies are made."""
    pair, calls = make_pair(folder, "llama", "mlp", "tied"), []
    layer = pair.model.model.layers[0]
    layer.register_forward_hook(lambda *_: calls.append("layer"))
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append("mlp"))
    (copied,) = int8_layers(pair.model, 1)
    assert not copied._forward_hooks
    assert not copied.mlp._forward_pre_hooks
    assert len(layer._forward_hooks) == len(layer.mlp._forward_pre_hooks) == 1


def test_copies_go_with_their_model(folder):
    pair = make_pair(folder, "llama", "norm", "tied")
    kept = weakref.ref(int8_layers(pair.model, 2)[1])
    assert kept() is not None
    del pair
    gc.collect()
    assert kept() is None


def test_two_threads_draft_with_one_model(folder):
    pair, inputs = make_pair(folder, "llama", "mlp", "full", calm=0.15), prompts(5)
    want, said = pair.reference(inputs, max_new_tokens=NEW), {}

    def decode(number: int) -> None:
        options = {"exit_layer": 3, "exit_draft_length": 1 + number, **INT8}
        said[number] = pair.generate(inputs, "lossless", max_new_tokens=NEW, **options).sequences

    threads = [threading.Thread(target=decode, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(said[number], want) for number in range(2))


def test_what_has_no_int8_drafts_says_so(folder, monkeypatch):
    pair, inputs = make_pair(folder, "llama", dtype=torch.float64), prompts(2)
    for policy, options, said in (
        ("lossless", INT8, "exit_draft_weights=int8: the model is in torch.float64"),
        ("lossless", {"exit_draft_weights": "int4"}, "exit_draft_weights='int4': choose one of model, int8"),
        ("fixed", {"exit_layer": 1, **INT8}, "exit_draft_weights='int8': only exit_policy=lossless"),
        ("lossless", {"exit_graphs": True, **INT8}, "exit_graphs=True: int8 drafts are not recorded"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            pair.generate(inputs, policy, max_new_tokens=2, **options)
        assert "\n" not in str(error.value)
    other = make_pair(folder, "llama")
    monkeypatch.setattr(module, "_multiplies", lambda device: False)
    with pytest.raises(ValueError, match="no int8 products on cpu"):
        other.generate(inputs, "lossless", max_new_tokens=2, **INT8)
