"""Lossless greedy decoding says token for token what transformers says, whatever the exits draft."""

from itertools import cycle, product
from typing import Any

import pytest
import torch
from helpers.decoding import (
    EOS,
    LAYERS,
    PAD,
    PADDING,
    PATTERNS,
    Pair,
    after_each_step,
    cache_error,
    make_pair,
    one_row,
    prompts,
    row_text,
    script_drafts,
    spoil,
    watch_drafts,
)
from helpers.models import some_tokens

from ee_scale.modeling.costs import MAX_DRAFT
from ee_scale.modeling.drafting import Drafting
from ee_scale.modeling.layer_runner import LayerRunner
from ee_scale.modeling.prompt_lookup import PromptSource, TextIndex
from ee_scale.modeling.sources import ExitSource

FAMILIES = ("llama", "qwen3", "mistral")
BODIES = (("norm", "tied"), ("mlp", "full"), ("layer", "low_rank"), ("norm", "shortlist"))
TEXT, INT8 = "prompt", "int8"  # in the place of an exit: drafts from the text; from exit 3 behind int8 layers
NEW = 14  # the longest text then has 23 tokens, the window 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lossless")


@pytest.fixture(scope="module", params=FAMILIES)
def precise(request, folder) -> tuple[Pair, dict, torch.Tensor]:
    """A model in fp64 whose exits agree with it now and then, ragged prompts, and what transformers makes of them."""
    pair = make_pair(folder, request.param, exits=(1, 3, 4), dtype=torch.float64, calm=0.15)
    inputs = prompts(5)
    return pair, inputs, pair.reference(inputs, max_new_tokens=NEW)


@pytest.fixture(scope="module")
def llama(folder) -> tuple[Pair, dict, torch.Tensor]:
    """The same in fp32; without an end of text."""
    pair = make_pair(folder, "llama", "mlp", "low_rank", exits=(1, 3), calm=0.15, eos_token_id=None)
    inputs = prompts(5)
    return pair, inputs, pair.reference(inputs, max_new_tokens=NEW)


def drafts_from(layer: int | str) -> dict[str, Any]:
    """Options that let one source draft."""
    if layer == INT8:
        return {"exit_layer": 3, "exit_draft_weights": "int8"}
    return {"exit_draft_sources": "prompt"} if layer == TEXT else {"exit_layer": layer}


@pytest.mark.parametrize(("kind", "head"), BODIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_says_what_transformers_says(folder, family, kind, head):
    pair, inputs = make_pair(folder, family, kind, head, exits=(1, 3), calm=0.3), prompts(8)
    want = pair.reference(inputs, max_new_tokens=20)
    ways = ({}, {"exit_draft_length": 4}, *({**drafts_from(way), "exit_draft_length": 2} for way in (3, TEXT, INT8)))
    for options in ways:
        assert torch.equal(pair.generate(inputs, "lossless", max_new_tokens=20, **options).sequences, want), options
    off = pair.model.generate(**inputs, max_new_tokens=20, do_sample=False, exit_policy="off")
    assert torch.equal(off, want)
    for row in (0, 7):  # the longest prompt and one of a single token
        alone = one_row(inputs, row)
        got = pair.generate(alone, "lossless", max_new_tokens=20)
        assert torch.equal(got.sequences, pair.reference(alone, max_new_tokens=20))


def test_capped_logits_and_eager_attention(folder):
    pair, inputs = make_pair(folder, "gemma2", "mlp", "tied", calm=0.3), prompts(5)
    for options in ({}, drafts_from(TEXT)):
        got = pair.generate(inputs, "lossless", max_new_tokens=20, exit_draft_length=3, **options)
        assert torch.equal(got.sequences, pair.reference(inputs, max_new_tokens=20))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("layer", [1, 3, 4, TEXT])
def test_any_drafts_leave_text_and_cache_right(precise, monkeypatch, layer, length, pattern):
    pair, inputs, want = precise
    errors: list[float] = []
    after_each_step(monkeypatch, lambda loop: errors.append(cache_error(loop, pair.base)))
    script_drafts(monkeypatch, pattern, want)
    got = pair.generate(inputs, "lossless", max_new_tokens=NEW, **drafts_from(layer), exit_draft_length=length)
    assert torch.equal(got.sequences, want)
    assert len(errors) == got.exit_stats["cycles"]
    assert max(errors) < 1e-9
    stats = got.exit_stats
    # A cycle gives a row its accepted drafts and one token more, unless the text ends before.
    counts = [len(row_text(want, inputs, row)) for row in range(5)]
    cut = sum(got.exit_sources[row][count - 1] is not None for row, count in enumerate(counts))
    cycles_of_rows = sum(counts) - 5 - stats["accepted"] + cut
    found_some = layer != TEXT or pattern != "natural"  # texts so short hardly repeat themselves
    assert found_some <= (stats["drafted"] > 0)
    assert stats["drafted"] <= cycles_of_rows * length
    if pattern == "none":
        assert stats["accepted"] == 0
    if pattern == "all":
        assert stats["cycles"] == -(-(NEW - 1) // (length + 1))
    told = LAYERS if layer == TEXT else layer
    assert set(got.exit_layers.unique().tolist()) <= {0, told, LAYERS}
    name = TEXT if layer == TEXT else f"exit {layer}"
    sources = [source for row in got.exit_sources for source in row]
    assert set(sources) <= {None, name}
    assert sources.count(name) == stats["accepted"] == stats["sources"][name]["accepted"]
    if layer != TEXT:
        assert int((got.exit_layers == layer).sum()) == stats["accepted"]


@pytest.mark.parametrize("pattern", ["natural", "mixed", "all"])
@pytest.mark.parametrize("length", [0, 1, 4])
def test_a_row_alone(precise, monkeypatch, length, pattern):
    pair, inputs, _ = precise
    for row, layer in ((0, 1), (1, 3), (3, 4), (0, TEXT), (4, TEXT)):
        alone = one_row(inputs, row)
        want = pair.reference(alone, max_new_tokens=NEW)
        with monkeypatch.context() as patch:
            script_drafts(patch, pattern, want)
            got = pair.generate(alone, "lossless", max_new_tokens=NEW, **drafts_from(layer), exit_draft_length=length)
        assert torch.equal(got.sequences, want)


def test_without_drafts_it_is_plain_decoding(precise):
    pair, inputs, want = precise
    got = pair.generate(inputs, "lossless", max_new_tokens=NEW, exit_draft_length=0)
    assert torch.equal(got.sequences, want)
    assert got.exit_stats["drafted"] == 0
    assert got.exit_stats["cycles"] == NEW - 1


@pytest.mark.parametrize(
    ("layer", "position"),
    # Ten tokens are the prompt's and more than two cycles of four; what drafts makes no difference after the first one.
    [(layer, position) for layer, places in ((3, 10), (TEXT, 5), (INT8, 5)) for position in range(places)],
)
@pytest.mark.parametrize("pattern", ["natural", "none", "all", "ends"])
def test_the_end_of_text_at_every_place(llama, monkeypatch, layer, pattern, position):
    """`ends`: every draft is an end, so nearly all are rejected."""
    pair, inputs, free = llama
    width, new = inputs["input_ids"].shape[1], 10
    eos = int(free[0, width + position])
    want = pair.reference(inputs, max_new_tokens=new, eos_token_id=eos)
    script_drafts(monkeypatch, "none" if pattern == "ends" else pattern, want)
    if pattern == "ends":
        monkeypatch.setattr(ExitSource, "pick", _always(ExitSource.pick, eos))
        monkeypatch.setattr(TextIndex, "continuation", lambda self, count: [eos] * count)
    options = {"eos_token_id": eos, "exit_draft_length": 3, **drafts_from(layer)}
    got = pair.generate(inputs, "lossless", max_new_tokens=new, **options)
    assert torch.equal(got.sequences, want)
    text = row_text(got, inputs, 0, eos)
    assert text[-1] == eos
    # The first token is the prompt's; then each cycle is three accepted drafts and a bonus.
    last = len(text) - 1
    drafted = {"all": last > 0 and (last - 1) % 4 < 3, "none": False}
    if pattern in drafted:
        name = {TEXT: TEXT, INT8: "exit 3 int8"}.get(layer, "exit 3")
        assert got.exit_sources[0][last] == (name if drafted[pattern] else None)
    for row in range(5):
        count = len(row_text(got, inputs, row, eos))
        assert (got.exit_layers[row, :count] > 0).all()
        assert (got.exit_layers[row, count:] == 0).all()
        assert (got.sequences[row, width + count :] == PAD).all()


def _always(draft: Any, token: int) -> Any:
    def drafts(self: ExitSource, *args: Any) -> tuple:
        tokens, scores, q = draft(self, *args)
        return torch.full_like(tokens, token), scores, q

    return drafts


def test_two_end_tokens(llama, monkeypatch):
    pair, inputs, free = llama
    width = inputs["input_ids"].shape[1]
    for pattern in ("none", "all"):
        for first, second in ((4, 6), (7, 3), (9, 9)):
            ends = [int(free[0, width + first]), int(free[1, width + second])]
            want = pair.reference(inputs, max_new_tokens=10, eos_token_id=ends)
            with monkeypatch.context() as patch:
                script_drafts(patch, pattern, want)
                got = pair.generate(inputs, "lossless", max_new_tokens=10, eos_token_id=ends, exit_draft_length=3)
            assert torch.equal(got.sequences, want)


@pytest.mark.parametrize("pattern", ["none", "mixed", "all"])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("layer", [1, TEXT, INT8])
def test_every_number_of_new_tokens(llama, monkeypatch, layer, length, pattern):
    pair, inputs, free = llama
    width = inputs["input_ids"].shape[1]
    for new in (1, 2, length, length + 1, length + 2):
        with monkeypatch.context() as patch:
            script_drafts(patch, pattern, free)
            options = {**drafts_from(layer), "exit_draft_length": length}
            got = pair.generate(inputs, "lossless", max_new_tokens=new, **options)
        assert torch.equal(got.sequences, free[:, : width + new])
        assert got.exit_layers.shape == got.exit_confidences.shape == (5, new)


def test_up_to_the_end_of_the_context(llama, monkeypatch):
    """The last position is used, none behind it."""
    pair, _, _ = llama
    context = pair.base.config.max_position_embeddings
    inputs = one_row(prompts(1, context - 4), 0)
    want = pair.reference(inputs, max_new_tokens=4)
    ends = []
    block = LayerRunner.block
    monkeypatch.setattr(
        LayerRunner, "block", lambda self, *args: ends.append(block(self, *args).end) or block(self, *args)
    )
    for pattern, layer in product(("none", "all"), (1, TEXT)):
        with monkeypatch.context() as patch:
            script_drafts(patch, pattern, want)
            got = pair.generate(inputs, "lossless", max_new_tokens=4, **drafts_from(layer), exit_draft_length=4)
        assert torch.equal(got.sequences, want)
    assert max(ends) <= context - 1  # the last token is not run


@pytest.mark.parametrize("pattern", ["natural", "mixed"])
@pytest.mark.parametrize(("kind", "head"), BODIES)
@pytest.mark.parametrize("layer", [3, TEXT])
def test_rejected_columns_are_never_read(folder, monkeypatch, layer, kind, head, pattern):
    pair, inputs = make_pair(folder, "llama", kind, head, exits=(1, 3), calm=0.15), prompts(5)
    want = pair.reference(inputs, max_new_tokens=NEW)
    clean = [_drafts(monkeypatch, pair, inputs, want, pattern, look, layer) for look in (None, spoil)]
    assert clean[0] == clean[1]


def _drafts(
    monkeypatch: Any, pair: Pair, inputs: dict, want: torch.Tensor, pattern: str, look: Any, layer: int | str
) -> list:
    with monkeypatch.context() as patch:
        if look is not None:
            after_each_step(patch, look)
        log = script_drafts(patch, pattern, want)
        got = pair.generate(inputs, "lossless", max_new_tokens=NEW, **drafts_from(layer), exit_draft_length=3)
    assert torch.equal(got.sequences, want)
    return log


@pytest.mark.parametrize(("kind", "head"), BODIES)
def test_drafts_are_what_the_exit_says(folder, monkeypatch, kind, head):
    """Wrong drafts would only be slow: nothing else notices a stale cache of an exit's own layer, or a wrong tap."""
    pair = make_pair(folder, "llama", kind, head, exits=(2, 4), dtype=torch.float64, calm=0.15)
    inputs, seen = prompts(5), watch_drafts(monkeypatch)
    for layer in (2, 4):
        pair.generate(inputs, "lossless", max_new_tokens=8, exit_layer=layer, exit_draft_length=3)
    pair.generate(inputs, "lossless", max_new_tokens=8, exit_draft_sources="exits")  # any of the exits, any number
    # An exit that comes back after a while finds rejected drafts of its own in its layer's cache.
    turns = cycle(["exit 2", "exit 4", "exit 4", "exit 4"])
    with monkeypatch.context() as patch:
        patch.setattr(Drafting, "start", lambda self, matches: next(turns))
        pair.generate(inputs, "lossless", max_new_tokens=14, exit_draft_length=4, exit_draft_sources="exits")
    assert len(seen) > 50
    with torch.no_grad():
        for k, text, token, confidence in seen:
            logits = pair.model(torch.tensor([text]), use_cache=False).exit_logits[k][0, -1]
            assert token == int(logits.argmax())
            assert confidence is None or confidence == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)
    assert any(confidence is not None for *_, confidence in seen)


def test_rows_do_not_depend_on_one_another(llama):
    pair, inputs, want = llama
    for order in ([4, 2, 0, 3, 1], [3, 3], [1, 4, 2]):
        some = {name: value[order] for name, value in inputs.items()}
        for options in (
            {},
            {"exit_layer": 1, "exit_draft_length": 5},
            drafts_from(TEXT),
            {"exit_shortlist": list(range(0, 131, 2))},
        ):
            got = pair.generate(some, "lossless", max_new_tokens=NEW, **options)
            assert torch.equal(got.sequences, want[order])


SHORT = [("norm", "tied"), ("norm", "full"), ("mlp", "low_rank"), ("layer", "tied"), ("norm", "shortlist")]


@pytest.mark.parametrize(("kind", "head"), SHORT)
def test_drafts_from_a_shortlist(folder, monkeypatch, kind, head):
    pair, inputs = make_pair(folder, "llama", kind, head, dtype=torch.float64, calm=0.15), prompts(5)
    want = pair.reference(inputs, max_new_tokens=NEW)
    said = set(want[:, 9:].flatten().tolist()) - {EOS, PAD}
    if head == "shortlist":
        said &= set(some_tokens())  # nothing else can be asked for
    common = sorted(said, reverse=True)[:40]
    seen = watch_drafts(monkeypatch)
    got = pair.generate(
        inputs, "lossless", max_new_tokens=NEW, exit_layer=3, exit_draft_length=2, exit_shortlist=common
    )
    assert torch.equal(got.sequences, want)
    assert got.exit_stats["accepted"] > 0
    with torch.no_grad():
        for k, text, token, _ in seen:
            logits = pair.model(torch.tensor([text]), use_cache=False).exit_logits[k][0, -1]
            assert token == common[int(logits[common].argmax())]


def test_an_exit_behind_the_last_layer(folder):
    """Its drafts cost as much as the truth; still a legal place for an exit."""
    pair, inputs = make_pair(folder, "llama", exits=(2, LAYERS)), prompts(5)
    want = pair.reference(inputs, max_new_tokens=8)
    for options in ({}, {"exit_layer": LAYERS, "exit_draft_length": 2}):
        assert torch.equal(pair.generate(inputs, "lossless", max_new_tokens=8, **options).sequences, want)


def test_bf16_differs_only_at_near_ties(folder):
    """No bitwise claim: passes over one and several rows round differently. The first difference must be a near tie."""
    pair, inputs = make_pair(folder, "llama", exits=(1, 3), dtype=torch.bfloat16, calm=0.15), prompts(8)
    want = pair.reference(inputs, max_new_tokens=40)
    differing = 0
    for options in ({"exit_layer": 3, "exit_draft_length": 4}, {**drafts_from(TEXT), "exit_draft_length": 2}):
        got = pair.generate(inputs, "lossless", max_new_tokens=40, **options).sequences
        for row in range(8):
            text, other = row_text(got, inputs, row), row_text(want, inputs, row)
            place = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), None)
            if place is None:
                assert len(text) == len(other)
                continue
            differing += 1
            prefix = torch.cat([one_row(inputs, row)["input_ids"], torch.tensor([text[:place]], dtype=torch.long)], 1)
            with torch.no_grad():
                logits = pair.base(prefix, use_cache=False).logits[0, -1].float()
            top = logits.topk(2)
            assert {text[place], other[place]} == set(top.indices.tolist())
            ulp = 2.0 ** (torch.frexp(top.values[0]).exponent.item() - 8)
            assert top.values[0] - top.values[1] <= 4 * ulp
    assert differing <= 8  # of 16


def test_layers_run_as_often_as_promised(llama, monkeypatch):
    """Early layers once per drafted token and once for the last one, deep layers once per cycle."""
    pair, inputs, _ = llama
    runs = [[] for _ in range(LAYERS)]
    handles = [
        layer.register_forward_hook(lambda m, args, out, runs=runs, i=i: runs[i].append(out.shape[1]))
        for i, layer in enumerate(pair.model.model.layers)
    ]
    try:
        for batch, layer, length in ((one_row(inputs, 1), 1, 3), (inputs, 3, 2)):
            for kept in runs:
                kept.clear()
            got = pair.generate(batch, "lossless", max_new_tokens=NEW, exit_layer=layer, exit_draft_length=length)
            cycles, rows = got.exit_stats["cycles"], len(got.sequences)
            drafts = sum(runs[0][1:]) - cycles  # of each row that was there
            assert runs[0][1:] == [1] * (drafts + cycles)
            assert all(runs[i] == runs[0] for i in range(layer))
            assert all(len(runs[i]) == 1 + cycles for i in range(layer, LAYERS))
            assert all(runs[i] == runs[-1] for i in range(layer, LAYERS))
            assert sum(runs[-1][1:]) == drafts + cycles
            assert got.exit_stats["layer_calls"] == [len(kept) for kept in runs]
            assert got.exit_stats["exit_checks"][layer] == drafts
            if rows == 1:
                assert got.exit_stats["drafted"] == drafts
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("kind", ["norm", "mlp", "layer"])
@pytest.mark.parametrize("options", [{}, {"exit_layer": 3}, {"exit_layer": 3, "exit_draft_length": 3}])
@pytest.mark.parametrize("rows", [1, 5])
def test_exits_that_never_agree_cost_next_to_nothing(folder, monkeypatch, kind, options, rows):
    """Counted: passes of every layer over what plain decoding needs, looks at exits, and rows that are verified."""
    pair = make_pair(
        folder, "llama", kind, "full", exits=(1, 3), calm=0.15, eos_token_id=None, max_position_embeddings=256
    )
    inputs, new = prompts(rows), 200
    want = pair.reference(inputs, max_new_tokens=new)
    script_drafts(monkeypatch, "none", want)
    got = pair.generate(inputs, "lossless", max_new_tokens=new, exit_draft_sources="exits", **options)
    assert torch.equal(got.sequences, want)
    stats, exits = got.exit_stats, 1 if "exit_layer" in options else 2
    # Three tries, and one after 16, 32, 64 and 128 cycles, of each exit; prompts are looked at once.
    tries = 7 * exits * options.get("exit_draft_length", MAX_DRAFT)
    assert stats["accepted"] == 0
    assert stats["cycles"] == new - 1
    if "exit_draft_length" in options:
        assert stats["drafted"] == rows * (3 * 3 + 3)
    assert sum(stats["exit_checks"].values()) <= tries + 2
    assert all(new <= calls <= new + tries for calls in stats["layer_calls"])
    assert stats["layer_calls"][-1] == new


@pytest.mark.parametrize("rows", [1, 5])
def test_a_text_that_repeats_itself_is_copied(folder, monkeypatch, rows):
    """Lookups alone, as many drafts as are right: fewer passes, each over the drafts through all layers."""
    pair = make_pair(folder, "llama", exits=(1, 3), calm=0.02, eos_token_id=None, max_position_embeddings=256)
    inputs = prompts(rows)
    want = pair.reference(inputs, max_new_tokens=120)
    seen = []
    draft = PromptSource.draft
    monkeypatch.setattr(PromptSource, "draft", lambda self, c: seen.append((self, c, draft(self, c))) or seen[-1][2])
    got = pair.generate(inputs, "lossless", max_new_tokens=120, exit_draft_length=4, **drafts_from(TEXT))
    assert torch.equal(got.sequences, want)
    fate = got.exit_stats["sources"][TEXT]
    assert fate["cycles"] == len(seen) > 10
    assert fate["drafted"] == sum(sum(d.counts) for *_, d in seen)
    assert fate["accepted"] > 0.4 * fate["drafted"]
    assert got.exit_stats["cycles"] < 100
    assert got.exit_stats["layer_calls"] == [1 + got.exit_stats["cycles"]] * LAYERS
    for row, text in seen[-1][0].texts.items():  # padding is no part of them
        assert text.tokens == want[row, PADDING[row] * (rows > 1) :].tolist()
