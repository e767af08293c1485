"""How often decoding would wait for a GPU: once per token or cycle. Counted on a CPU, in the way a GPU is driven."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.decoding import LAYERS, Pair, after_each_step, limits_for, make_pair, prompts, script_drafts
from helpers.host_reads import host_reads

from ee_scale.modeling import early_exits, sources, transfers
from ee_scale.modeling.drafting import Drafting
from ee_scale.modeling.loop import DecodeLoop

NEW = 48
WAYS = {"greedy": {}, "sampled": {"do_sample": True, "top_k": 9, "temperature": 0.8}}
BODIES = (("mlp", "low_rank"), ("layer", "full"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reads")


@pytest.fixture(scope="module", params=BODIES, ids=lambda body: body[0])
def pair(request, folder) -> Pair:
    return make_pair(folder, "llama", *request.param, exits=(1, 3), calm=0.15, eos_token_id=None)


@pytest.fixture
def as_on_a_gpu(monkeypatch) -> None:
    """Waiting is dear."""
    for module in (early_exits, sources, transfers):
        monkeypatch.setattr(module, "waits_are_free", lambda device: False)


@pytest.fixture
def reads(monkeypatch) -> Callable[[], int]:
    """Host reads of the last call, of the loop and its prompt."""
    counts: list[int] = []
    run = DecodeLoop.run

    def counted(self: DecodeLoop, chunk: int | None) -> None:
        with host_reads() as mode:
            run(self, chunk)
        counts.append(sum(mode.found.values()))

    monkeypatch.setattr(DecodeLoop, "run", counted)
    return lambda: counts[-1]


def test_what_waits_is_counted():
    numbers = torch.arange(6)
    with torch.inference_mode(), host_reads() as mode:
        for look in (
            lambda: numbers.tolist(),
            lambda: numbers[0].item(),
            lambda: bool(numbers[1]),
            lambda: int(numbers[1]),
            lambda: numbers[numbers > 2],
            lambda: numbers.nonzero(),
            lambda: numbers[[1, 2]],
            lambda: torch.tensor([1], device=numbers.device),
            lambda: numbers.cpu(),
        ):
            before = sum(mode.found.values())
            look()
            assert sum(mode.found.values()) == before + 1
        before = mode.found.copy()
        numbers[1:3] = 4
        numbers.masked_fill(numbers > 2, 5)[numbers]
        early_exits.send([1, 2], numbers.device)
        assert mode.found == before


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(("limit", "layer"), [(1.0, LAYERS), (0.0, 1)])
def test_threshold(pair, as_on_a_gpu, reads, rows, limit, layer, way):
    got = pair.generate(prompts(rows), "threshold", exit_threshold=limit, max_new_tokens=NEW, **WAYS[way])
    assert set(got.exit_layers[:, 1:].unique().tolist()) == {layer}
    assert reads() <= 1.2 * NEW


@pytest.mark.parametrize("rows", [1, 4])
def test_threshold_where_tokens_leave_everywhere(pair, as_on_a_gpu, reads, rows):
    """An exit that is worth waiting for may be waited for in vain: then the final layer's token is read as well."""
    limits = limits_for(pair, "threshold", (0.4, 0.5))
    got = pair.generate(prompts(rows), "threshold", exit_threshold=limits, max_new_tokens=NEW)
    assert set(got.exit_layers[:, 1:].unique().tolist()) == {1, 3, LAYERS}
    assert reads() <= 3 * NEW


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    "options", [{}, {"exit_layer": 1, "exit_draft_length": 3}, {"exit_draft_sources": "prompt", "exit_draft_length": 3}]
)
def test_lossless(pair, as_on_a_gpu, reads, monkeypatch, options, rows, way):
    if not options:  # what is measured would decide how many, and whether any
        monkeypatch.setattr(Drafting, "goes_on", lambda self, drafted, chances: drafted < 2)
    got = pair.generate(prompts(rows), "lossless", max_new_tokens=NEW, **options, **WAYS[way])
    assert got.exit_stats["drafted"] > 0
    assert reads() <= 1.5 * got.exit_stats["cycles"]


@pytest.mark.parametrize("pattern", ["mixed", "all"])
def test_what_waiting_costs_changes_no_token(pair, as_on_a_gpu, monkeypatch, pattern):
    inputs = prompts(4)
    want = pair.reference(inputs, max_new_tokens=NEW)
    script_drafts(monkeypatch, pattern, want)
    assert torch.equal(pair.generate(inputs, "lossless", max_new_tokens=NEW).sequences, want)


@pytest.mark.parametrize("policy", ["threshold", "patience", "fixed"])
@pytest.mark.parametrize("kept", [{}, {"repetition_penalty": 1.3, "output_scores": True, "exit_audit": 1.0}])
def test_exits_say_the_same_however_they_are_asked(pair, monkeypatch, policy, kept):
    """Layers that run though nobody waited for the decision change neither tokens nor layers nor scores."""
    inputs, audits = prompts(4), []
    after_each_step(monkeypatch, lambda loop: audits.append(loop.trail))
    options: dict[str, Any] = {"max_new_tokens": NEW, **kept}
    if policy == "threshold":
        options["exit_threshold"] = limits_for(pair, "threshold", (0.4, 0.5))
    if policy == "fixed":
        options["exit_layer"] = 3
    want = pair.generate(inputs, policy, **options)
    agrees = audits[-1].agrees
    monkeypatch.setattr(early_exits, "waits_are_free", lambda device: False)
    for dear in (0.5, 100.0):
        monkeypatch.setattr(early_exits, "WAIT", dear)
        got = pair.generate(inputs, policy, **options)
        assert torch.equal(got.sequences, want.sequences)
        assert torch.equal(got.exit_layers, want.exit_layers)
        torch.testing.assert_close(got.exit_confidences, want.exit_confidences, equal_nan=True)
        found = audits[-1].agrees
        assert {place: found[place] for place in agrees} == agrees  # of those that left last, more may be known


@pytest.mark.parametrize("policy", ["lossless", "threshold"])
def test_cudnn_s_attention_rests_while_decoding(pair, monkeypatch, policy):
    """The process's switch is off in every step, and as it was afterwards: at the end, and after an error."""
    switch, seen = torch.backends.cuda, []
    kept = switch.cudnn_sdp_enabled()
    options = {"exit_threshold": 0.5} if policy == "threshold" else {}

    def look(loop: Any) -> None:
        seen.append(switch.cudnn_sdp_enabled())
        if len(seen) == 9:
            raise KeyError("in the middle")

    after_each_step(monkeypatch, look)
    try:
        switch.enable_cudnn_sdp(True)
        pair.generate(prompts(1), policy, max_new_tokens=5, **options)
        assert switch.cudnn_sdp_enabled()
        with pytest.raises(KeyError):
            pair.generate(prompts(1), policy, max_new_tokens=NEW, **options)
        assert switch.cudnn_sdp_enabled()
    finally:
        switch.enable_cudnn_sdp(kept)
    assert len(seen) == 9
    assert not any(seen)
