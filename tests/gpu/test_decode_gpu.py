"""Decoding with exits on the device: the tokens of transformers, in bf16 but for near ties; every policy."""

from pathlib import Path

import pytest
import torch
from helpers.cli import run_cli
from helpers.decoding import make_pair, prompts
from helpers.device import DEVICE, two_gpus
from transformers import AutoModelForCausalLM

from ee_scale.config.compose import compose_config
from ee_scale.grid import pick_device
from ee_scale.inference.request import checked_request
from ee_scale.inference.run import Answers, decode_here

pytestmark = pytest.mark.gpu

TEXTS = ["the layer reads", "an exit says what comes next", "a token", "if it is sure of it"]
NEAR = 2**-6  # of the largest logit: numbers of bf16 are 2**-8 apart, and kernels add up in another order


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(("kind", "head"), [("mlp", "full"), ("layer", "low_rank")])
def test_lossless_says_what_transformers_says(device, tmp_path, kind, head, graphs):
    pair = make_pair(tmp_path, "llama", kind, head, dtype=torch.float64)
    inputs = {name: value.to(device) for name, value in prompts(5).items()}
    pair.base.to(device), pair.model.to(device)
    want = pair.reference(inputs, max_new_tokens=24)
    for options in ({}, {"exit_layer": 1, "exit_draft_length": 3}):
        got = pair.generate(inputs, "lossless", max_new_tokens=24, exit_graphs=graphs, **options)
        assert torch.equal(got.sequences, want)


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "lossless", "do_sample": True},
        {"policy": "threshold", "exit_threshold": 0.02},
        {"policy": "patience"},
        {"policy": "threshold", "exit_threshold": 0.02, "exit_graphs": True},
        {"policy": "lossless", "exit_graphs": True},
    ],
)
def test_bf16_runs(device, tmp_path, options):
    pair = make_pair(tmp_path, "llama", "mlp", "low_rank", dtype=torch.bfloat16)
    pair.model.to(device)
    inputs = {name: value.to(device) for name, value in prompts(3).items()}
    got = pair.generate(inputs, max_new_tokens=16, **options)
    assert got.sequences.shape[1] <= 9 + 16
    assert got.exit_layers.shape == got.sequences[:, 9:].shape


def answers(folder: Path, device: str, *words: str) -> tuple[list[list[int]], Answers]:
    """(prompts, answers) of `ee-scale generate` in bf16."""
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("\n".join(TEXTS) + "\n")
    given = [f"model={folder}", f"prompts={prompts}", f"device={device}", "dtype=bf16", "max_new_tokens=24", *words]
    request = checked_request(compose_config("generate", given))
    return request.prompts, decode_here(request, pick_device(device))


@pytest.mark.parametrize(
    "words",
    [
        ["batch_size=1", "policy=lossless"],
        ["batch_size=4", "policy=lossless"],
        ["batch_size=4", "policy=lossless", "layer=1", "draft_length=3"],
        ["batch_size=4", "policy=threshold", "threshold=1.0"],  # none leaves
    ],
)
@torch.no_grad()
def test_bf16_leaves_the_text_of_all_layers_at_near_ties_alone(exported, device, words):
    """Kernels for one position and for several round otherwise, on every kind of device."""
    rows, reference = answers(exported, device, "policy=off", words[0])
    _, found = answers(exported, device, *words)
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.bfloat16, trust_remote_code=True).to(device)
    assert sum(map(len, found.tokens)) > len(TEXTS)
    for prompt, mine, theirs in zip(rows, found.tokens, reference.tokens, strict=True):
        at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
        if at is None:
            assert mine == theirs  # as long, too
            continue
        logits = model(torch.tensor([prompt + theirs[:at]], device=device)).logits[0, -1].float()
        assert abs(logits[mine[at]] - logits[theirs[at]]) <= NEAR * logits.abs().max()


def test_all_leave_at_one_exit(exported, device):
    _, found = answers(exported, device, "policy=fixed", "layer=1")
    for tokens, layers in zip(found.tokens, found.layers, strict=True):
        assert len(layers) == len(tokens) > 1
        assert set(layers[1:]) == {1}


@two_gpus
@pytest.mark.parametrize("grid", ["parallel.tp=2", "parallel.pp=2"])
def test_two_ranks_decode(exported, tmp_path, grid):
    words = [f"model={exported}", f"prompt={TEXTS[0]}", "policy=threshold", "threshold=0.5", "max_new_tokens=8"]
    finished = run_cli(["generate", *words, f"device={DEVICE}", grid], tmp_path, 2, device=DEVICE)
    assert finished.codes == [0, 0], finished.outputs
    assert "tokens/s" in finished.output
