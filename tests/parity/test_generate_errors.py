"""What cannot be done is refused in one line that names the option, before anything runs."""

from typing import Any

import pytest
import torch
from helpers.decoding import Pair, make_pair, prompts
from transformers import StaticCache

CONTEXT = 64


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("errors"), "llama", "mlp", "tied", exits=(1, 3))


def _ids(rows: int, columns: int) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.full((rows, columns), 5, dtype=torch.long),
        "attention_mask": torch.ones(rows, columns, dtype=torch.long),
    }


RIGHT = {"input_ids": torch.full((2, 4), 5), "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}
HOLE = {"input_ids": torch.full((2, 4), 5), "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])}
NO_TEXT = {"input_ids": torch.full((2, 4), 5), "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])}
SURE = {"exit_policy": "threshold", "exit_threshold": 0.5}
LOSSLESS = {"exit_policy": "lossless"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"exit_policy": "speed"}, "exit_policy='speed'"),
        ({"exit_threshold": 0.5}, "exit_threshold.*exit_policy"),
        ({"exit_policy": "threshold"}, "exit_threshold.*calibrate"),
        ({"exit_policy": "threshold", "exit_threshold": [0.5]}, "exit_threshold.*1 limits for 2 exits"),
        ({"exit_policy": "threshold", "exit_threshold": float("nan")}, "exit_threshold.*nan"),
        ({"exit_policy": "threshold", "exit_threshold": [[0.5, 0.5]]}, "exit_threshold.*1 rows .* 2 rows"),
        ({"exit_policy": "fixed", "exit_layer": 2}, "exit_layer=2.*1, 3"),
        ({**LOSSLESS, "exit_layer": 4}, "exit_layer=4.*1, 3"),
        ({"exit_policy": "fixed", "exit_layer": 1, "exit_min_layer": 3}, "exit_layer=1 is above exit_min_layer=3"),
        ({"exit_policy": "threshold", "exit_threshold": {"a": 1}}, "exit_threshold: no exit at layer a"),
        ({**LOSSLESS, "exit_min_layer": 4}, "exit_min_layer=4.*1, 3"),
        ({**LOSSLESS, "exit_shortlist": [131]}, r"exit_shortlist.*131 is not in 0\.\.130"),
        ({**LOSSLESS, "num_beams": 2}, "exit_policy.*beam"),
        ({**LOSSLESS, "assistant_early_exit": 1}, "exit_policy.*assisted"),
        ({**LOSSLESS, "prompt_lookup_num_tokens": 2}, "exit_policy.*assisted"),
        ({**LOSSLESS, "cache_implementation": "static"}, "exit_policy.*StaticCache"),
        ({**LOSSLESS, "guidance_scale": 2.0}, "exit_policy.*guidance_scale"),
        ({**LOSSLESS, "output_hidden_states": True}, "exit_policy.*output_hidden_states"),
        ({**LOSSLESS, "output_attentions": True}, "exit_policy.*output_attentions"),
        ({**LOSSLESS, "custom_generate": lambda *args: None}, "exit_policy.*custom_generate"),
        ({**LOSSLESS, "stop_strings": ["a"]}, "stop_strings.*tokenizer"),
        ({**LOSSLESS, "exit_graphs": "yes"}, "exit_graphs='yes': give true or false"),
        ({**SURE, "exit_tags": ["sql"]}, "exit_tags: 1 values for 2 prompts"),
        ({**SURE, "exit_requests": ["a"]}, "exit_requests: 1 values for 2 prompts"),
        ({**SURE, "exit_audit": 1.5}, "exit_audit=1.5"),
        ({**SURE, "exit_audit": float("nan")}, "exit_audit=nan"),
        ({**SURE, **RIGHT}, "attention_mask: row 1 .*left"),
        ({**LOSSLESS, **HOLE}, "attention_mask: row 1 .*left"),
        ({**LOSSLESS, **NO_TEXT}, "prompt of row 1 is empty"),
        ({**SURE, **_ids(1, 0)}, "prompt is empty"),
        ({**LOSSLESS, "input_ids": torch.full((1, CONTEXT + 1), 5)}, f"{CONTEXT + 1} tokens.*{CONTEXT}"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_one_line_that_names_the_option(pair, options, says):
    ran: list[Any] = []
    handle = pair.model.model.layers[0].register_forward_hook(lambda *args: ran.append(1))
    inputs = prompts(2)
    if "input_ids" in options:
        inputs = {"attention_mask": torch.ones_like(options["input_ids"])}
    try:
        with pytest.raises(ValueError, match=says) as caught:
            pair.model.generate(**{**inputs, "max_new_tokens": 4, **options})
    finally:
        handle.remove()
    assert "\n" not in str(caught.value)
    assert not ran


def test_caches_of_other_kinds(pair):
    cache = StaticCache(config=pair.model.config, max_cache_len=32)
    with pytest.raises(ValueError, match=r"exit_policy.*StaticCache"):
        pair.generate(prompts(2), "lossless", past_key_values=cache, max_new_tokens=4)


def test_attention_without_masks_of_ours(pair):
    kept = pair.model.config._attn_implementation
    pair.model.config._attn_implementation = "flex_attention"
    try:
        with pytest.raises(ValueError, match=r"flex_attention.*sdpa"):
            pair.generate(prompts(2), "lossless", max_new_tokens=4)
    finally:
        pair.model.config._attn_implementation = kept


def test_a_full_context_is_fine(pair):
    inputs = _ids(2, CONTEXT - 2)
    want = pair.reference(inputs, max_new_tokens=2)
    assert torch.equal(pair.generate(inputs, "lossless", max_new_tokens=2).sequences, want)
