"""transformers' own options of `generate` do with exits what they do without."""

import threading
from typing import Any

import pytest
import torch
from helpers.decoding import (
    LAYERS,
    Pair,
    make_pair,
    one_row,
    prompts,
    row_text,
    script_drafts,
    slow_exits,
    watch_drafts,
)
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, StoppingCriteria, TextStreamer

from ee_scale.data.builtin import train_tokenizer
from ee_scale.modeling.versions import CACHE, CACHE_NAMES

NEW = 14
LIMITS = [0.024, 0.024]  # these models are never sure of anything
# Every way to decode that must not change the text.
EXACT = (
    ("lossless", {"exit_layer": 3, "exit_draft_length": 3}),
    ("lossless", {}),
    ("threshold", {"exit_threshold": 2.0}),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("options")


@pytest.fixture(scope="module")
def llama(folder) -> Pair:
    return make_pair(folder, "llama", "mlp", "tied", calm=0.15, eos_token_id=None)


class History(LogitsProcessor):
    """Forbids a token that the whole text before decides, and favours another; rows are treated differently."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.clone()
        rows = torch.arange(len(scores))
        scores[rows, (input_ids.sum(1) + 3 * input_ids[:, -1] + rows) % scores.shape[1]] = float("-inf")
        scores[rows, (input_ids[:, -2] * 7 + rows) % scores.shape[1]] += 4
        return scores


PROCESSORS = {
    "repetition": {"repetition_penalty": 1.7},
    "no repeats": {"no_repeat_ngram_size": 2},
    "grammar": {
        "prefix_allowed_tokens_fn": lambda row, text: [(int(text[-1]) * 5 + row + i * 13) % 131 for i in range(9)]
    },
    "own": {"logits_processor": [History()]},
    "both": {"logits_processor": [History()], "repetition_penalty": 1.3, "bad_words_ids": [[5], [7, 9]]},
}


@pytest.mark.parametrize("pattern", ["natural", "mixed", "all"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_processors(llama, monkeypatch, name, pattern):
    inputs = prompts(5)
    want = llama.reference(inputs, max_new_tokens=NEW, **PROCESSORS[name])
    assert not torch.equal(want, llama.reference(inputs, max_new_tokens=NEW))
    script_drafts(monkeypatch, pattern, want)
    for policy, options in EXACT if pattern == "natural" else EXACT[:1]:
        got = llama.generate(inputs, policy, max_new_tokens=NEW, **options, **PROCESSORS[name])
        assert torch.equal(got.sequences, want), (policy, options)
        if pattern == "all":
            assert got.exit_stats["cycles"] == -(-(NEW - 1) // 4)


def test_drafts_follow_the_processors(llama, monkeypatch):
    """An exit drafts what the processors leave of it, behind its own earlier drafts: else few would be accepted."""
    inputs, own = one_row(prompts(1), 0), History()
    seen = watch_drafts(monkeypatch)
    llama.generate(inputs, "lossless", max_new_tokens=NEW, logits_processor=[own], exit_layer=3, exit_draft_length=3)
    assert len(seen) > 8
    with torch.no_grad():
        for k, text, token, _ in seen:
            ids = torch.tensor([text])
            assert token == int(own(ids, llama.model(ids).exit_logits[k][:, -1]).argmax())


@pytest.mark.parametrize(("policy", "options"), EXACT)
def test_min_new_tokens(llama, policy, options):
    inputs = prompts(5)
    free = llama.reference(inputs, max_new_tokens=NEW)
    eos = int(free[0, 9 + 3])
    want = llama.reference(inputs, max_new_tokens=NEW, min_new_tokens=8, eos_token_id=eos)
    assert not torch.equal(want, llama.reference(inputs, max_new_tokens=NEW, eos_token_id=eos))
    got = llama.generate(inputs, policy, max_new_tokens=NEW, min_new_tokens=8, eos_token_id=eos, **options)
    assert torch.equal(got.sequences, want)


class EndsOn(StoppingCriteria):
    """A row ends behind some tokens, or at a length of its own text."""

    def __init__(self, tokens: list[int]):
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        return torch.isin(input_ids[:, -1], self.tokens)


@pytest.mark.parametrize("pattern", ["natural", "all"])
@pytest.mark.parametrize(("policy", "options"), EXACT)
def test_own_stopping_criteria(llama, monkeypatch, policy, options, pattern):
    inputs = prompts(5)
    free = llama.reference(inputs, max_new_tokens=NEW)
    ends = EndsOn([int(free[0, 9 + 5]), int(free[2, 9 + 9])])
    # Without any end token transformers writes on in rows that have ended, until all have.
    want = llama.reference(inputs, max_new_tokens=NEW, stopping_criteria=[ends], eos_token_id=1)
    script_drafts(monkeypatch, pattern, want)
    got = llama.generate(inputs, policy, max_new_tokens=NEW, stopping_criteria=[ends], eos_token_id=1, **options)
    assert torch.equal(got.sequences, want)
    assert want[0, 9 + 6 :].tolist() != free[0, 9 + 6 :].tolist()


@pytest.mark.parametrize(("policy", "options"), EXACT)
def test_max_time(llama, policy, options):
    """Time is up after one token; transformers, too, looks at the clock after each."""
    inputs = prompts(5)
    got = llama.generate(inputs, policy, max_new_tokens=NEW, max_time=1e-6, **options)
    assert torch.equal(got.sequences, llama.reference(inputs, max_new_tokens=NEW, max_time=1e-6))
    assert got.sequences.shape[1] == 10


@pytest.mark.parametrize("given", ["argument", "config"])
def test_stop_strings(folder, given):
    words = [f"word{i} stop{i}" for i in range(30)]
    tokenizer = train_tokenizer(words * 3, 300)
    pair = make_pair(folder, "llama", calm=0.15, vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=0)
    inputs = prompts(3, vocab=200)
    free = pair.reference(inputs, max_new_tokens=NEW)
    new = [tokenizer.decode(token) for token in free[:, 9 + 2 :].flatten()]
    strings = [text for text in new if text.isascii() and text.isprintable()][:2]
    stock = {"stop_strings": strings, "tokenizer": tokenizer}
    want = pair.reference(inputs, max_new_tokens=NEW, **stock)
    assert not torch.equal(want, free)
    for policy, options in EXACT:
        ours = dict(stock)
        if given == "config":
            del ours["stop_strings"]
            ours["generation_config"] = GenerationConfig.from_dict(
                pair.model.generation_config.to_dict() | {"stop_strings": strings, "max_new_tokens": NEW}
            )
        got = pair.generate(inputs, policy, max_new_tokens=NEW, **options, **ours)
        assert torch.equal(got.sequences, want)
    with pytest.raises(ValueError, match="tokenizer"):
        pair.generate(inputs, "lossless", max_new_tokens=4, stop_strings=strings)


@pytest.mark.parametrize(("policy", "options"), EXACT)
def test_scores_and_logits(llama, policy, options):
    inputs = prompts(5)
    kept = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    want = llama.reference(inputs, max_new_tokens=NEW, repetition_penalty=1.3, **kept)
    got = llama.generate(inputs, policy, max_new_tokens=NEW, repetition_penalty=1.3, **options, **kept)
    assert len(got.scores) == len(got.logits) == NEW
    for name in ("scores", "logits"):
        for mine, theirs in zip(getattr(got, name), getattr(want, name), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_scores_of_tokens_that_left_early(llama):
    inputs = prompts(3)
    kept = {"output_scores": True, "output_logits": True}
    got = llama.generate(inputs, "fixed", exit_layer=1, max_new_tokens=6, top_k=3, **kept)
    for row in range(3):
        text = torch.cat([one_row(inputs, row)["input_ids"], got.sequences[row : row + 1, 9:]], 1)
        with torch.no_grad():
            exits = llama.model(text).exit_logits[1][0]
        for step in range(1, 6):
            torch.testing.assert_close(got.logits[step][row], exits[len(exits) - 7 + step], rtol=1e-4, atol=1e-4)


def test_several_texts_per_prompt(llama):
    """Sampling among one token is greedy, so every copy of a prompt says the same."""
    inputs = prompts(3)
    want = llama.reference(inputs, max_new_tokens=NEW).repeat_interleave(2, 0)
    for policy, options in EXACT:
        got = llama.generate(
            inputs, policy, max_new_tokens=NEW, do_sample=True, top_k=1, num_return_sequences=2, **options
        )
        assert torch.equal(got.sequences, want)


def test_sampling_among_one_leaves_at_exits_as_greedy(llama):
    inputs = prompts(3)
    want = llama.generate(inputs, "threshold", exit_threshold=LIMITS, max_new_tokens=NEW)
    assert len(want.exit_layers.unique()) > 1
    got = llama.generate(inputs, "threshold", exit_threshold=LIMITS, max_new_tokens=NEW, do_sample=True, top_k=1)
    assert torch.equal(got.sequences, want.sequences)
    assert torch.equal(got.exit_layers, want.exit_layers)
    torch.manual_seed(0)
    free = llama.generate(inputs, "threshold", exit_threshold=LIMITS, max_new_tokens=NEW, do_sample=True, top_k=4)
    assert not torch.equal(free.sequences, want.sequences)
    for row in range(3):  # every sampled token is among the four best of the layer it came from
        text = torch.cat([one_row(inputs, row)["input_ids"], free.sequences[row : row + 1, 9:]], 1)
        with torch.no_grad():
            output = llama.model(text)
        for step in range(NEW):
            layer = int(free.exit_layers[row, step])
            logits = output.logits if layer == LAYERS else output.exit_logits[layer]
            best = logits[0, text.shape[1] - NEW + step - 1].topk(4).indices
            assert int(free.sequences[row, 9 + step]) in best


@pytest.mark.parametrize(("policy", "options"), EXACT)
def test_caches_and_chunks(llama, policy, options):
    inputs = prompts(5)
    want = llama.reference(inputs, max_new_tokens=NEW)
    got = llama.generate(inputs, policy, max_new_tokens=NEW, use_cache=False, **options)
    assert torch.equal(got.sequences, want)
    assert CACHE not in got
    for chunk in (1, 4, 20):
        got = llama.generate(inputs, policy, max_new_tokens=NEW, prefill_chunk_size=chunk, **options)
        assert torch.equal(got.sequences, want)


@pytest.mark.parametrize(("family", "kind"), [("llama", "norm"), ("mistral", "mlp"), ("qwen3", "layer")])
def test_transformers_continues_from_our_cache(folder, family, kind):
    pair, inputs = make_pair(folder, family, kind, calm=0.3, eos_token_id=None), prompts(4)
    longer = pair.reference(inputs, max_new_tokens=NEW + 6)
    for policy, options in (*EXACT, ("fixed", {"exit_layer": 1, "exit_max_pending": 3})):
        for name in (None, *CACHE_NAMES):
            own = {} if name is None else {name: DynamicCache(config=pair.model.config)}
            got = pair.generate(inputs, policy, max_new_tokens=NEW, **own, **options)
            assert name is None or got[CACHE] is own[name]
            assert got[CACHE].get_seq_length() == 9 + NEW - 1
            mask = torch.cat([inputs["attention_mask"], torch.ones(4, NEW, dtype=torch.long)], 1)
            whole = {"input_ids": got.sequences, "attention_mask": mask}
            again = pair.reference(whole, max_new_tokens=6, **{CACHE: got[CACHE]})
            want = longer if policy != "fixed" else pair.reference(whole, max_new_tokens=6)
            assert torch.equal(again, want)


class Recorder:
    """A streamer that keeps all it gets."""

    def __init__(self, before_put: Any = None):
        self.events: list[tuple[str, Any]] = []
        self.before_put = before_put

    def put(self, value: torch.Tensor) -> None:
        if self.before_put is not None:
            self.before_put()
        self.events.append(("put", value.flatten().tolist()))

    def put_exits(self, token_ids: list[int], layers: list[int]) -> None:
        self.events.append(("exits", list(zip(token_ids, layers, strict=True))))

    def end(self) -> None:
        self.events.append(("end", None))


@pytest.mark.parametrize(
    ("policy", "options"), [*EXACT[:2], ("threshold", {"exit_threshold": LIMITS}), ("fixed", {"exit_layer": 1})]
)
def test_streamers(llama, policy, options):
    inputs, streamer = one_row(prompts(1), 0), Recorder()
    got = llama.generate(inputs, policy, max_new_tokens=NEW, streamer=streamer, **options)
    assert [event for event, _ in streamer.events].count("end") == 1
    assert streamer.events[-1][0] == "end"
    puts = [value for event, value in streamer.events if event == "put"]
    assert puts[0] == inputs["input_ids"][0].tolist()
    assert [token for value in puts for token in value] == got.sequences[0].tolist()
    said = [pair for event, value in streamer.events if event == "exits" for pair in value]
    assert said == list(zip(got.sequences[0, 9:].tolist(), got.exit_layers[0].tolist(), strict=True))
    middle = [event for event, _ in streamer.events[1:-1]]
    assert middle == ["exits", "put"] * (len(middle) // 2)
    assert len(middle) > 4  # it does stream


def test_streamers_get_nothing_behind_the_end(llama, monkeypatch):
    """Four drafts are accepted at once, and the text ends among them."""
    inputs, streamer = one_row(prompts(1), 0), Recorder()
    eos = int(llama.reference(inputs, max_new_tokens=NEW)[0, 9 + 3])
    want = llama.reference(inputs, max_new_tokens=NEW, eos_token_id=eos)
    script_drafts(monkeypatch, "all", want)
    options = {"exit_layer": 3, "exit_draft_length": 4, "eos_token_id": eos, "streamer": streamer}
    got = llama.generate(inputs, "lossless", max_new_tokens=NEW, **options)
    assert torch.equal(got.sequences, want)
    new = want[0, 9:].tolist()
    assert [token for event, value in streamer.events[1:] if event == "put" for token in value] == new
    assert [token for event, value in streamer.events if event == "exits" for token, _ in value] == new


def test_text_streamer_prints_the_text(folder, capsys):
    tokenizer = train_tokenizer(["some words to learn"], 300)
    pair = make_pair(folder, "llama", vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=0)
    inputs = one_row(prompts(1), 0)
    got = pair.generate(inputs, "lossless", max_new_tokens=NEW, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == tokenizer.decode(got.sequences[0, 9:]).strip()


def _hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("policy", ["lossless", "threshold"])
def test_nothing_stays_after_an_error(llama, policy):
    inputs = one_row(prompts(1), 0)
    before = _hooks(llama.model), dict(vars(llama.model.generation_config)), set(vars(llama.model))
    options = {"exit_threshold": LIMITS} if policy == "threshold" else {}
    want = llama.generate(inputs, policy, max_new_tokens=NEW, **options).sequences
    puts = []

    def fail() -> None:
        puts.append(1)
        if len(puts) == 3:
            raise RuntimeError("the reader went away")

    with pytest.raises(RuntimeError, match="went away"):
        llama.generate(inputs, policy, max_new_tokens=NEW, streamer=Recorder(fail), **options)
    with pytest.raises(ValueError, match="exit_audit"):
        llama.generate(inputs, policy, max_new_tokens=NEW, exit_audit=2, **options)
    assert (_hooks(llama.model), dict(vars(llama.model.generation_config)), set(vars(llama.model))) == before
    assert torch.equal(llama.generate(inputs, policy, max_new_tokens=NEW, **options).sequences, want)


@pytest.mark.parametrize("kind", ["mlp", "layer"])
def test_two_texts_in_turns(folder, kind):
    """Two generations on one model, each waiting for the other after every token or cycle."""
    pair = make_pair(folder, "llama", kind, calm=0.15, eos_token_id=None)
    jobs = [
        (one_row(prompts(3), 0), "lossless", {"exit_layer": 3, "exit_draft_length": 2}),
        (one_row(prompts(3), 1), "threshold", {"exit_threshold": LIMITS}),
    ]
    alone = [pair.generate(inputs, policy, max_new_tokens=NEW, **options) for inputs, policy, options in jobs]
    turn, finished = threading.Condition(), set()
    owner, switches = [0], [0]
    got: dict[int, Any] = {}

    def run(me: int) -> None:
        def my_turn() -> None:
            with turn:
                owner[0] = 1 - me
                switches[0] += 1
                turn.notify_all()
                turn.wait_for(lambda: owner[0] == me or 1 - me in finished)

        try:
            inputs, policy, options = jobs[me]
            got[me] = pair.generate(inputs, policy, max_new_tokens=NEW, streamer=Recorder(my_turn), **options)
        finally:
            with turn:
                finished.add(me)
                turn.notify_all()

    threads = [threading.Thread(target=run, args=(me,)) for me in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert switches[0] > 10
    for me, want in enumerate(alone):
        assert torch.equal(got[me].sequences, want.sequences)
        assert torch.equal(got[me].exit_layers, want.exit_layers)


@pytest.mark.parametrize("kind", ["norm", "mlp", "layer"])
def test_a_text_in_the_middle_of_another(folder, kind):
    """Threads may switch anywhere: here one runs a whole generation between the other's layer and exit head."""
    pair = make_pair(folder, "llama", kind, calm=0.15, eos_token_id=None)
    outer, inner = one_row(prompts(3), 0), prompts(3)
    options = {"exit_layer": 3, "max_new_tokens": 8}
    want, want_inner = pair.generate(outer, "fixed", **options), pair.generate(inner, "fixed", **options)
    calls, results = [], []

    def interrupt(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            thread = threading.Thread(target=lambda: results.append(pair.generate(inner, "fixed", **options)))
            thread.start()
            thread.join()

    handle = pair.model.model.layers[2].register_forward_hook(interrupt)
    try:
        got = pair.generate(outer, "fixed", **options)
    finally:
        handle.remove()
    assert torch.equal(got.sequences, want.sequences)
    assert torch.equal(results[0].sequences, want_inner.sequences)


def test_plain_threads(folder):
    """Four threads at once, no order among them."""
    pair, inputs = make_pair(folder, "llama", "mlp", calm=0.15, eos_token_id=None), prompts(4)
    rows = [one_row(inputs, row) for row in range(4)]
    want = [pair.generate(row, "fixed", exit_layer=3, max_new_tokens=24).sequences for row in rows]
    got: dict[int, torch.Tensor] = {}

    def run(me: int) -> None:
        got[me] = pair.generate(rows[me], "fixed", exit_layer=3, max_new_tokens=24).sequences

    threads = [threading.Thread(target=run, args=(me,)) for me in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[me], want[me]) for me in range(4))


def test_slow_loop_agrees_with_the_fixed_exit(llama):
    """The reference of these tests, against transformers where no exit is taken."""
    inputs = one_row(prompts(1), 0)
    tokens, layers = slow_exits(llama.model, inputs["input_ids"], lambda exits: None, 6)
    assert tokens == row_text(llama.reference(inputs, max_new_tokens=6), inputs, 0)
    assert layers == [LAYERS] * 6
