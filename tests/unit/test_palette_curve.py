"""Sizes of the palette benchmarks' decoder, and what a curve of losses says."""

from math import log
from pathlib import Path

import palette_curve
import pytest
from _palette_decoder import decoder_sizes, two_thirds
from helpers.models import tiny_config


@pytest.fixture
def smol(tmp_path: Path) -> str:
    """The shape of SmolLM2 135M."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    tiny_config("llama", num_hidden_layers=30, head_dim=64, vocab_size=49152, **sizes).save_pretrained(tmp_path)
    return str(tmp_path)


def test_sizes_follow_from_the_shape(smol: str) -> None:
    """From 90% to two thirds of the layers' parameters, of which the MLP has three quarters."""
    sizes = decoder_sizes(smol)
    parts = [depth / 30 * (0.25 + 0.75 * ffn / 1536) for ffn, depth in sizes]
    assert sizes == [(1536, 27), (1536, 25), (1280, 27), (1280, 25), (1536, 20), (1280, 22)]
    assert parts == sorted(parts, reverse=True)
    assert parts[0] == pytest.approx(0.9)
    assert parts[-2] == pytest.approx(2 / 3)
    ffn, depth = two_thirds(smol)
    assert (ffn, depth) == (1200, 24)


def test_few_layers_have_no_six_sizes(tmp_path: Path) -> None:
    tiny_config("llama", num_hidden_layers=4).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="4 layers; six sizes take 12"):
        decoder_sizes(str(tmp_path))


def test_a_power_law_is_found_again() -> None:
    points = [(0, 9.0)] + [(10**k, 3.0 + 2.0 * 10 ** (-0.3 * k)) for k in range(1, 7)]
    a, b = palette_curve.power_law(points, 3.0)
    assert (a, b) == (pytest.approx(2.0), pytest.approx(0.3))
    tokens = 10 ** (log(2.0 / 0.01, 10) / 0.3)
    assert f"about {tokens:.2g} tokens" in palette_curve.told(points, 3.0, 0.01)
    assert "within 0.2 nats of the full model after 10,000 tokens" in palette_curve.told(points, 3.0, 0.2)


def test_a_gap_that_grows_has_no_law() -> None:
    points = [(0, 4.0), (10, 4.1), (20, 4.2), (40, 4.3)]
    assert palette_curve.power_law(points, 3.0) is None
    assert "does not shrink" in palette_curve.told(points, 3.0, 0.15)
