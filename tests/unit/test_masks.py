"""Layers get the masks that transformers built for the shape before, and nothing is read by the host for them."""

from typing import Any

import pytest
import torch
from helpers.models import FAMILIES, SLIDING_WINDOW, VOCAB, tiny_config
from torch import nn
from transformers import AutoModelForCausalLM

from ee_scale.backbone.masks import HandedMasks
from ee_scale.modeling.heads import run_single_layer

LENGTH = 3 * SLIDING_WINDOW
READS = ("item", "tolist", "cpu", "__bool__", "__float__", "__int__", "__index__")


def forbid_reads(patch: pytest.MonkeyPatch) -> None:
    """On a GPU each of these waits."""

    def read(*_: object) -> None:
        raise AssertionError("the host reads a tensor")

    for name in READS:
        patch.setattr(torch.Tensor, name, read)


@pytest.fixture(params=FAMILIES)
def base(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(request.param)).eval().base_model


def tokens(seed: int, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))


def call(base: nn.Module, **inputs: Any) -> torch.Tensor:
    return base(**inputs, use_cache=False).last_hidden_state


@pytest.mark.parametrize("attention", ["", "eager"])
@torch.no_grad()
def test_same_states_and_no_reads(base: nn.Module, attention: str) -> None:
    if attention:
        base.set_attn_implementation(attention)
    batches = [tokens(0), tokens(1), tokens(2, LENGTH - 3), tokens(3, LENGTH - 3)]
    expected = [call(base, input_ids=ids) for ids in batches]
    masks = HandedMasks(base.layers)
    for number, (ids, states) in enumerate(zip(batches, expected, strict=True)):
        with masks.handed(base.layers, ids) as given, pytest.MonkeyPatch.context() as patch:
            assert bool(given) == (number % 2 == 1)  # the second batch of a shape
            if given:
                forbid_reads(patch)
            found = call(base, input_ids=ids, **given)
        assert torch.equal(found, states)


@torch.no_grad()
def test_one_layer_alone(base: nn.Module) -> None:
    """As exits run their own layers: each of its own kind of attention."""
    masks = HandedMasks(base.layers)
    for seed in range(2):
        hidden = torch.randn(2, LENGTH, base.config.hidden_size, generator=torch.Generator().manual_seed(seed))
        for layer in base.layers:
            expected = run_single_layer(base, layer, hidden)
            with masks.handed([layer], hidden) as given:
                assert bool(given) == (seed == 1)
                assert torch.equal(run_single_layer(base, layer, hidden, **given), expected)


def test_a_model_without_layers_is_handed_nothing(base: nn.Module) -> None:
    """A stage of which a subnet has none; a text classifier's call has a mask of its own then too."""
    with HandedMasks(base.layers).handed([], tokens(0)) as given:
        assert given == {}


@torch.no_grad()
def test_calls_outside_are_their_own_business(base: nn.Module) -> None:
    """A cache, or padding, has other masks, which must not come back later."""
    masks, ids = HandedMasks(base.layers), tokens(0)
    padding = torch.ones_like(ids).index_fill(1, torch.arange(5), 0)
    padded = call(base, input_ids=ids, attention_mask=padding)
    expected = call(base, input_ids=ids)
    for _ in range(2):
        with masks.handed(base.layers, ids) as given:
            assert torch.equal(call(base, input_ids=ids, **given), expected)
        assert torch.equal(call(base, input_ids=ids, attention_mask=padding), padded)
    assert not torch.equal(padded[:, 5:], expected[:, 5:])
