"""Decoding with exits on one GPU: the tokens of transformers in fp32, and every policy in bf16."""

import pytest
import torch
from helpers.decoding import make_pair, prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(("kind", "head"), [("mlp", "full"), ("layer", "low_rank")])
def test_lossless_says_what_transformers_says(tmp_path, kind, head, graphs):
    pair = make_pair(tmp_path, "llama", kind, head, dtype=torch.float64)
    inputs = {name: value.cuda() for name, value in prompts(5).items()}
    pair.base.cuda(), pair.model.cuda()
    want = pair.reference(inputs, max_new_tokens=24)
    for options in ({}, {"exit_layer": 1, "exit_draft_length": 3}):
        got = pair.generate(inputs, "lossless", max_new_tokens=24, exit_graphs=graphs, **options)
        assert torch.equal(got.sequences, want)


@pytest.mark.parametrize(
    "options",
    [
        {"exit_policy": "lossless", "do_sample": True},
        {"exit_policy": "threshold", "exit_threshold": 0.02},
        {"exit_policy": "patience"},
        {"exit_policy": "threshold", "exit_threshold": 0.02, "exit_graphs": True},
        {"exit_policy": "lossless", "exit_graphs": True},
    ],
)
def test_bf16_runs(tmp_path, options):
    pair = make_pair(tmp_path, "llama", "mlp", "low_rank", dtype=torch.bfloat16)
    pair.model.cuda()
    inputs = {name: value.cuda() for name, value in prompts(3).items()}
    got = pair.generate(inputs, max_new_tokens=16, policy=options["exit_policy"], **_rest(options))
    assert got.sequences.shape[1] <= 9 + 16
    assert got.exit_layers.shape == got.sequences[:, 9:].shape


def _rest(options: dict) -> dict:
    return {name: value for name, value in options.items() if name != "exit_policy"}
