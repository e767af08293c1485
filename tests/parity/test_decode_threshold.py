"""Decoding with exits equals a slow loop without any cache that applies the same rule."""

from collections import Counter
from typing import Any

import pytest
import torch
from helpers.decoding import (
    LAYERS,
    PAD,
    Pair,
    after_each_step,
    cache_error,
    limits_for,
    make_pair,
    one_row,
    patience_rule,
    prompts,
    row_text,
    score_rule,
    slow_exits,
    spoil,
)
from helpers.models import VOCAB, some_tokens

FAMILIES = ("llama", "qwen3", "mistral")
BODIES = (("norm", "tied"), ("mlp", "full"), ("layer", "low_rank"), ("norm", "shortlist"))
EXITS = (1, 2, 4)
NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("threshold")


@pytest.fixture(scope="module")
def llama(folder) -> Pair:
    return make_pair(folder, "llama", "mlp", "full", EXITS)


def _check(pair: Pair, inputs: dict, rule: Any, caps: tuple[int, ...] = (0, 2, 8), **options: Any) -> Counter:
    """Texts and layers of all rows against the slow loop, for several caps; returns how often each layer was left."""
    rows = len(inputs["input_ids"])
    slow = [slow_exits(pair.model, one_row(inputs, row)["input_ids"], rule, NEW) for row in range(rows)]
    for cap in caps:
        got = pair.generate(inputs, max_new_tokens=NEW, exit_max_pending=cap, **options)
        for row, (tokens, layers) in enumerate(slow):
            assert row_text(got, inputs, row) == tokens, (cap, row)
            assert got.exit_layers[row, : len(layers)].tolist() == layers, (cap, row)
            assert (got.exit_layers[row, len(layers) :] == 0).all()
    return Counter(layer for _, layers in slow for layer in layers)


POLICIES = (("threshold",), ("threshold", "patience"), ("margin", "entropy"), ("entropy", "threshold", "patience"))
CASES = [
    (family, *body, policy)
    for i, family in enumerate(FAMILIES)
    for body, policies in zip(BODIES, POLICIES, strict=True)
    for policy in (policies if i == 0 else policies[i % len(policies) :][:1])
]


@pytest.mark.parametrize(("family", "kind", "head", "policy"), [*CASES, ("gemma2", "mlp", "tied", "threshold")])
def test_equals_a_loop_without_cache(folder, family, kind, head, policy):
    dtype = torch.float64 if (family, kind) == ("mistral", "layer") else torch.float32
    pair, inputs = make_pair(folder, family, kind, head, EXITS, dtype=dtype), prompts(5)
    if policy == "patience":
        used = _check(pair, inputs, patience_rule(EXITS, 2), policy=policy)
        assert used[LAYERS] > 5
        return
    limits = limits_for(pair, policy, (0.3, 0.4, 0.5))
    rule = score_rule(policy, dict(zip(EXITS, limits, strict=True)))
    used = _check(pair, inputs, rule, policy=policy, exit_threshold=limits)
    assert set(used) == {*EXITS, LAYERS}  # the rule was put to the test everywhere


def test_processors_that_forbid_a_whole_shortlist_are_refused(folder):
    """An exit has nothing to say then; the final layer has."""
    pair, inputs = make_pair(folder, "llama", "norm", "shortlist", EXITS), prompts(2)
    others = sorted(set(range(VOCAB)) - set(some_tokens()) - {PAD})
    options = {"max_new_tokens": 3, "prefix_allowed_tokens_fn": lambda row, ids: others}
    want = pair.reference(inputs, **options)
    assert torch.equal(pair.generate(inputs, "lossless", **options).sequences, want)
    with pytest.raises(ValueError, match=r"processors forbid all 37 tokens that the exit at layer 2 scores"):
        pair.generate(inputs, "fixed", exit_layer=2, **options)


def test_patience_leaves_when_exits_agree(folder):
    pair = make_pair(folder, "llama", "norm", "tied", EXITS, calm=0.15)
    assert _check(pair, prompts(5), patience_rule(EXITS, 2), policy="patience")[2] > 0
    assert _check(pair, prompts(5), patience_rule(EXITS, 3), (8,), policy="patience", exit_patience=3)[4] > 0
    first = _check(pair, prompts(5), patience_rule(EXITS, 1), (8,), policy="patience", exit_patience=1)
    assert set(first) == {1, LAYERS}


def test_fixed_exit(llama):
    for layer in EXITS:
        used = _check(llama, prompts(5), lambda exits, k=layer: k, policy="fixed", exit_layer=layer)
        assert set(used) == {layer, LAYERS}


def test_exits_that_are_left_out(llama):
    limits = limits_for(llama, "threshold", (0.3, 0.4, 0.5))
    by_layer = dict(zip(EXITS, limits, strict=True))
    later = score_rule("threshold", {k: by_layer[k] for k in (2, 4)})
    _check(llama, prompts(4), later, (8,), policy="threshold", exit_threshold=limits, exit_min_layer=2)
    some = score_rule("threshold", {2: by_layer[2]})
    _check(llama, prompts(4), some, (8,), policy="threshold", exit_threshold={2: by_layer[2]})
    one = score_rule("threshold", dict.fromkeys(EXITS, limits[1]))
    _check(llama, prompts(4), one, (8,), policy="threshold", exit_threshold=limits[1])


def test_limits_of_rows(llama):
    """Rows with limits of their own decode as they would alone, also when others have left the batch."""
    inputs = prompts(4)
    rows = [limits_for(llama, "threshold", shares) for shares in ((0.2,) * 3, (0.8, 0, 0), (0, 0, 0.9), (0.5,) * 3)]
    free = llama.generate(inputs, "threshold", max_new_tokens=NEW, exit_threshold=rows)
    eos = int(free.sequences[1, 12])  # row 1, at the latest, ends before the others
    got = llama.generate(inputs, "threshold", max_new_tokens=NEW, exit_threshold=rows, eos_token_id=eos)
    for row, limits in enumerate(rows):
        alone = one_row(inputs, row)
        want = llama.generate(alone, "threshold", max_new_tokens=NEW, exit_threshold=limits, eos_token_id=eos)
        text = row_text(want, alone, 0, eos)
        assert row_text(got, inputs, row, eos) == text
        assert got.exit_layers[row, : len(text)].tolist() == want.exit_layers[0].tolist()
        torch.testing.assert_close(
            got.exit_confidences[row, : len(text)], want.exit_confidences[0], equal_nan=True, rtol=1e-4, atol=1e-5
        )
    assert len(row_text(got, inputs, 1, eos)) < NEW


def test_confidences_are_those_of_the_exit(llama):
    inputs, limits = one_row(prompts(1), 0), limits_for(llama, "threshold", (0.3, 0.4, 0.5))
    got = llama.generate(inputs, "threshold", max_new_tokens=NEW, exit_threshold=limits)
    with torch.no_grad():
        exits = llama.model(got.sequences).exit_logits
    assert torch.isnan(got.exit_confidences[0, 0])
    for index in range(1, NEW):
        layer = int(got.exit_layers[0, index])
        asked = layer if layer < LAYERS else EXITS[-1]  # the last exit that was looked at
        p = exits[asked][0, inputs["input_ids"].shape[1] + index - 1].softmax(-1)
        assert float(got.exit_confidences[0, index]) == pytest.approx(float(p.max()), abs=1e-5)


@pytest.mark.parametrize(("kind", "head"), BODIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_limit_above_one_changes_nothing(folder, family, kind, head):
    pair, inputs = make_pair(folder, family, kind, head, EXITS), prompts(8)
    want = pair.reference(inputs, max_new_tokens=16)
    got = pair.generate(inputs, "threshold", exit_threshold=1.01, max_new_tokens=16)
    assert torch.equal(got.sequences, want)
    assert got.exit_stats["exit_checks"] == {}
    # Looked at, but never taken: still the same.
    got = pair.generate(inputs, "threshold", exit_threshold=1.0, max_new_tokens=16)
    assert torch.equal(got.sequences, want)
    assert set(got.exit_layers.unique().tolist()) <= {0, LAYERS}
    alone = one_row(inputs, 2)
    got = pair.generate(alone, "threshold", exit_threshold=2.0, max_new_tokens=16)
    assert torch.equal(got.sequences, pair.reference(alone, max_new_tokens=16))


@pytest.mark.parametrize("cap", [0, 2, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_caches_catch_up(folder, monkeypatch, family, cap):
    """What is known is right at every step, deeper layers never know more, and a flush makes all equal."""
    pair = make_pair(folder, family, "mlp", "tied", EXITS, dtype=torch.float64)
    flushed, errors = Counter(), []

    def look(loop: Any) -> None:
        errors.append(cache_error(loop, pair.base))
        assert loop.waiting == sorted(loop.waiting)
        assert loop.waiting[0] == 0
        assert loop.waiting[-1] <= cap
        flushed[loop.waiting[-1] == 0] += 1

    after_each_step(monkeypatch, look)
    limits = limits_for(pair, "threshold", (0.6, 0.8, 0.8))
    options = {"exit_threshold": limits, "exit_max_pending": cap}
    pair.generate(prompts(5), "threshold", max_new_tokens=NEW, **options)
    pair.generate(prompts(2), "threshold", max_new_tokens=2 * NEW, **options)
    assert max(errors) < 1e-9
    assert flushed[True]
    assert flushed[False] or cap == 0


def test_what_waits_moves_up_when_a_row_leaves(folder, monkeypatch):
    """Hidden states that wait at an exit belong to their row, wherever it stands in the batch."""
    pair, inputs = make_pair(folder, "llama", "norm", "tied", EXITS, dtype=torch.float64), prompts(5)
    options = {"exit_layer": 2, "exit_max_pending": 4, "max_new_tokens": NEW}
    free = pair.generate(inputs, "fixed", **options, eos_token_id=None)
    errors, flushed = [], Counter()

    def look(loop: Any) -> None:
        errors.append(cache_error(loop, pair.base))
        if len(loop.rows) < 5:
            flushed.update(row for row in loop.rows if loop.waiting[-1] == 0)

    after_each_step(monkeypatch, look)
    pair.generate(inputs, "fixed", **options, eos_token_id=int(free.sequences[0, 9 + 3]))
    assert max(errors) < 1e-9
    assert len(flushed) >= 3


@pytest.mark.parametrize(("kind", "head"), BODIES)
def test_columns_that_are_not_known_are_never_read(folder, monkeypatch, kind, head):
    pair, inputs = make_pair(folder, "mistral", kind, head, EXITS), prompts(5)
    limits = limits_for(pair, "threshold", (0.3, 0.4, 0.5))
    options = {"max_new_tokens": NEW, "exit_threshold": limits, "exit_max_pending": 4}
    want = pair.generate(inputs, "threshold", **options)
    after_each_step(monkeypatch, spoil)
    got = pair.generate(inputs, "threshold", **options)
    assert torch.equal(got.sequences, want.sequences)
    assert torch.equal(got.exit_layers, want.exit_layers)


def test_an_exit_behind_the_last_layer(folder):
    pair, inputs = make_pair(folder, "llama", "norm", "tied", (2, LAYERS)), prompts(3)
    limits = {2: 0.3, LAYERS: 0.2}
    for row in range(3):
        want, _ = slow_exits(pair.model, one_row(inputs, row)["input_ids"], score_rule("threshold", limits), NEW)
        got = pair.generate(inputs, "threshold", max_new_tokens=NEW, exit_threshold=limits)
        assert row_text(got, inputs, row) == want


@pytest.fixture
def watched(llama):
    """Shapes [rows, positions] that each layer sees per call, and rows that each exit's head sees."""
    runs: list[list[tuple[int, ...]]] = [[] for _ in range(LAYERS)]
    heads: dict[int, list[int]] = {k: [] for k in EXITS}

    def saw_head(kept: list[int], out: torch.Tensor) -> None:
        assert out.dim() == 2  # one position per row
        kept.append(len(out))

    handles = [
        layer.register_forward_hook(lambda m, args, out, kept=kept: kept.append(tuple(out.shape[:2])))
        for layer, kept in zip(llama.model.model.layers, runs, strict=True)
    ]
    handles += [
        llama.model.exit_heads[str(k)].head.register_forward_hook(lambda m, args, out, kept=kept: saw_head(kept, out))
        for k, kept in heads.items()
    ]
    yield runs, heads
    for handle in handles:
        handle.remove()


def test_skipped_layers_do_not_run(llama, watched):
    """A fixed exit: deeper layers run once per `cap + 1` tokens, on all that wait; heads see one position.

    Nobody wants the cache here, so what waits at the end is never computed.
    """
    inputs, cap, new = one_row(prompts(1), 0), 3, 14
    got = llama.generate(inputs, "fixed", exit_layer=2, exit_max_pending=cap, max_new_tokens=new, use_cache=False)
    runs, heads = [[shape[1] for shape in kept] for kept in watched[0]], watched[1]
    assert runs[1][1:] == runs[0][1:] == [1] * (new - 1)
    assert runs[2] == runs[3] == runs[4] == [9] + [cap + 1] * ((new - 1) // (cap + 1))
    assert heads == {1: [], 2: [1] * (new - 1), 4: []}
    assert got.exit_stats["layer_calls"] == [len(kept) for kept in runs]
    assert got.exit_stats["layer_positions"] == [sum(kept) for kept in runs]


@pytest.fixture(scope="module")
def limits(llama):
    return limits_for(llama, "threshold", (0.1, 0.3, 0.6))


def test_exits_after_the_chosen_one_are_not_computed(llama, limits, watched):
    layers, positions = [], 0
    for row in range(4):
        inputs = one_row(prompts(4), row)
        options = {"exit_threshold": limits, "exit_max_pending": 20, "max_new_tokens": 15, "use_cache": False}
        got = llama.generate(inputs, "threshold", **options)
        new = got.exit_layers[0, 1:].tolist()
        layers, positions = layers + new, positions + inputs["input_ids"].shape[1] + len(new)
    runs, heads = [[shape[1] for shape in kept] for kept in watched[0]], watched[1]
    assert set(layers) == {*EXITS, LAYERS}
    for k in EXITS:
        assert heads[k] == [1] * sum(layer >= k for layer in layers)
        assert len(runs[k - 1]) == 4 + sum(layer >= k for layer in layers)
    assert len(runs[4]) == 4 + layers.count(LAYERS)
    # Every position once: the prompts, and each token as far as it, or a later one, went.
    assert sum(runs[0]) == positions
    assert all(sum(kept) <= positions for kept in runs)


def test_batch_mates_come_along(llama, watched):
    """Where one row goes deeper, so do the others, each position once; what no row needs does not run."""
    inputs, shapes = prompts(2), watched[0]
    rows = [[0.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
    options = {"exit_max_pending": 20, "max_new_tokens": 10, "use_cache": False}
    got = llama.generate(inputs, "threshold", exit_threshold=rows, **options)
    assert got.exit_layers[:, 1:].tolist() == [[1] * 9, [LAYERS] * 9]
    assert all(kept[1:] == [(2, 1)] * 9 for kept in shapes)
    assert watched[1] == {1: [2] * 9, 2: [], 4: []}
    for kept in shapes:
        kept.clear()
    llama.generate(inputs, "threshold", exit_threshold=[rows[0]] * 2, **options)
    assert [len(kept) for kept in shapes] == [10, 1, 1, 1, 1]


def test_first_token_is_the_full_models(llama):
    """No exit while the prompt is read."""
    inputs = prompts(5)
    got = llama.generate(inputs, "fixed", exit_layer=1, max_new_tokens=1)
    assert torch.equal(got.sequences, llama.reference(inputs, max_new_tokens=1))
    assert got.exit_layers.tolist() == [[LAYERS]] * 5


def test_end_of_text_from_an_exit(llama):
    """An end that an exit says counts: the row stops, the others go on, nothing comes after it."""
    inputs = prompts(3)
    free = llama.generate(inputs, "fixed", exit_layer=1, max_new_tokens=NEW, eos_token_id=None)
    eos = int(free.sequences[0, 9 + 5])
    got = llama.generate(inputs, "fixed", exit_layer=1, max_new_tokens=NEW, eos_token_id=eos)
    for row in range(3):
        whole = free.sequences[row, 9:].tolist()
        cut = whole[: whole.index(eos) + 1] if eos in whole else whole
        assert row_text(got, inputs, row, eos) == cut
        assert set(got.sequences[row, 9 + len(cut) :].tolist()) <= {2}
