"""Processors, criteria and streamers that keep count are called with exits as they are without."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.decoding import Pair, make_pair, one_row, prompts, script_drafts
from transformers import (
    EosTokenCriteria,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

NEW = 24
LOSSLESS = ("lossless", {"exit_layer": 3, "exit_draft_length": 3})
COPIED = ("lossless", {"exit_draft_sources": "prompt", "exit_draft_length": 3})
POLICIES = [LOSSLESS, COPIED, ("lossless", {}), ("threshold", {"exit_threshold": 2.0})]
SYNTHID = SynthIDTextWatermarkingConfig(ngram_len=5, keys=[654, 400, 836, 123, 340, 443, 597])


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    folder = tmp_path_factory.mktemp("calls")
    return make_pair(folder, "llama", "mlp", "tied", calm=0.15, eos_token_id=None)


class Counting(LogitsProcessor):
    """Says something else at every call, and remembers what it was called with."""

    def __init__(self):
        self.seen: list[list[list[int]]] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.seen.append(input_ids.tolist())
        scores = scores.clone()
        scores[:, (7 * len(self.seen)) % scores.shape[1]] += 3
        return scores


class CountingPenalty(RepetitionPenaltyLogitsProcessor):
    """One of transformers' own, with a count on top."""

    def __init__(self):
        super().__init__(1.2)
        self.calls = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.calls += 1
        self.penalty = 1.0 + self.calls % 3
        return super().__call__(input_ids, scores)


class OnTheClass(LogitsProcessor):
    """Counts where all of its kind see it."""

    calls = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        type(self).calls += 1
        scores = scores.clone()
        scores[:, self.calls % scores.shape[1]] += 3
        return scores


def _in_a_closure() -> LogitsProcessor:
    calls = []

    class Inner(LogitsProcessor):
        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            calls.append(1)
            scores = scores.clone()
            scores[:, len(calls) % scores.shape[1]] += 3
            return scores

    return Inner()


IN_A_MODULE = [0]


class InAModule(LogitsProcessor):
    """Counts where nobody would look."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        IN_A_MODULE[0] += 1
        scores = scores.clone()
        scores[:, IN_A_MODULE[0] % scores.shape[1]] += 3
        return scores


def _allowed() -> dict[str, Any]:
    calls = []

    def allowed(row: int, text: torch.Tensor) -> list[int]:
        calls.append(row)
        return [(len(calls) + 13 * i) % 131 for i in range(20)]

    return {"prefix_allowed_tokens_fn": allowed}


def _fresh(cls: type) -> dict[str, Any]:
    OnTheClass.calls = IN_A_MODULE[0] = 0
    return {"logits_processor": LogitsProcessorList([cls()])}


MADE: dict[str, Callable[[], dict[str, Any]]] = {
    "synthid": lambda: {"watermarking_config": SYNTHID},
    "watermark": lambda: {"watermarking_config": WatermarkingConfig(bias=4.0)},
    "counting": lambda: _fresh(Counting),
    "counting penalty": lambda: _fresh(CountingPenalty),
    "on the class": lambda: _fresh(OnTheClass),
    "in a module": lambda: _fresh(InAModule),
    "in a closure": lambda: {"logits_processor": [_in_a_closure()]},
    "allowed": _allowed,
    "many": lambda: (
        _fresh(Counting)
        | {
            "repetition_penalty": 1.3,
            "no_repeat_ngram_size": 2,
            "exponential_decay_length_penalty": (3, 1.1),
            "sequence_bias": {(5,): 2.0, (7, 9): -3.0},
            "forced_eos_token_id": 17,
            "eos_token_id": 1,
            "suppress_tokens": [21],
            "begin_suppress_tokens": [22],
            "min_new_tokens": 4,
            "bad_words_ids": [[4]],
            "renormalize_logits": True,
        }
    ),
}


@pytest.mark.parametrize("pattern", ["natural", "mixed", "all", "none"])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", MADE)
def test_the_same_text(pair, monkeypatch, name, rows, pattern):
    inputs = prompts(rows)
    want = pair.reference(inputs, max_new_tokens=NEW, **MADE[name]())
    assert not torch.equal(want, pair.reference(inputs, max_new_tokens=NEW))
    script_drafts(monkeypatch, pattern, want)
    for policy, options in POLICIES if pattern == "natural" else POLICIES[:1]:
        got = pair.generate(inputs, policy, max_new_tokens=NEW, **options, **MADE[name]())
        assert torch.equal(got.sequences, want), (policy, options)
        if pattern == "all" and name != "many":
            assert got.exit_stats["cycles"] == -(-(NEW - 1) // 4)


@pytest.mark.parametrize("pattern", ["natural", "mixed", "all"])
@pytest.mark.parametrize(("policy", "options"), POLICIES)
def test_each_call_is_one_token(pair, monkeypatch, policy, options, pattern):
    """Rows that end early included: the calls themselves are those of plain decoding."""
    inputs = prompts(5)
    free = pair.reference(inputs, max_new_tokens=NEW, **_fresh(Counting))
    ends = [int(free[0, 9 + 5]), int(free[2, 9 + 9])]
    theirs, mine = Counting(), Counting()
    want = pair.reference(inputs, max_new_tokens=NEW, logits_processor=[theirs], eos_token_id=ends)
    script_drafts(monkeypatch, pattern, want)
    got = pair.generate(inputs, policy, max_new_tokens=NEW, logits_processor=[mine], eos_token_id=ends, **options)
    assert torch.equal(got.sequences, want)
    assert mine.seen == theirs.seen


@pytest.mark.parametrize("options", [{"exit_threshold": [0.024, 0.024]}, {"exit_threshold": [0.0, 0.0]}])
def test_rows_that_leave_at_different_exits(pair, options):
    """One call for all rows, behind the texts as they are."""
    inputs, counting = prompts(5), Counting()
    got = pair.generate(inputs, "threshold", max_new_tokens=NEW, logits_processor=[counting], **options)
    width = inputs["input_ids"].shape[1]
    assert len(got.exit_layers.unique()) > 1
    assert counting.seen == [got.sequences[:, : width + step].tolist() for step in range(NEW)]


class Stops(StoppingCriteria):
    """Ends rows in turn, by the number of its calls."""

    def __init__(self):
        self.seen: list[tuple[list[list[int]], Any]] = []

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        self.seen.append((input_ids.tolist(), scores if scores is None else [score.shape for score in scores]))
        return torch.tensor([len(self.seen) > 4 + 3 * row for row in range(len(input_ids))])


@pytest.mark.parametrize("pattern", ["natural", "all"])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("kept", [{}, {"output_scores": True}])
@pytest.mark.parametrize(("policy", "options"), POLICIES)
def test_criteria_that_count(pair, monkeypatch, policy, options, rows, pattern, kept):
    inputs, theirs, mine = prompts(rows), Stops(), Stops()
    kept = {"return_dict_in_generate": True, "eos_token_id": 1, **kept}
    want = pair.reference(inputs, max_new_tokens=NEW, stopping_criteria=[theirs], **kept).sequences
    script_drafts(monkeypatch, pattern, want)
    got = pair.generate(inputs, policy, max_new_tokens=NEW, stopping_criteria=[mine], **kept, **options)
    assert torch.equal(got.sequences, want)
    assert mine.seen == theirs.seen


class AnotherEnd(EosTokenCriteria):
    """Added to what the config says; transformers' own class takes its place."""


@pytest.mark.parametrize("pattern", ["natural", "all"])
@pytest.mark.parametrize("longest", [None, 14, 40])
@pytest.mark.parametrize("end", [None, EosTokenCriteria, AnotherEnd])
@pytest.mark.parametrize(("policy", "options"), POLICIES)
def test_criteria_in_the_place_of_the_config(pair, monkeypatch, policy, options, end, longest, pattern):
    inputs = prompts(5)
    free = pair.reference(inputs, max_new_tokens=NEW)
    given = {"max_new_tokens": NEW, "eos_token_id": int(free[0, 9 + 5])}
    criteria = [] if end is None else [end(eos_token_id=[int(free[0, 9 + 3]), int(free[2, 9 + 9])])]
    criteria += [] if longest is None else [MaxLengthCriteria(max_length=longest)]
    want = pair.reference(inputs, stopping_criteria=criteria, **given)
    script_drafts(monkeypatch, pattern, want)
    got = pair.generate(inputs, policy, stopping_criteria=criteria, **given, **options)
    assert torch.equal(got.sequences, want)


class Puts:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.values: list[list] = []

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.tolist())

    def end(self) -> None:
        self.values.append([])


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("policy", "options"), POLICIES)
def test_streamers_get_a_token_at_a_time(pair, monkeypatch, policy, options, rows):
    inputs, theirs, mine = prompts(rows), Puts(), Puts()
    free = pair.reference(inputs, max_new_tokens=NEW)
    given = {"max_new_tokens": NEW, "eos_token_id": int(free[0, 9 + 5])}
    want = pair.reference(inputs, streamer=theirs, **given)
    script_drafts(monkeypatch, "mixed", want)
    pair.generate(inputs, policy, streamer=mine, **given, **options)
    assert mine.values == theirs.values


@pytest.mark.parametrize("policy", ["lossless", "threshold"])
def test_sampling_with_a_count(pair, policy):
    """Sampled among one: every token is the only one that the counting processor leaves."""

    class Only(LogitsProcessor):
        def __init__(self):
            self.calls = 0

        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            self.calls += 1
            only = torch.full_like(scores, float("-inf"))
            only[:, 3 + (5 * self.calls) % 100] = 0.0
            return only

    given = {"max_new_tokens": NEW, "do_sample": True}
    want = pair.reference(prompts(3), logits_processor=[Only()], **given)
    options = {"exit_threshold": 0.02} if policy == "threshold" else {"exit_draft_length": 3}
    got = pair.generate(prompts(3), policy, logits_processor=[Only()], **given, **options)
    assert torch.equal(got.sequences, want)


def test_a_processor_with_state_samples_from_the_right_distribution(pair):
    """SynthID by many short samples: the share of each second token, against the model's own."""
    inputs = {name: value.expand(400, -1) for name, value in one_row(prompts(1), 0).items()}
    given = {"max_new_tokens": 3, "do_sample": True, "top_k": 4, "watermarking_config": SYNTHID}
    shares = []
    for run in (
        pair.reference,
        lambda *args, **kw: pair.generate(*args, "lossless", exit_draft_length=2, **kw).sequences,
    ):
        torch.manual_seed(0)
        rounds = [run(inputs, **given)[:, 9:] for _ in range(3)]
        codes = torch.cat(rounds)
        shares.append(torch.stack([torch.bincount(codes[:, i], minlength=131) / len(codes) for i in range(3)]))
    assert float((shares[0] - shares[1]).abs().max()) < 0.07
