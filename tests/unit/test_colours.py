"""Streaming text by layer: no character is lost or changed."""

import re

import pytest
import torch

from ee_scale.config.compose import compose_config
from ee_scale.data.builtin import train_tokenizer
from ee_scale.evaluation.colours import PieceStreamer, legend, paint

TEXT = "one tokén — reads\n\tthe 😀 hidden  state"


@pytest.mark.parametrize("step", [1, 3])
def test_pieces_make_the_text(step: int):
    tokenizer = train_tokenizer(["one token reads the hidden state " * 20], 280)
    ids, pieces = tokenizer(TEXT)["input_ids"], []
    assert len(ids) > 20  # characters of several tokens among them
    streamer = PieceStreamer(tokenizer, lambda piece, layer: pieces.append((piece, layer)))
    for _ in range(2):  # a streamer serves again after its end
        pieces.clear()
        streamer.put(torch.tensor([[5, 6, 7]]))
        for start in range(0, len(ids), step):
            new = ids[start : start + step]
            streamer.put_exits(new, [start + i for i in range(len(new))])
            streamer.put(torch.tensor(new))
        streamer.end()
        assert "".join(piece for piece, _ in pieces) == tokenizer.decode(ids)
        assert "\ufffd" not in "".join(piece for piece, _ in pieces)
        layers = [layer for _, layer in pieces]
        assert layers == sorted(layers)
        assert layers[-1] == len(ids) - 1


def test_a_batch_cannot_stream():
    with pytest.raises(ValueError, match="one row"):
        PieceStreamer(None, print).put(torch.zeros(2, 3))


def test_legend_and_colours():
    words = legend([3, 3, None, 6], [3, 6, 9], 12, "layers").plain
    assert words == "layers: layer 3: 2  layer 6: 1  layer 9: 0  all 12 layers: 1  mean depth 6.0"
    painted = paint("a\tb\n", [3, 6], 6)
    assert painted != paint("a\tb\n", [3, 6], 3)
    assert re.sub(r"\x1b\[[\d;]*m", "", painted) == "a\tb\n"


@pytest.mark.parametrize(
    "text",
    [
        "hello",
        "42",
        "true",
        "null",
        "a ${b}",
        "a\\${b}",
        "it's",
        "end\\",
        "[INST] hi [/INST]",
        "",
        "x\n\ty",
        "{x: 1}",
        "[",
    ],
)
def test_any_prompt_survives_hydras_grammar(text: str):
    assert compose_config("generate", ["model=m", f"prompt={text}"]).prompt == text


def test_flags_and_lists():
    config = compose_config("generate", ["model=m", "prompt=['a, b',c]", "--show-exits", "--max-new-tokens=4"])
    assert (list(config.prompt), config.show_exits, config.max_new_tokens) == (["a, b", "c"], True, 4)
