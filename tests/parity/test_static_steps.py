"""Steps with static shapes do what others do; recorded parts need nothing but their tensors.

Attention over more columns (masked) adds up in another order: bit for bit holds where both look at the same columns.
"""

from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
from helpers.decoding import Pair, after_each_step, limits_for, make_pair, prompts
from helpers.host_reads import host_reads
from torch.fx.experimental.proxy_tensor import make_fx

from ee_scale.modeling import position_cache, static_runner
from ee_scale.modeling.layer_runner import Block, LayerRunner
from ee_scale.modeling.versions import CACHE

FAMILIES = ("llama", "qwen3", "mistral", "gemma2")
BODIES = (("mlp", "low_rank"), ("layer", "full"), ("norm", "shortlist"))
NEW = 24
POLICIES: dict[str, dict[str, Any]] = {
    "threshold": {},
    "lossless": {"exit_layer": 1, "exit_draft_length": 3},
    "lossless from the text": {"exit_draft_sources": "prompt", "exit_draft_length": 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("static")


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch) -> None:
    """The longest text passes several."""
    monkeypatch.setattr(static_runner, "BUCKET", 16)


def _generate(pair: Pair, rows: int, policy: str, **options: Any) -> Any:
    given = {"max_new_tokens": NEW, "output_logits": True, **POLICIES[policy]}
    if policy == "threshold":
        given["exit_threshold"] = limits_for(pair, "threshold", (0.4, 0.5))
    return pair.generate(prompts(rows), policy.split()[0], **{**given, **options})


def _same_columns(patch: pytest.MonkeyPatch) -> None:
    """The dynamic path, after the prompt, with a mask over as many columns as the static one."""
    block = LayerRunner.block
    patch.setattr(LayerRunner, "freeze", lambda self: setattr(self, "past_prompt", True))

    def wide(self: LayerRunner, starts: list[int], length: int) -> Block:
        found = block(self, starts, length)
        if not getattr(self, "past_prompt", False):
            return found
        end = static_runner._bucketed(found.end)
        if end > self.cos.shape[1]:
            self._rotary_table(end)
        columns = found.columns.expand(len(starts), -1)
        return Block(starts, length, None, columns, end, (self.cos[0][columns], self.sin[0][columns]))

    patch.setattr(LayerRunner, "block", wide)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, folder) -> Pair:
    return make_pair(folder, request.param, "mlp", "low_rank", calm=0.15, eos_token_id=None)


@pytest.fixture
def bits(monkeypatch) -> list[dict]:
    """For each call: logits by row and column, as long as no row has left; a matrix product of fewer rows may round
    differently.
    """
    calls: list[dict] = []

    def look(loop: Any) -> None:
        if loop.passes == 0:
            calls.append({})
        if not any(loop.sequences.done):
            calls[-1].update(loop.sequences.logits)

    after_each_step(monkeypatch, look)
    return calls


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_bits_from_the_same_columns(pair, bits, policy, rows):
    plain = _generate(pair, rows, policy)
    got = _generate(pair, rows, policy, exit_graphs=True)
    with pytest.MonkeyPatch.context() as patch:
        _same_columns(patch)
        wide = _generate(pair, rows, policy)
    for want in (plain, wide):
        assert torch.equal(got.sequences, want.sequences)
        assert torch.equal(got.exit_layers, want.exit_layers)
        assert got.exit_stats["layer_positions"] == want.exit_stats["layer_positions"]
        torch.testing.assert_close(got.exit_confidences, want.exit_confidences, equal_nan=True, rtol=1e-5, atol=1e-5)
        for mine, other in zip(got.logits, want.logits, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    _, mine, same = bits
    assert mine.keys() == same.keys()
    assert len(mine) > rows * NEW / 2
    assert all(torch.equal(mine[place], same[place]) for place in mine)


class Traced:
    """Stands in for a CUDA graph: a list of operations on tensors, found once; no Python of the part runs again."""

    made: ClassVar[Counter[str]] = Counter()
    replays: ClassVar[int] = 0

    def __init__(self, part: Any, inputs: tuple[torch.Tensor, ...]):
        self.inputs = tuple(value.clone() for value in inputs)
        part(*self.inputs)  # as the real one does, for what is set up at a first call
        with host_reads() as mode:
            part(*self.inputs)
        assert not mode.found
        self.graph = make_fx(lambda inputs: part(*inputs))(self.inputs)
        self.outputs = tuple(value.clone() for value in self.graph(self.inputs))
        Traced.made[getattr(part, "func", part).__name__] += 1

    def replay(self) -> None:
        Traced.replays += 1
        for kept, value in zip(self.outputs, self.graph(self.inputs), strict=True):
            kept.copy_(value)


@pytest.fixture
def traced(monkeypatch) -> type[Traced]:
    Traced.made.clear()
    Traced.replays = 0
    monkeypatch.setattr(static_runner, "recorder", lambda device: Traced)
    return Traced


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("kind", "head"), BODIES)
def test_recorded_parts(folder, traced, kind, head, policy, ends):
    """Rows leave the batch, exits catch up, buckets change: what was recorded is all that is needed."""
    pair = make_pair(folder, "llama", kind, head, dtype=torch.float64, calm=0.15, eos_token_id=None)
    options: dict[str, Any] = {"max_new_tokens": 40}
    if ends:
        free = _generate(pair, 4, policy, **options).sequences
        options["eos_token_id"] = [int(free[0, 9 + 5]), int(free[2, 9 + 14])]
    want = _generate(pair, 4, policy, **options)
    got = _generate(pair, 4, policy, exit_graphs=True, **options)
    assert torch.equal(got.sequences, want.sequences)
    assert torch.equal(got.exit_layers, want.exit_layers)
    torch.testing.assert_close(got.exit_confidences, want.exit_confidences, equal_nan=True)
    for mine, other in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(mine, other)
    reads = {"_head"} | ({"_one_layer"} if kind == "layer" else set())  # of exits
    copied = "exit_draft_sources" in POLICIES[policy]
    assert set(traced.made) == {"_layers", "_final"} | (set() if copied else reads)
    assert traced.replays > (1 if copied else 2) * sum(traced.made.values())
    assert (len({int(row.count_nonzero()) for row in got.exit_layers}) > 1) == ends


@pytest.mark.parametrize("policy", POLICIES)
def test_recordings_of_memory_that_moved_are_forgotten(pair, traced, monkeypatch, policy):
    """Text that outgrows the cache moves it, and the tables of positions."""
    make = static_runner.StaticRunner.__init__
    monkeypatch.setattr(static_runner.StaticRunner, "__init__", lambda self, *args: make(self, *args[:-1], 16))
    monkeypatch.setattr(position_cache, "GROWTH", 4)
    want = _generate(pair, 2, policy)
    got = _generate(pair, 2, policy, exit_graphs=True)
    assert torch.equal(got.sequences, want.sequences)
    assert torch.equal(got.exit_layers, want.exit_layers)


def test_audits_and_the_cache_that_is_handed_back(pair, monkeypatch):
    """What reads hidden states and keys behind the recorded parts' backs."""
    trails: list[dict] = []
    after_each_step(monkeypatch, lambda loop: trails.append(loop.trail.agrees))
    plain = _generate(pair, 4, "threshold", exit_audit=1.0)
    agrees = trails[-1]
    got = _generate(pair, 4, "threshold", exit_audit=1.0, exit_graphs=True)
    assert trails[-1] == agrees
    assert agrees
    for mine, theirs in zip(got[CACHE].layers, plain[CACHE].layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.values, theirs.values, rtol=1e-4, atol=1e-5)
