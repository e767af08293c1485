"""`ee-scale serve` asked by OpenAI's own client: what it answers, to many at once, and what it refuses."""

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch
from fuzz_serve import fuzz
from helpers.server import CONTEXT, EXITS, LAYERS, hold_steps, serving, write_served_model
from transformers import AutoTokenizer

from ee_scale.cli.main import main
from ee_scale.inference.model import EarlyExitForCausalLM
from ee_scale.serving.bodies import ChatBody, CompletionBody

PROMPTS = ("the layer reads", "hidden state of the token and", "user", "the token asks for more and the user reads it")
MESSAGES = [{"role": "system", "content": "the layer"}, {"role": "user", "content": "reads the hidden state äh 🙂"}]
NEW = 24
POLICIES = ("off", "lossless", "threshold", "fixed", "patience", "entropy")
LIMIT = 0.05  # some tokens leave at each exit


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_served_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def loaded(model):
    return EarlyExitForCausalLM.from_pretrained(model, dtype=torch.float32), AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    settings = ["name=tiny", "rows=4", "max_waiting=12", "policy=off", f"policies=[{','.join(POLICIES)}]", "audit=1"]
    settings += ["max_new_tokens=200", "max_body_bytes=20000", "loosest=0.01"]
    with serving(model, tmp_path_factory.mktemp("server"), *settings) as found:
        yield found


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return server.client()


def said(loaded, ids: list[int], new: int = NEW, **options) -> tuple[str, list[int]]:
    """What `generate` says: text, and the layer of each token."""
    model, tokenizer = loaded
    options = {"exit_policy": "threshold", "exit_threshold": 2.0, **options}  # exits that nobody takes
    got = model.generate(
        torch.tensor([ids]), max_new_tokens=new, do_sample=False, return_dict_in_generate=True, **options
    )
    new_ids = got.sequences[0, len(ids) :].tolist()
    return tokenizer.decode(new_ids, skip_special_tokens=True), got.exit_layers[0, : len(new_ids)].tolist()


def ids_of(loaded, prompt: str) -> list[int]:
    return loaded[1](prompt)["input_ids"]


def complete(client: openai.OpenAI, prompt, **options):
    given = {"model": "tiny", "temperature": 0, "max_tokens": NEW, **options}
    return client.completions.create(prompt=prompt, **given)


def chat(client: openai.OpenAI, **options):
    given = {"model": "tiny", "temperature": 0, "max_tokens": NEW, "messages": MESSAGES, **options}
    return client.chat.completions.create(**given)


# -- answers -----------------------------------------------------------------------------------------------------------


def test_greedy_answers_are_those_of_generate(client, loaded):
    expected = [said(loaded, ids_of(loaded, prompt))[0] for prompt in PROMPTS]
    plain = loaded[0].generate(torch.tensor([ids_of(loaded, PROMPTS[0])]), max_new_tokens=NEW, do_sample=False)
    assert loaded[1].decode(plain[0, len(ids_of(loaded, PROMPTS[0])) :], skip_special_tokens=True) == expected[0]
    for policy in ("off", "lossless"):
        answer = complete(client, list(PROMPTS), extra_body={"exit_policy": policy})
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert {choice.finish_reason for choice in answer.choices} == {"length"}
    one = complete(client, PROMPTS[1])
    assert one.choices[0].text == expected[1]
    assert complete(client, ids_of(loaded, PROMPTS[1])).choices[0].text == expected[1]
    prompt = loaded[1].apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = chat(client)
    assert answer.choices[0].message.content == said(loaded, prompt)[0]
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == NEW
    parts = [{"type": "text", "text": MESSAGES[1]["content"]}]
    again = chat(
        client,
        messages=[
            MESSAGES[0],
            {"role": "user", "content": parts},
        ],
    )
    assert again.choices[0].message.content == answer.choices[0].message.content


def test_exits_are_each_request_s_own(client, loaded):
    cases = [
        {"exit_policy": "threshold", "exit_threshold": LIMIT},
        {"exit_policy": "threshold", "exit_threshold": {"3": LIMIT}},
        {"exit_policy": "threshold", "exit_threshold": [2.0, LIMIT]},
        {"exit_policy": "threshold", "exit_threshold": LIMIT, "exit_min_layer": 2},
        {"exit_policy": "fixed", "exit_layer": 1},
        {"exit_policy": "patience", "exit_patience": 2},
    ]
    ids, seen = ids_of(loaded, PROMPTS[1]), set()
    for options in cases:
        text, layers = said(loaded, ids, **{"exit_threshold": None, **options})
        choice = complete(client, PROMPTS[1], extra_body=options).choices[0]
        assert (choice.text, choice.model_extra["exit_layers"]) == (text, layers), options
        seen |= set(layers)
    assert seen == {*EXITS, LAYERS}


def test_streams_are_the_whole_answer(client, loaded):
    for options in ({}, {"exit_policy": "threshold", "exit_threshold": LIMIT}, {"exit_policy": "lossless"}):
        whole = chat(client, extra_body=options, n=2)
        chunks = list(chat(client, extra_body=options, n=2, stream=True, stream_options={"include_usage": True}))
        *parts, last = chunks
        assert not last.choices
        assert last.usage.completion_tokens == whole.usage.completion_tokens == 2 * NEW
        assert all(chunk.usage is None for chunk in parts)
        for choice in whole.choices:
            mine = [chunk.choices[0] for chunk in parts if chunk.choices[0].index == choice.index]
            assert "".join(part.delta.content for part in mine) == choice.message.content
            assert [part.delta.role for part in mine] == ["assistant", *[None] * (len(mine) - 1)]
            assert [part.finish_reason for part in mine] == [*[None] * (len(mine) - 1), "length"]
            if options.get("exit_policy") == "threshold":
                layers = [layer for part in mine for layer in part.model_extra["exit_layers"]]
                assert layers == choice.model_extra["exit_layers"]
        assert len(parts) > NEW  # as they come
    text = "".join(part.choices[0].text for part in complete(client, PROMPTS[0], stream=True))
    assert text == complete(client, PROMPTS[0]).choices[0].text


def test_the_stream_ends_as_openai_s(server):
    body = {"model": "tiny", "prompt": "the", "max_tokens": 3, "stream": True}
    with server.raw() as raw:
        answer = raw.post("/v1/completions", json=body)
    events = answer.text.split("\n\n")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert all(line.startswith("data: ") for line in events[:-1])
    assert events[-2:] == ["data: [DONE]", ""]
    assert "usage" not in json.loads(events[0].removeprefix("data: "))


@pytest.mark.parametrize("policy", ["off", "lossless"])
def test_stop_texts(client, loaded, policy):
    """Wherever token borders are; what only begins like one is kept back no longer than needed."""
    free, options = said(loaded, ids_of(loaded, PROMPTS[1]))[0], {"exit_policy": policy}
    for start, end in ((5, 8), (9, 10), (12, 17)):
        stop = free[start:end]
        for given in (stop, ["nowhere", stop]):
            want = free[: free.index(stop)]
            answer = complete(client, PROMPTS[1], stop=given, extra_body=options)
            assert (answer.choices[0].text, answer.choices[0].finish_reason) == (want, "stop")
            assert answer.usage.completion_tokens < NEW
            parts = [
                part.choices[0] for part in complete(client, PROMPTS[1], stop=given, stream=True, extra_body=options)
            ]
            assert "".join(part.text for part in parts) == want
            assert parts[-1].finish_reason == "stop"
    never = free[-3:] + "\x00nothing"  # begins as the text ends
    answer = complete(client, PROMPTS[1], stop=never, extra_body=options).choices[0]
    assert (answer.text, answer.finish_reason) == (free, "length")


def test_logprobs_are_those_of_the_layer(client, loaded):
    ids = ids_of(loaded, PROMPTS[0])
    logits = loaded[0](torch.tensor([ids]), output_exit_logits=False).logits[0, -1].log_softmax(-1)
    best = logits.topk(3)
    entry = chat(client, logprobs=True, top_logprobs=3, max_tokens=4).choices[0].logprobs.content
    assert len(entry) == 4
    assert all(len(token.top_logprobs) == 3 and token.logprob == token.top_logprobs[0].logprob for token in entry)
    found = complete(client, PROMPTS[0], logprobs=3, max_tokens=6, extra_body={"exit_policy": "lossless"}).choices[0]
    assert found.logprobs.token_logprobs[0] == pytest.approx(best.values[0].item(), abs=1e-4)
    assert sorted(found.logprobs.top_logprobs[0].values()) == pytest.approx(best.values.tolist()[::-1], abs=1e-4)
    assert found.logprobs.tokens == [
        loaded[1].decode([token])
        for token in loaded[0].generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :]
    ]
    assert complete(client, PROMPTS[0]).choices[0].logprobs is None
    streamed = [
        part.choices[0].logprobs for part in complete(client, PROMPTS[0], logprobs=3, max_tokens=6, stream=True)
    ]
    assert [value for part in streamed for value in part.token_logprobs] == pytest.approx(
        found.logprobs.token_logprobs, abs=1e-4
    )


def test_sampling_follows_its_seed(client):
    hot = {"temperature": 1.3, "n": 3}
    first, again, other = (complete(client, PROMPTS[0], seed=seed, **hot) for seed in (1, 1, 2))
    texts = [[choice.text for choice in answer.choices] for answer in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == 3
    narrow = complete(client, PROMPTS[0], temperature=1.0, extra_body={"top_k": 1}).choices[0].text
    assert narrow == complete(client, PROMPTS[0], temperature=1.0, top_p=1e-6).choices[0].text
    assert narrow == complete(client, PROMPTS[0]).choices[0].text
    with pytest.raises(openai.BadRequestError, match="seed=1: lossless draws for all rows together"):
        complete(client, PROMPTS[0], seed=1, temperature=1, extra_body={"exit_policy": "lossless"})


def test_many_at_once_are_one_at_a_time(client):
    """Twelve clients on four rows, with several policies and lengths, greedy and sampled."""
    kinds = [{}, {"exit_policy": "threshold", "exit_threshold": LIMIT}, {"exit_policy": "lossless"}]
    asks = [
        {
            "prompt": PROMPTS[number % 4],
            "max_tokens": 5 + 7 * (number % 5),
            "extra_body": kinds[number % 3],
            **({"temperature": 1.0, "seed": number} if number % 4 == 1 and number % 3 != 2 else {}),
        }
        for number in range(12)
    ]
    alone = [complete(client, **ask).choices[0].text for ask in asks]
    with ThreadPoolExecutor(12) as pool:
        together = [answer.choices[0].text for answer in pool.map(lambda ask: complete(client, **ask), asks)]
    assert together == alone


def test_what_it_tells_of_itself(server, client):
    (card,) = client.models.list().data
    assert card.id == "tiny" == client.models.retrieve("tiny").id
    extra = card.model_extra
    assert (extra["num_layers"], extra["exit_layers"], extra["max_model_len"]) == (LAYERS, list(EXITS), CONTEXT)
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.models.retrieve("other")
    before = server.metric("generation_tokens_total"), server.metric("exit_tokens_total", layer="1")
    complete(client, PROMPTS[0], extra_body={"exit_policy": "fixed", "exit_layer": 1})
    assert server.metric("generation_tokens_total") == before[0] + NEW
    assert server.metric("exit_tokens_total", layer="1") == before[1] + NEW - 1
    assert 0 <= server.metric("exit_agreement") <= 1
    complete(client, PROMPTS[0], extra_body={"exit_policy": "lossless", "exit_draft_length": 2})
    drafted = server.metric("spec_decode_num_draft_tokens_total")
    accepted = server.metric("spec_decode_num_accepted_tokens_total")
    places = [server.metric("spec_decode_num_accepted_tokens_per_pos_total", position=str(at)) for at in range(12)]
    assert drafted >= server.metric("spec_decode_num_drafts_total") > 0
    assert sum(places) == accepted
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"):
        assert server.metric(f"{name}_count") > 0
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert server.metric(name) == 0


def test_the_page_needs_nothing_from_elsewhere(server):
    with server.raw() as raw:
        answer = raw.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "http://" not in answer.text
    assert "https://" not in answer.text
    assert "innerHTML" not in answer.text


# -- refusals ----------------------------------------------------------------------------------------------------------

GOOD = {"model": "tiny", "prompt": "the", "max_tokens": 2}
PATHS = ("../../x", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/x", "a\x00b", "{{ 1 }}", "C:\\x", "$(id)")
BAD = [
    *({**GOOD, "model": path} for path in PATHS),
    *(
        {**GOOD, field: path}
        for field in ("max_tokens", "stop_strings", "exit_policy", "exit_log")
        for path in PATHS[:2]
    ),
    {},
    {"model": "tiny"},
    {"prompt": "the"},
    {**GOOD, "model": 5},
    {**GOOD, "model": None},
    {**GOOD, "prompt": ""},
    {**GOOD, "prompt": []},
    {**GOOD, "prompt": [[]]},
    {**GOOD, "prompt": ["the", ""]},
    {**GOOD, "prompt": ["the", [5]]},
    {**GOOD, "prompt": [-1]},
    {**GOOD, "prompt": [10**6]},
    {**GOOD, "prompt": [10**30]},
    {**GOOD, "prompt": [1.5]},
    {**GOOD, "prompt": [True]},
    {**GOOD, "prompt": {"a": 1}},
    {**GOOD, "prompt": 7},
    {**GOOD, "prompt": "the " * 600},
    {**GOOD, "prompt": ["the"] * 100},
    {**GOOD, "max_tokens": 0},
    {**GOOD, "max_tokens": -5},
    {**GOOD, "max_tokens": 10**6},
    {**GOOD, "max_tokens": 201},
    {**GOOD, "prompt": [5] * 400, "max_tokens": 150},
    {**GOOD, "max_tokens": 2.5},
    {**GOOD, "max_tokens": "2"},
    {**GOOD, "max_tokens": True},
    {**GOOD, "temperature": -1},
    {**GOOD, "temperature": 3},
    {**GOOD, "temperature": 1e-30},
    {**GOOD, "temperature": "hot"},
    {**GOOD, "top_p": 0},
    {**GOOD, "top_p": 1.1},
    {**GOOD, "top_k": 0},
    {**GOOD, "n": 0},
    {**GOOD, "n": 129},
    {**GOOD, "n": 17},
    {**GOOD, "seed": 2**64},
    {**GOOD, "seed": 1.5},
    {**GOOD, "stop": ""},
    {**GOOD, "stop": ["a"] * 17},
    {**GOOD, "stop": "x" * 257},
    {**GOOD, "stop": [5]},
    {**GOOD, "logprobs": -1},
    {**GOOD, "logprobs": 21},
    {**GOOD, "logprobs": True},
    {**GOOD, "stream": "yes"},
    {**GOOD, "stream_options": {"include_usage": 5}},
    {**GOOD, "stream_options": {"other": True}},
    {**GOOD, "tools": [{"type": "function"}]},
    {**GOOD, "response_format": {"type": "json_object"}},
    {**GOOD, "presence_penalty": 0.5},
    {**GOOD, "logit_bias": {"5": 10}},
    {**GOOD, "best_of": 2},
    {**GOOD, "echo": True},
    {**GOOD, "suffix": "x"},
    {**GOOD, "generation_config": {"exit_log": "x"}},
    {**GOOD, "exit_audit": 1.0},
    {**GOOD, "exit_graphs": True},
    {**GOOD, "exit_shortlist": 5},
    {**GOOD, "exit_policy": "margin"},
    {**GOOD, "exit_policy": "threshold"},
    {**GOOD, "exit_threshold": 0.5},
    {**GOOD, "exit_policy": "threshold", "exit_threshold": 0.001},
    {**GOOD, "exit_policy": "entropy", "exit_threshold": 5.0},
    {**GOOD, "exit_policy": "threshold", "exit_threshold": "0.5"},
    {**GOOD, "exit_policy": "threshold", "exit_threshold": [0.5]},
    {**GOOD, "exit_policy": "threshold", "exit_threshold": {"2": 0.5}},
    {**GOOD, "exit_policy": "threshold", "exit_threshold": {"../x": 0.5}},
    {**GOOD, "exit_policy": "fixed"},
    {**GOOD, "exit_policy": "fixed", "exit_layer": 2},
    {**GOOD, "exit_policy": "fixed", "exit_layer": 10**9},
    {**GOOD, "exit_policy": "patience", "exit_patience": 0},
    {**GOOD, "exit_policy": "patience", "exit_patience": 1},
    {**GOOD, "exit_policy": "lossless", "exit_draft_length": 10**6},
    {**GOOD, "exit_policy": "lossless", "exit_min_layer": 4},
    {**GOOD, "exit_tag": "x" * 129},
    {**GOOD, "x" * 5000: 1},
    {**GOOD, "a\nb\x1b[31m": 1},
]
WRONG = ("../../x", -1, 1e300, [[["/etc/passwd"]]], {"../x": {"url": "file:///x"}})  # of every field
FREE = (
    "prompt",
    "stop",
    "seed",
    "exit_tag",
    "user",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
)
USER = {"role": "user", "content": "the"}
CHAT = {"model": "tiny", "messages": [USER], "max_tokens": 2}
BAD_CHATS = [
    {**CHAT, "messages": []},
    {**CHAT, "messages": "the"},
    {**CHAT, "messages": [5]},
    {**CHAT, "messages": [{"role": "user"}]},
    {**CHAT, "messages": [{"role": "root", "content": "x"}]},
    {**CHAT, "messages": [{"role": "user", "content": 5}]},
    {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}]},
    {**CHAT, "messages": [{**USER, "tool_calls": [{"id": "x"}]}]},
    {**CHAT, "messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]},
    {**CHAT, "max_completion_tokens": 0},
    {**CHAT, "top_logprobs": 21, "logprobs": True},
    {**CHAT, "logprobs": 3},
    {**CHAT, "tool_choice": "required"},
    {**CHAT, "chat_template": "{{ 1 }}"},
    {**CHAT, "prompt": "the"},
]
RAW = [
    b"",
    b"{",
    b"[]",
    b"5",
    b"null",
    b"\xff\xfe\x00",
    b'{"model": "tiny", "prompt": "\xff"}',
    b'{"model": "tiny", "prompt": "\\ud800", "max_tokens": 2}',
    b'{"model": "tiny", "prompt": "the", "temperature": NaN}',
    b'{"model": "tiny", "prompt": "the", "temperature": Infinity}',
    b'{"model": "tiny", "prompt": "the", "seed": ' + b"9" * 5000 + b"}",
    b"[" * 9000,
    b'{"a":' * 3000,
]


def check_refusal(answer: httpx.Response) -> str:
    """A client's fault, in OpenAI's form and one line; returns the line."""
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].isprintable()
    assert 0 < len(error["message"]) <= 400
    assert "Traceback" not in answer.text
    assert "/site-packages" not in answer.text
    return error["message"]


def test_bad_requests_get_one_line_and_change_nothing(server, client):
    before, output = sorted(server.folder.rglob("*")), server.output
    with server.raw() as raw:
        for body in BAD:
            check_refusal(raw.post("/v1/completions", json=body))
        for body in BAD_CHATS:
            check_refusal(raw.post("/v1/chat/completions", json=body))
        headers = {"content-type": "application/json"}
        for content in RAW:
            check_refusal(raw.post("/v1/completions", content=content, headers=headers))
        for body, path, other in ((GOOD, "completions", CHAT), (CHAT, "chat/completions", GOOD)):
            for field in {**CompletionBody.model_fields, **ChatBody.model_fields, **other}:
                for value in WRONG:
                    answer = raw.post(f"/v1/{path}", json={**body, field: value})
                    if answer.status_code != 200 or field not in FREE:
                        check_refusal(answer)
        large = json.dumps({**GOOD, "prompt": "x" * 10_000_000}).encode()
        for content in (large, iter([large])):  # with its length told, and in chunks without
            answer = raw.post("/v1/completions", content=content, headers=headers)
            assert answer.status_code == 413
            assert check_refusal(answer) == "the body has more than 20000 bytes"
        for method, path in (
            ("GET", "/v1/completions"),
            ("POST", "/health"),
            ("GET", "/v1/x"),
            ("GET", "/../etc/passwd"),
        ):
            check_refusal(raw.request(method, path))
        check_refusal(raw.post("/v1/completions", content=json.dumps(GOOD), headers={"content-type": "text/plain"}))
        for host in ("evil.example", "127.0.0.1.evil.example:80", "[x", ""):
            assert raw.get("/health", headers={"host": host}).status_code in (400, 403)
    assert len(BAD) + len(BAD_CHATS) + len(RAW) > 100
    assert sorted(server.folder.rglob("*")) == before
    assert server.output == output
    assert complete(client, "the").usage.completion_tokens == NEW


def test_random_bodies(server):
    """scripts/fuzz_serve.py does it for as long as one likes."""
    with server.raw() as raw:
        fuzz(raw, "tiny", 80)
    assert "Traceback" not in server.output


def test_what_a_refusal_says(server):
    with server.raw() as raw:
        lines = {
            "temperature=3: give 0, or a number from 0.01 to 2": {"temperature": 3},
            "tools: this server cannot do it; leave it out": {"tools": [{}]},
            "foo: no such field here; leave it out": {"foo": 1},
            "max_tokens=201: at most 200": {"max_tokens": 201},
            "exit_policy=margin: this server allows off, lossless, threshold, fixed, patience, entropy": {
                "exit_policy": "margin"
            },
            "exit_layer=2: the model has exits at 1, 3": {"exit_policy": "fixed", "exit_layer": 2},
            "exit_threshold=0.001: looser than this server's 0.01": {
                "exit_policy": "threshold",
                "exit_threshold": 0.001,
            },
        }
        for line, fields in lines.items():
            assert check_refusal(raw.post("/v1/completions", json={**GOOD, **fields})) == line
        harmless = {
            "tools": [],
            "tool_choice": "auto",
            "logit_bias": None,
            "presence_penalty": 0.0,
            "user": "me",
            "n": 1,
        }
        assert raw.post("/v1/completions", json={**GOOD, **harmless}).status_code == 200


# -- life of a server --------------------------------------------------------------------------------------------------


def test_a_client_that_leaves_frees_its_row(server, client):
    gone = server.metric("request_success_total", finished_reason="abort")
    for _ in range(6):  # more than there are rows
        stream = complete(client, PROMPTS[0], max_tokens=200, stream=True)
        next(iter(stream))
        stream.close()
    assert complete(client, PROMPTS[0]).usage.completion_tokens == NEW
    while server.metric("request_success_total", finished_reason="abort") < gone + 6:
        pass
    assert server.metric("num_requests_running") == 0


def test_loading_full_draining(model, tmp_path):
    """One server: while the model loads, with its line full, and told to stop with a request under way."""
    (tmp_path / "hold_loading").touch()
    (tmp_path / "hold").touch()
    settings = ["rows=1", "max_waiting=1", "api_key=secret", "policy=fixed", "layer=1", "log=decisions.jsonl"]
    with serving(model, tmp_path, *settings, inject=hold_steps, waits=False) as server, server.raw() as raw:
        headers, body = {"authorization": "Bearer secret"}, {**GOOD, "model": "model"}
        for path, given in (("/v1/models", {}), ("/metrics", {}), ("/v1/models", {"authorization": "Bearer secre"})):
            answer = raw.get(path, headers=given)
            assert (answer.status_code, check_refusal(answer)[:14]) == (401, "give the serve")
        assert raw.get("/health").status_code == 503
        answer = raw.post("/v1/completions", json=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
        (tmp_path / "hold_loading").unlink()
        while raw.get("/health").status_code == 503:
            pass
        client, answers = server.client("secret"), []

        def ask() -> None:
            answers.append(client.completions.create(model="model", prompt="the", max_tokens=9, temperature=0))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        one_each = {f'ee_scale:num_requests_{name}{{model_name="model"}} 1.0' for name in ("running", "waiting")}
        while not one_each <= {*raw.get("/metrics", headers=headers).text.splitlines()}:
            pass
        answer = raw.post("/v1/completions", json=body, headers=headers)
        assert (answer.status_code, check_refusal(answer)[:27]) == (429, "2 answers are under way or ")
        assert answer.headers["retry-after"]
        os.kill(server.process.pid, signal.SIGTERM)
        while "stopping" not in server.output:
            pass
        for answer in (raw.get("/health"), raw.post("/v1/completions", json=body, headers=headers)):
            assert (answer.status_code, answer.json()["error"]["message"][:22]) == (503, "the server is stopping")
        (tmp_path / "hold").unlink()
        for thread in threads:
            thread.join()
        assert [answer.usage.completion_tokens for answer in answers] == [9, 9]
        server.process.join()
        assert server.process.exitcode == 0
        assert "Traceback" not in server.output
    header, *lines = map(json.loads, (tmp_path / "decisions.jsonl").read_text().splitlines())
    assert header["policy"] == "fixed"
    assert len(lines) == 2 * 9


def test_what_cannot_be_served(server, model, capsys):
    port = server.url.rpartition(":")[2]
    base = model.parent / "base"
    for settings, message in (
        ([f"port={port}"], f"host=127.0.0.1 port={port}: Address already in use"),
        (["policy=threshold"], "policy=threshold: give threshold, or run `ee-scale calibrate` on the model"),
        (["policy=off", "threshold=0.5"], "threshold=0.5: policy=off has no threshold"),
        ([f"model={base}", "policy=fixed", "layer=1"], "layer=1: the model has exits at no layer"),
        (["model=nowhere"], "model=nowhere: no such folder"),
        (["log=nowhere/x.jsonl", "policy=off"], "log=nowhere/x.jsonl: no such folder"),
        (["policies=[of]"], "policies=['of']: a list of off, threshold"),
        (["audit=0.1", "follow=0.98"], "follow=0.98: policy=off has no limits that could follow; use threshold, en"),
        (["policies=[margin]", "follow=0.98"], "follow=0.98: nothing is compared with the full model; give audit, t"),
        (["policies=[margin]", "audit=1", "follow=1"], "follow=1.0: must be between 0 and 1"),
        (["levels=x.json"], "levels=x.json: there are none without follow; give follow, or leave it out"),
        (
            ["policies=[margin]", "audit=1", "follow=0.9", "levels=nowhere/x.json"],
            "levels=nowhere/x.json: no such folder",
        ),
    ):
        assert main(["serve", f"model={model}", "device=cpu", *settings]) == 2
        assert message in capsys.readouterr().err


def test_a_model_without_exits(model, tmp_path, loaded):
    """And a second signal, which ends a server at once."""
    with serving(model.parent / "base", tmp_path, "policy=lossless", inject=hold_steps) as server:
        client = server.client()
        (card,) = client.models.list().data
        assert card.model_extra["exit_layers"] == []
        for policy in ("off", "lossless"):
            answer = complete(client, PROMPTS[1], model="base", extra_body={"exit_policy": policy})
            assert answer.choices[0].text == said(loaded, ids_of(loaded, PROMPTS[1]))[0]
        (tmp_path / "hold").touch()
        with server.raw() as raw, ThreadPoolExecutor() as pool:
            answer = pool.submit(raw.post, "/v1/completions", json={**GOOD, "model": "base"})
            while not server.metric("num_requests_running"):
                pass
            os.kill(server.process.pid, signal.SIGTERM)
            while "stopping" not in server.output:
                pass
            os.kill(server.process.pid, signal.SIGTERM)
            server.process.join()  # though the step that is under way never ends
            assert answer.result().json()["error"]["message"] == "the server was stopped"
            assert answer.result().status_code == 503
        assert server.process.exitcode == 0
        assert "Traceback" not in server.output
