"""Rows that join and leave say what they say alone; nothing of an earlier row is read in its place."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.decoding import (
    EOS,
    LAYERS,
    Pair,
    after_each_step,
    cache_error,
    limits_for,
    make_pair,
    spoil,
    valid_columns,
)
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList

from ee_scale.modeling.row_queue import QueuedRow, RowQueue

EXITS = (1, 2, 4)
LENGTHS = (9, 1, 14, 4, 2, 11, 6, 3)
NEWS = (5, 16, 3, 12, 1, 9, 14, 7)
PLACES, LONGEST = 3, 30
FAMILIES = (("llama", "layer", "low_rank"), ("qwen3", "norm", "tied"), ("mistral", "mlp", "shortlist"))
POLICIES = ("off", "threshold", "patience", "lossless")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("queue")


@pytest.fixture(scope="module")
def precise(folder) -> Pair:
    """In fp64, with exits that often agree with the final layer, and an end of text that comes now and then."""
    pair = make_pair(folder, "llama", "layer", "tied", EXITS, dtype=torch.float64, calm=0.3)
    said = [text(pair, ids, 16, "off")[0] for ids in prompts()]
    flat = [token for tokens in said for token in tokens]
    pair.model.generation_config.eos_token_id = pair.base.generation_config.eos_token_id = max(
        set(flat), key=flat.count
    )
    return pair


def prompts(count: int = len(LENGTHS)) -> list[list[int]]:
    """Of different lengths."""
    random = torch.Generator().manual_seed(3)
    return [torch.randint(3, EOS - 1, (LENGTHS[i % 8],), generator=random).tolist() for i in range(count)]


def rows_of(count: int = len(LENGTHS), **changes: Any) -> list[QueuedRow]:
    """With as many new tokens as `NEWS` says."""
    return [
        QueuedRow(ids, {"max_new_tokens": NEWS[i % 8], "do_sample": False}, **changes)
        for i, ids in enumerate(prompts(count))
    ]


def text(pair: Pair, ids: list[int], new: int, policy: str, **options: Any) -> tuple[list[int], list[int]]:
    """What a row says alone, up to and with its end, and the layers of its tokens."""
    got = pair.generate({"input_ids": torch.tensor([ids])}, policy, max_new_tokens=new, **options)
    tokens = got.sequences[0, len(ids) :].tolist()
    return tokens, [LAYERS] * len(tokens) if policy == "off" else got.exit_layers[0].tolist()


def options_for(pair: Pair, policy: str) -> dict[str, Any]:
    """Some tokens leave at every exit; of `fixed`, nearly all at one, and deeper layers wait."""
    if policy == "fixed":
        return {"exit_layer": 2, "exit_max_pending": 4}
    return {"exit_threshold": limits_for(pair, policy, (0.3, 0.4, 0.5))} if policy == "threshold" else {}


def decode(
    pair: Pair, rows: list[QueuedRow], policy: str, size: int = PLACES, look: Callable | None = None, **options: Any
) -> RowQueue:
    """All rows; `look(queue)` after each step."""
    with RowQueue(pair.model, {"exit_policy": policy, **options}, size, LONGEST) as queue:
        for row in rows:
            queue.add(row)
        while queue.busy:
            done = queue.step()
            assert all(row.ended for row in done)
            if look is not None:
                look(queue)
    return queue


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("family", "kind", "head"), [*FAMILIES, ("gemma2", "mlp", "tied")])
def test_every_row_says_what_it_says_alone(folder, family, kind, head, policy):
    pair = make_pair(folder, family, kind, head, EXITS, calm=0.3 if policy == "lossless" else 1.0)
    rows, options = rows_of(), options_for(pair, policy)
    queue = decode(pair, rows, policy, **options)
    for row in rows:
        tokens, layers = text(pair, row.prompt, row.settings["max_new_tokens"], policy, **options)
        assert row.tokens == tokens
        assert len(row.layers) == len(row.confidences) == len(tokens)
        if policy != "lossless":  # which drafts are made is measured
            assert row.layers == layers
    if policy == "threshold":
        assert {k for row in rows for k in row.layers} == {*EXITS, LAYERS}
    # Full as long as there is a next one: with 3 places and one token per step no fewer steps could do.
    if policy != "lossless":
        assert queue.stats()["passes"] < sum(NEWS) / PLACES + max(NEWS)
    if policy == "off":
        assert text(pair, rows[0].prompt, NEWS[0], "off")[0] == rows[0].tokens


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("policy", ["threshold", "fixed", "lossless"])
def test_caches_are_right_and_nothing_stale_is_read(precise, monkeypatch, policy, graphs):
    """Columns of earlier rows are full of garbage; what counts is right after every step."""
    options, errors = options_for(precise, policy) | {"exit_graphs": graphs}, []
    if policy == "threshold":  # now and then all rows leave early, and a deeper exit is not asked for some positions
        options["exit_threshold"] = limits_for(precise, policy, (0.8, 0.8, 0.5))

    def look(loop: Any) -> None:
        errors.append(cache_error(loop, precise.base))
        for slot, row in enumerate(loop.rows):  # nobody lacks more than came behind its own prompt
            assert min(valid_columns(loop, slot)) >= loop.sequences.parts[row].prompt_length
            # Nor have exits' own layers seen what is not there: padding behind a prompt.
            assert all(lengths[slot] <= loop.next[slot] for lengths in loop.runner.exit_lengths.values())
        spoil(loop)
        for store in loop.runner.cache.stores():
            store[len(loop.rows) :] = 1e4

    after_each_step(monkeypatch, look)
    rows = rows_of(12)
    decode(precise, rows, policy, **options)
    assert len(errors) > 12
    assert max(errors) < 1e-9
    monkeypatch.undo()
    for row in rows:
        alone = text(precise, row.prompt, row.settings["max_new_tokens"], policy, **options)
        assert row.tokens == alone[0]
    ends = [row.tokens[-1] == precise.model.generation_config.eos_token_id for row in rows]
    assert any(ends)
    assert not all(ends)


def test_drafts_are_copied_from_the_text_of_the_row_alone(precise):
    def look(queue: RowQueue) -> None:
        texts, loop = queue.texts, queue.loop
        assert set(loop.prompt.texts) <= set(loop.rows)
        for row, index in loop.prompt.texts.items():
            assert index.tokens == texts.ids[row, : texts.lengths[row]].tolist()
        seen.update(loop.prompt.texts)

    seen: set[int] = set()
    decode(precise, rows_of(), "lossless", look=look, exit_draft_sources="prompt", exit_draft_length=2)
    assert len(seen) == PLACES


@pytest.mark.parametrize("policy", ["threshold", "lossless"])
def test_memory_does_not_grow_with_prompts(precise, policy):
    sizes = []

    def look(queue: RowQueue) -> None:
        sizes.append(sum(store.numel() for store in queue.loop.runner.cache.stores()))

    decode(precise, rows_of(24), policy, look=look, **options_for(precise, policy))
    first = next(size for size in sizes if size)
    assert set(sizes) - {0} == {first}


@pytest.mark.parametrize("policy", ["off", "threshold", "lossless"])
def test_a_row_that_is_taken_out_disturbs_nobody(precise, policy):
    """While it decodes, while its prompt is read and while it waits; its place is free at once."""
    rows, options = rows_of(), options_for(precise, policy)
    taken = {2: rows[1], 4: rows[5], 5: rows[7]}
    steps = iter(range(1000))

    def look(queue: RowQueue) -> None:
        if (row := taken.get(next(steps))) is not None and not row.ended:
            had = len(queue.places)
            was_in = row in queue.places.values()
            queue.cancel(row)
            assert row not in queue.waiting
            assert len(queue.places) == had - was_in
            queue.cancel(row)  # again: nothing

    with RowQueue(precise.model, {"exit_policy": policy, **options}, PLACES, LONGEST) as queue:
        queue.chunk = 2  # prompts are read over several steps
        for row in rows:
            queue.add(row)
        while queue.busy:
            queue.step()
            look(queue)
    for row in rows:
        whole = text(precise, row.prompt, row.settings["max_new_tokens"], policy, **options)[0]
        assert row.tokens == (whole if row.ended else whole[: len(row.tokens)])
        assert row.ended or row in taken.values()
    assert not all(row.ended for row in rows)


def test_a_long_prompt_is_read_between_the_steps_of_others(precise):
    rows = [QueuedRow(ids, {"max_new_tokens": 12, "eos_token_id": None}) for ids in ([5, 6], [7] * 16)]
    with RowQueue(precise.model, {"exit_policy": "off"}, 2, LONGEST) as queue:
        queue.chunk = 2
        queue.add(rows[0])
        queue.step()
        queue.add(rows[1])
        seen = []
        for _ in range(8):
            queue.step()
            seen.append((queue.texts.lengths[0] - 2, queue.texts.lengths[1] - 16))
        # The first row gets a token in each step; the other one its first ones behind eight chunks of its prompt.
        assert [one for one, _ in seen] == list(range(3, 11))
        assert [other for _, other in seen] == [0] * 7 + [2]


def test_settings_are_each_row_s_own(precise, tmp_path):
    """Limits, processors, lengths, stop strings, random numbers."""
    ids = prompts(1)[0]
    calm = {"max_new_tokens": 10, "eos_token_id": None, "do_sample": False}
    loud = {**calm, "do_sample": True, "temperature": 1.5, "top_k": 20}
    limits = limits_for(precise, "threshold", (0.3, 0.4, 0.5))
    never = [2.0] * 3
    rows = [
        QueuedRow(ids, calm),
        QueuedRow(ids, calm, threshold=never),
        QueuedRow(ids, {**calm, "repetition_penalty": 1.6, "min_new_tokens": 4}),
        QueuedRow(ids, loud, seed=7),
        QueuedRow(prompts(2)[1], loud, seed=8),
        QueuedRow(ids, loud, seed=7),
    ]
    decode(precise, rows, "threshold", size=2, exit_threshold=limits)
    for row in rows[:3]:
        given = {"exit_threshold": row.threshold or limits, **row.settings}
        tokens, layers = text(precise, ids, given.pop("max_new_tokens"), "threshold", **given)
        assert (row.tokens, row.layers) == (tokens, layers)
    assert set(rows[1].layers) == {LAYERS}
    assert rows[3].tokens == rows[5].tokens != rows[0].tokens


@pytest.mark.parametrize("policy", ["off", "threshold", "lossless"])
def test_rankings_are_those_of_the_logits_that_a_token_was_chosen_from(precise, policy):
    """Before processors; of some rows only, whose neighbours say what they say alone."""
    options, rows = options_for(precise, policy), rows_of()
    for number, row in enumerate(rows):
        row.best = (None, 0, 3)[number % 3]
        row.settings["repetition_penalty"] = 1.2
    decode(precise, rows, policy, **options)
    for row in rows:
        tokens, _ = text(precise, row.prompt, row.settings["max_new_tokens"], policy, repetition_penalty=1.2, **options)
        assert row.tokens == tokens
        if row.best is None:
            assert row.rankings == []
            continue
        ids = torch.tensor([[*row.prompt, *tokens[:-1]]])
        with torch.no_grad():
            found = precise.model(ids)
        by_layer = {**found.exit_logits, LAYERS: found.logits}
        assert len(row.rankings) == len(tokens)
        for at, (ranking, token) in enumerate(zip(row.rankings, tokens, strict=True)):
            layer = row.layers[at] if policy == "threshold" else LAYERS
            logprobs = by_layer[layer][0, len(row.prompt) - 1 + at].float().log_softmax(-1)
            assert ranking.logprob == pytest.approx(float(logprobs[token]), abs=1e-4)
            top = logprobs.topk(row.best)
            assert [token for token, _ in ranking.best] == top.indices.tolist()
            assert [value for _, value in ranking.best] == pytest.approx(top.values.tolist(), abs=1e-4)


class Counting(LogitsProcessor):
    """Remembers."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return scores


def test_what_cannot_be_is_refused_and_disturbs_nobody(precise):
    ids = prompts(1)[0]
    good = {"max_new_tokens": 3, "eos_token_id": None}
    processors = LogitsProcessorList([Counting()])
    cases = [
        (QueuedRow([], good), "the prompt is empty"),
        (QueuedRow(ids, {"max_length": 60}), "a text of 60 tokens, but the queue's have at most 30"),
        (QueuedRow(ids, {**good, "do_sample": True}), "rows of one queue are all sampled, or none is"),
        (QueuedRow(ids, {**good, "num_beams": 3}), "exits decode greedily or by sampling, not by beam_search"),
        (QueuedRow(ids, {**good, "stop_strings": ["a"]}), r"stop_strings=\['a'\]: pass the tokenizer too"),
        (QueuedRow(ids, {**good, "logits_processor": processors}), "what remembers earlier calls needs rows in step"),
    ]
    with RowQueue(precise.model, {"exit_policy": "lossless"}, 2, LONGEST) as queue:
        queue.add(row := QueuedRow(ids, good))
        for other, message in cases:
            with pytest.raises(ValueError, match=message):
                queue.add(other)
        while queue.busy:
            queue.step()
    assert len(row.tokens) == 3
    with RowQueue(precise.model, {"exit_policy": "threshold", "exit_threshold": {2: 0.5}}, 2, LONGEST) as queue:
        with pytest.raises(ValueError, match="exit_threshold: no row of this queue leaves at layer 1"):
            queue.add(QueuedRow(ids, good, threshold=0.5))
        queue.add(row := QueuedRow(ids, {**good, "logits_processor": processors}))
        while queue.busy:
            queue.step()
    assert processors[0].calls == len(row.tokens) == 3  # once per token, as in plain decoding
    with pytest.raises(ValueError, match="max_new_tokens: no option of exits"):
        RowQueue(precise.model, {"exit_policy": "off", "max_new_tokens": 3}, 2, LONGEST)


def test_a_row_ends_behind_its_stop_string(folder, model_dir):
    pair = make_pair(folder, "llama", exits=EXITS)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    for policy in ("off", "lossless", "threshold"):
        options = options_for(pair, policy)
        rows = rows_of()
        free = text(pair, rows[1].prompt, 16, policy, **options)[0]
        word = tokenizer.convert_ids_to_tokens(free[6])
        rows[1].settings |= {"stop_strings": [tokenizer.decode(free[6:7]) or word], "tokenizer": tokenizer}
        decode(pair, rows, policy, **options)
        assert len(rows[1].tokens) <= 7 < 16
        assert rows[1].tokens == free[: len(rows[1].tokens)]
        assert len(rows[6].tokens) == 14


@pytest.mark.parametrize("audit", [0.0, 1.0])
def test_the_log_names_the_right_request(precise, audit):
    """A row's decisions under its own name and tag, in the order of their ends; the counts sum up."""

    class Log(list):
        def describe(self, **header: Any) -> None:
            self.header = header

        def add(self, *decision: Any) -> None:
            self.append(decision)

    rows, log = rows_of(), Log()
    for i, row in enumerate(rows):
        row.request, row.tag = f"r{i}", "ab"[i % 2]
    options = options_for(precise, "threshold")
    queue = decode(precise, rows, "threshold", exit_log=log, exit_audit=audit, **options)
    for i, row in enumerate(rows):
        mine = [line for line in log if line[0] == f"r{i}"]
        assert [line[1] for line in mine] == list(range(len(row.tokens)))
        assert [line[2] for line in mine] == row.layers
        assert {line[4] for line in mine} == {row.tag}
        if audit:  # every early token was compared in the end
            assert all((line[5] is not None) == (line[2] < LAYERS) for line in mine)
    assert len(log) == sum(len(row.tokens) for row in rows)
    early = sum(k < LAYERS for row in rows for k in row.layers)
    assert queue.stats().get("audited", 0) == (early if audit else 0)
    assert not queue.trail.waiting
    assert not queue.trail.agrees


def test_calibrated_limits_go_by_tag(precise):
    low, high = limits_for(precise, "threshold", (0.3, 0.4, 0.5)), [2.0] * 3
    tables = [{"thresholds": dict(zip(map(str, EXITS), limits, strict=True))} for limits in (low, high)]
    precise.model.generation_config.early_exit_calibration = {
        "policy": "threshold", **tables[1], "tags": {"easy": tables[0], "hard": tables[1]}
    }  # fmt: skip
    rows = rows_of()
    for i, row in enumerate(rows):
        row.tag = ("easy", "hard")[i % 2]
    try:
        with RowQueue(precise.model, {"exit_policy": "threshold"}, PLACES, LONGEST, tags=["easy", "hard"]) as queue:
            for row in rows:
                queue.add(row)
            while queue.busy:
                queue.step()
    finally:
        del precise.model.generation_config.early_exit_calibration
    for row in rows:
        limits = {"easy": low, "hard": high}[row.tag]
        tokens, layers = text(precise, row.prompt, row.settings["max_new_tokens"], "threshold", exit_threshold=limits)
        assert (row.tokens, row.layers) == (tokens, layers)


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
