"""Decoding of every family: lossless, threshold, off, against no cache at all."""

from pathlib import Path

import pytest
import torch
from helpers.decoding import make_pair, one_row, prompts, row_text, score_rule, slow_exits
from helpers.models import FAMILIES as WITH_AXES
from helpers.models import MORE_FAMILIES, VARIANTS

from ee_scale.families.registry import FAMILIES

DECODED = (*WITH_AXES, *MORE_FAMILIES, *VARIANTS)
EXITS = (1, 3)
NEW = 8  # behind prompts of up to 9 tokens: longer than a window


@pytest.mark.parametrize("family", DECODED)
def test_equals_decoding_without_a_cache(tmp_path: Path, family: str) -> None:
    kind = "norm" if FAMILIES[family.partition("-")[0]].parallel else "mlp"
    pair, inputs = make_pair(tmp_path, family, kind, "full", EXITS, calm=0.5), prompts(3)
    rows = [one_row(inputs, row)["input_ids"] for row in range(3)]
    texts = [slow_exits(pair.model, prompt, lambda exits: None, NEW)[0] for prompt in rows]
    for policy in ("off", "lossless"):
        got = pair.generate(inputs, policy, max_new_tokens=NEW)
        assert [row_text(got, inputs, row) for row in range(3)] == texts, policy
    said = torch.cat([pair.model(prompt).exit_logits[1][0] for prompt in rows])
    limit = float(said.detach().softmax(-1).amax(-1).median())  # about half of the tokens leave
    rule, used = score_rule("threshold", dict.fromkeys(EXITS, limit)), set()
    got = pair.generate(inputs, "threshold", exit_threshold=limit, max_new_tokens=NEW)
    for row, prompt in enumerate(rows):
        tokens, layers = slow_exits(pair.model, prompt, rule, NEW)
        assert row_text(got, inputs, row) == tokens
        assert got.exit_layers[row, : len(layers)].tolist() == layers
        used |= set(layers)
    assert len(used) > 1
