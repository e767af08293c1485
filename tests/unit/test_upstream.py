"""Deferral in the server without a second one: an upstream that says or does anything."""

import asyncio
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest
import torch
from helpers import redaction
from helpers.server import write_served_model

from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.cli.main import main
from ee_scale.config.compose import compose_config, to_yaml
from ee_scale.config.defer import SEQUENCE_SCORES, DeferConfig
from ee_scale.errors import UserError
from ee_scale.evaluation.answering import Case, answer
from ee_scale.evaluation.log_summary import summarise
from ee_scale.inference.deferral import VERSION, DeferralRule, fingerprint_of
from ee_scale.modeling.decision_log import DecisionLog
from ee_scale.serving import upstream as upstreams
from ee_scale.serving.app import make_app
from ee_scale.serving.bodies import CompletionBody
from ee_scale.serving.call import Call, Piece
from ee_scale.serving.deferral import Deferral, unless_left
from ee_scale.serving.engine import Engine
from ee_scale.serving.errors import ApiError
from ee_scale.serving.metrics import Metrics
from ee_scale.serving.served import Served
from ee_scale.serving.upstream import BackOff, Upstream, UpstreamError

LIMIT, LONG = 0.5, 10**6
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
CHOICE = {"index": 0, "text": "large", "finish_reason": "stop"}
GOOD = {"choices": [CHOICE], "usage": USAGE}
CHAT = {"choices": [{"message": {"role": "assistant", "content": "large"}, "finish_reason": "stop"}], "usage": USAGE}
MESSAGES = [{"role": "user", "content": "the user"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Served:
    model = write_served_model(tmp_path_factory.mktemp("served"))
    return Served.find(compose_config("serve", [f"model={model}", "device=cpu", "dtype=fp32", "name=m", "rows=2"]))


@pytest.fixture(scope="module")
def rule(served) -> DeferralRule:
    found = fingerprint_of(served.folder, "margin")
    tags = {"ask": None, "loose": 0.1}
    return DeferralRule(
        VERSION, "generate", "margin", LIMIT, tags, [0.5], [0.5], found, "exact", 0.02, 0.95, {"dtype": "float32"}
    )


class Bench:
    """A server whose small model says `small`, as sure as it is told, and whose upstream is `handler`."""

    def __init__(self, served: Served, rule: DeferralRule, handler, log=None, redact=None, **settings):
        self.asked: list[httpx.Request] = []

        async def handle(request: httpx.Request) -> httpx.Response:
            self.asked.append(request)
            found = handler(request) if callable(handler) else handler
            found = await found if asyncio.iscoroutine(found) else found
            if found.is_stream_consumed:  # made of bytes: httpx would not stream them
                found = httpx.Response(found.status_code, headers=found.headers, content=parts(found.content))
            return found

        config = replace(served.config, defer=replace(served.config.defer, **{"seconds": LONG, **settings}))
        self.upstream = Upstream("http://up/v1/", "big", "key", 2, httpx.MockTransport(handle))
        self.deferral = Deferral(config, rule, self.upstream, redact)
        self.metrics, self.log = Metrics("m"), log
        self.deferral.open(self.metrics, log)
        self.served = replace(served, config=config, deferral=self.deferral)

    def __call__(self, *bodies: dict, score: float = 0.2) -> list[httpx.Response]:
        """Answers to requests, one after another, once all audits are done."""
        engine = SimpleNamespace(check_open=lambda: None, leave=lambda call: None)

        def submit(call) -> None:
            assert call.scored == "margin"
            call.rows[0].score = score
            call.tell([Piece(0, "sm", [5], [4]), Piece(0, "all", [6], [4], finish="length")])

        engine.submit = submit
        transport = httpx.ASGITransport(app=make_app(self.served, engine, self.metrics, None))

        async def ask() -> list[httpx.Response]:
            found = []
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                for body in bodies:
                    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
                    found.append(await client.post(path, json={"model": "m", "temperature": 0, **body}))
            await asyncio.gather(*self.deferral.audits)
            return found

        return asyncio.run(ask())

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"ee_scale:{name}", {"model_name": "m", **labels})

    @property
    def lines(self) -> list[dict]:
        self.log.flush()
        return [json.loads(line) for line in self.log.path.read_text().splitlines()]


async def parts(content: bytes):
    yield content


def reply(value: object, status: int = 200, **headers: str) -> httpx.Response:
    return httpx.Response(status, json=value, headers=headers)


def either(request: httpx.Request) -> httpx.Response:
    return reply(CHAT if "chat" in request.url.path else GOOD)


def small(response: httpx.Response, word: str, score: float | None = 0.2) -> None:
    """The small model's answer, marked."""
    found = response.json()
    assert found["choices"][0]["text"] == "small"
    assert (found["deferred"], found["upstream"], found["model"], found["score"]) == (False, word, "m", score)


def test_below_the_limit_the_upstream_answers(served, rule):
    bench = Bench(served, rule, either)
    stop = {"stop": "x", "max_tokens": 7, "temperature": 0.5, "top_k": 3, "top_p": 0.5, "seed": 1}
    first, second = bench({"prompt": ["the"], **stop}, {"messages": MESSAGES, "max_completion_tokens": 9, "user": "me"})
    assert first.json()["choices"][0] == CHOICE | {"logprobs": None}
    assert second.json()["choices"][0]["message"]["content"] == "large"
    for found in (first.json(), second.json()):
        assert (found["deferred"], found["upstream"], found["model"]) == (True, "answered", "big")
        assert found["usage"] == USAGE
    one, two = bench.asked
    assert json.loads(one.content) == {"model": "big", "prompt": "the", **stop, "stop": ["x"]}
    assert json.loads(two.content) == {
        "model": "big",
        "messages": MESSAGES,
        "temperature": 0,
        "max_completion_tokens": 9,
    }
    assert str(one.url) == "http://up/v1/completions"
    sent = {"host", "accept", "accept-encoding", "connection", "user-agent", "content-type", "content-length"}
    assert set(one.headers) == sent | {"authorization"}
    assert one.headers["authorization"] == "Bearer key"


@pytest.mark.parametrize(
    ("score", "tag", "kept"),
    [
        (0.5, None, True),
        (0.49, None, False),
        (1.0, "ask", False),
        (0.1, "loose", True),
        (0.2, "other", False),
        (float("nan"), "loose", False),
    ],
)
def test_limits(served, rule, score, tag, kept):
    bench = Bench(served, rule, lambda _: reply(GOOD))
    (found,) = bench({"prompt": "the", "exit_tag": tag}, score=score)
    if kept:
        small(found, "not_asked", score)
    assert len(bench.asked) == found.json()["deferred"] == (not kept)
    assert bench.metric("deferral_share") == (not kept)


async def never(_: object) -> None:
    await asyncio.Event().wait()


def fails(_: object) -> None:
    raise httpx.ConnectError("refused")


async def drips():
    while True:
        yield b" "
        await asyncio.sleep(0)


FAILURES = [
    (fails, "connection"),
    (never, "timeout"),
    (lambda _: httpx.Response(200, content=drips()), "timeout"),
    (lambda _: httpx.Response(200, content=b" " * (upstreams.MOST_BYTES + 1)), "too_large"),
    (lambda _: reply(GOOD, 500), "status_5xx"),
    (lambda _: reply({"error": {"message": "the prompt is"}}, 401), "status_4xx"),
    (lambda _: reply(GOOD, 307, location="http://elsewhere/v1/completions"), "status_3xx"),
    (lambda _: reply(GOOD, 302, location="/v1/completions"), "status_3xx"),
    (
        lambda _: httpx.Response(200, content=parts(json.dumps(GOOD).encode()), headers={"content-encoding": "gzip"}),
        "invalid",
    ),
    *(
        (lambda _, content=content: httpx.Response(200, content=content), "invalid")
        for content in (b"", b"{", b"\xff", b"[]", b"5", b'{"choices": []}', b"[" * 9000, b'{"choices": 5}')
    ),
    *(
        (lambda _, value=value: reply(value), "invalid")
        for value in (
            {"choices": [CHOICE, CHOICE]},
            {"choices": [5]},
            {"choices": [{**CHOICE, "text": None}]},
            {"choices": [{**CHOICE, "finish_reason": None}]},
            {"choices": [{**CHOICE, "finish_reason": ["stop"]}]},
            {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]},
            {"choices": [{"message": "x", "finish_reason": "stop"}]},
        )
    ),
]


@pytest.mark.parametrize(("handler", "reason"), FAILURES)
def test_without_an_upstream_the_small_answer_is_given(served, rule, handler, reason, caplog, monkeypatch):
    monkeypatch.setattr("ee_scale.log.log.propagate", True)
    monkeypatch.setattr(upstreams, "MOST_BYTES", 1 << 30 if handler is FAILURES[2][0] else upstreams.MOST_BYTES)
    bench = Bench(served, rule, handler, seconds=0.05 if reason == "timeout" else LONG)
    first, second = bench({"prompt": "the"}, {"prompt": "the", "stream": True})
    small(first, "unavailable")
    *chunks, end = [event.removeprefix("data: ") for event in second.text.split("\n\n")][:-1]
    assert end == "[DONE]"
    assert "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks) == "small"
    assert {json.loads(chunk)["upstream"] for chunk in chunks} == {"unavailable"}
    assert bench.metric("upstream_failures_total", reason=reason) >= 1
    assert "the small model's answer is given" in caplog.text
    assert "prompt is" not in caplog.text
    assert first.json()["usage"]["total_tokens"] == first.json()["usage"]["prompt_tokens"]  # no row was written
    assert bench.upstream.under_way == 0


def test_strange_text_and_usage_are_data(served, rule):
    strange = {"choices": [{**CHOICE, "text": "\ud800{{ 1 }}<b>\x00"}], "usage": {"prompt_tokens": "many"}, "model": 5}
    bench = Bench(served, rule, lambda _: httpx.Response(200, content=json.dumps(strange).encode()))
    (found,) = bench({"prompt": "the"})
    assert found.json()["choices"][0]["text"] == "?{{ 1 }}<b>\x00"
    assert (found.json()["usage"], found.json()["model"]) == (None, "big")


def test_a_server_that_failed_is_left_alone_for_a_while():
    now = 0.0
    back_off = BackOff(lambda: now)
    waits = []
    for _ in range(8):
        assert back_off.may_try()
        back_off.failed(now)
        back_off.failed(now - 0.5)  # one that was under way too
        waits.append(back_off.wait)
        assert not back_off.may_try()
        now += waits[-1]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    assert back_off.may_try()
    assert not back_off.may_try()  # one tries
    back_off.worked()
    assert back_off.may_try()
    back_off.failed(now)
    assert back_off.wait == 1


def test_who_is_asked_again(served, rule):
    """A refusal of one request says nothing of the next; a wrong key does."""
    statuses, now = [400, 422, 413, 200, 401], [0.0]
    bench = Bench(served, rule, lambda _: reply(GOOD, statuses.pop(0) if statuses else 200))
    bench.upstream.back_off.clock = lambda: now[0]
    words = [found.json()["upstream"] for found in bench(*[{"prompt": "the"}] * 6)]
    assert words == ["unavailable"] * 3 + ["answered"] + ["unavailable"] * 2
    assert bench.metric("upstream_failures_total", reason="back_off") == 1
    assert len(bench.asked) == 5
    now[0] = 1.0
    assert bench({"prompt": "the"})[0].json()["upstream"] == "answered"


def test_no_more_requests_than_allowed_are_under_way():
    async def run() -> list[str]:
        gate = asyncio.Event()

        async def handle(request: httpx.Request) -> httpx.Response:
            await gate.wait()
            return httpx.Response(200, content=parts(json.dumps(GOOD).encode()))

        upstream = Upstream("http://up", "big", None, 2, httpx.MockTransport(handle))
        tasks = [asyncio.create_task(upstream.ask("/completions", {}, LONG)) for _ in range(3)]
        while not tasks[2].done():
            await asyncio.sleep(0)
        gate.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        return [one.reason if isinstance(one, UpstreamError) else one.text for one in found]

    assert asyncio.run(run()) == ["large", "large", "busy"]


def test_who_leaves_is_not_answered():
    """What was under way upstream ends."""
    ended = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append(True)
            raise

    async def run() -> None:
        call = Call([], {}, "", 0, 0.0)
        call.listen()
        asyncio.get_running_loop().call_later(0, call.tell, None)
        await unless_left(call, work())

    with pytest.raises(ApiError, match="the client has left"):
        asyncio.run(run())
    assert ended == [True]


def test_what_the_hook_says_leaves(served, rule, tmp_path):
    log = DecisionLog(tmp_path / "log.jsonl")
    bench = Bench(served, rule, either, log, redaction.hide)
    chat = {"messages": [{"role": "developer", "content": "be kind"}, *MESSAGES]}
    bench({"prompt": "the user"}, chat)
    assert json.loads(bench.asked[0].content)["prompt"] == "the token"
    assert json.loads(bench.asked[1].content)["messages"] == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "the token"},
    ]
    small(bench({"prompt": "a secret"})[0], "withheld")
    bench.deferral.redact = redaction.nothing
    small(bench({"prompt": "the"})[0], "withheld")
    for wrong in (None, "the", [{"role": "user"}], [{"role": "user", "content": 5}], [*MESSAGES, *MESSAGES], [5]):
        bench.deferral.redact = lambda _, wrong=wrong: wrong
        small(bench({"prompt": "the"})[0], "withheld")
    assert len(bench.asked) == 2
    assert bench.metric("deferral_decisions_total", upstream="withheld") == 8
    assert [line["reason"] for line in bench.lines] == [None, None, *["redact"] * 8]
    assert "the" not in json.dumps([line | {"upstream": ""} for line in bench.lines])
    log.close()


def test_audits_and_the_log(served, rule, tmp_path):
    """Of greedy answers alone; with texts where the operator wants them; `report` reads what is about tokens."""
    texts = iter(["SMALL", "large", "small"])
    log = DecisionLog(tmp_path / "log.jsonl")
    log.describe(4, [1, 3], "threshold")
    log.add("a", 0, 1, 0.5)
    bench = Bench(
        served, rule, lambda _: reply({"choices": [{**CHOICE, "text": next(texts)}]}), log, audit=1.0, log_text=True
    )
    answers = bench(*[{"prompt": "the"}] * 3, {"prompt": "the", "temperature": 1}, score=0.7)
    for found in answers:
        small(found, "not_asked", 0.7)
    assert bench.metric("upstream_audited_total") == 3
    assert bench.metric("upstream_agreed_total") == 2
    assert bench.metric("upstream_agreement") == pytest.approx(2 / 3)
    assert bench.metric("deferral_share") == 0
    assert bench.metric("upstream_latency_seconds_count") == 3
    audits = [line for line in bench.lines if line.get("audit")]
    assert [line["agrees"] for line in audits] == [True, False, True]
    assert [line["upstream_text"] for line in audits] == ["SMALL", "large", "small"]
    assert {line["request"] for line in audits} < {found.json()["id"] for found in answers}
    told = next(line for line in bench.lines if "audit" not in line and "score" in line)
    assert told["prompt"] == [{"role": "user", "content": "the"}]
    assert (told["text"], told["score"], told["limit"], told["deferred"]) == ("small", 0.7, LIMIT, False)
    summary = summarise([log.path], 60)
    assert (summary.skipped, summary.by(None)[None].tokens) == (0, 1)
    log.close()


def test_a_share_is_audited(served, rule):
    bench = Bench(served, rule, lambda _: reply(GOOD), audit=0.25)
    draws = iter([0.1, 0.25, 0.9, 0.2])
    bench.deferral.random = SimpleNamespace(random=lambda: next(draws))
    bench(*[{"prompt": "the"}] * 4, score=0.7)
    assert len(bench.asked) == 2


def test_what_two_models_cannot_answer_alike(served, rule):
    bench = Bench(served, rule, lambda _: reply(GOOD))
    here = "this server may let another model answer"
    for fields, line in (
        ({"prompt": "the", "n": 2}, f"n=2: {here}, and asks it for one answer; leave n out"),
        ({"prompt": "the", "logprobs": 1}, f"logprobs: {here}, whose tokens are others; leave it out"),
        ({"messages": MESSAGES, "logprobs": True}, f"logprobs: {here}, whose tokens are others; leave it out"),
        ({"prompt": [5]}, f"prompt: {here}; give one text, and no token ids"),
        ({"prompt": ["the", "user"]}, f"prompt: {here}; give one text, and no token ids"),
    ):
        (found,) = bench(fields)
        assert (found.status_code, found.json()["error"]["message"]) == (400, line)
    for field in ("upstream", "deferral", "upstream_model", "defer", "redact", "base_url"):
        (found,) = bench({"prompt": "the", field: "http://elsewhere"})
        assert found.status_code == 400
    assert not bench.asked


# -- scores and settings -----------------------------------------------------------------------------------------------


def test_the_engine_scores_as_defer_does(served, tmp_path):
    """Every score, and of an answer that ends by itself."""
    lengths, tokens = check_scores(served, SEQUENCE_SCORES)
    assert lengths == {6}
    shutil.copytree(served.folder.path, tmp_path / "ends")
    settings = tmp_path / "ends" / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": tokens[2]}))
    ends = Served.find(compose_config("serve", [f"model={tmp_path / 'ends'}", "device=cpu", "dtype=fp32", "name=m"]))
    assert min(check_scores(ends, ["margin"])[0]) <= 3


def check_scores(served: Served, names: Sequence[str]) -> tuple[set[int], list[int]]:
    """The engine's are those of `ee-scale defer`; returns the lengths of the answers and the tokens of one."""
    prompts, lengths = ("hidden state of the token and", "the layer reads"), set()
    model = served.open(torch.device("cpu"))
    engine = Engine(served.config, lambda: model, 200, served.settings, {}, Metrics("m"))
    engine.model, engine.ready = model, True
    for name in names:
        config = DeferConfig(
            small=served.config.model, data="", out="", score=name, max_new_tokens=6, device="cpu", dtype="fp32"
        )
        expected = answer(config, "small", [Case(prompt, None, (), "", None) for prompt in prompts], scored=True)
        assert expected.dtype == "float32"
        for prompt, score in zip(prompts, expected.scores, strict=True):
            call = served.call(CompletionBody(model="m", prompt=prompt, max_tokens=6, temperature=0.0))
            call.tell, call.scored = lambda news: None, name
            engine.submit(call)
            while engine._inbox or engine._calls:
                engine._wait()
                engine._turn()
            assert call.rows[0].score == pytest.approx(score, abs=1e-6)
            lengths.add(call.rows[0].count)
    return lengths, call.rows[0].queued.tokens


def test_a_score_that_fails_is_none(served, rule, monkeypatch):
    def no_memory(*_: object) -> float:
        raise RuntimeError("no memory")

    monkeypatch.setattr("ee_scale.serving.engine.answer_score", no_memory)
    row = SimpleNamespace(queued=SimpleNamespace(prompt=[1], tokens=[2]), count=1, score=float("nan"))
    Engine._score(SimpleNamespace(model=None), "margin", row)
    assert not rule.keeps(row.score, "loose")
    (found,) = Bench(served, rule, fails)({"prompt": "the"}, score=row.score)
    small(found, "unavailable", None)


@pytest.fixture
def find(served, rule, tmp_path):
    """`Deferral.find` with these settings beside good ones."""
    rule.write(tmp_path / "deferral.json")

    def found(*settings: str, model: str = served.config.model) -> Deferral | None:
        good = [f"deferral={tmp_path}/deferral.json", "upstream=http://127.0.0.1:1/v1", "upstream_model=big"]
        config = compose_config("serve", [f"model={model}", *good, *settings])
        return Deferral.find(config, ModelFolder.named(model))

    return found


def test_settings(find, served, rule, tmp_path):
    deferral = find("defer.redact=helpers.redaction:hide")
    assert deferral.redact is redaction.hide
    assert deferral.upstream.url == "http://127.0.0.1:1/v1"
    other = replace(rule, task="classify")
    other.write(tmp_path / "classes.json")
    replace(rule, small="2:0").write(tmp_path / "other.json")
    (tmp_path / "edited.json").write_text((tmp_path / "deferral.json").read_text().replace("0.5", "0.4"))
    for settings, line in (
        (["upstream=null"], "upstream: give all of deferral, upstream and upstream_model, or none"),
        (["upstream=ftp://x/v1"], "upstream=ftp://x/v1: give http(s)://host:port/v1, without '?' and '#'"),
        (["upstream=big:8000"], "upstream=big:8000: give http"),
        (["upstream='http://x/v1?key=5'"], "without '?' and '#'"),
        (["upstream=http://me:pass@x/v1"], "upstream: a password in an address is seen by many; leave it out and set"),
        ([f"deferral={tmp_path}/none.json"], "none.json: not a whole file of ours"),
        ([f"deferral={tmp_path}/edited.json"], "its content does not match its digest"),
        ([f"deferral={tmp_path}/other.json"], "other.json: the rule of another small model than"),
        ([f"deferral={tmp_path}/classes.json"], "classes.json: a rule of task=classify; this server generates text"),
        (["defer.redact=helpers.nowhere:hide"], "defer.redact=helpers.nowhere:hide: No module named 'helpers.nowhere'"),
        (["defer.redact=helpers.redaction"], "defer.redact=helpers.redaction: "),
        (["defer.redact=helpers.redaction:__doc__"], "defer.redact=helpers.redaction:__doc__: no function"),
        (["defer.audit=2"], "defer.audit=2.0: give a share between 0 and 1"),
        (["defer.seconds=0"], "defer.seconds=0.0: must be above 0"),
    ):
        with pytest.raises(UserError) as error:
            find(*settings)
        assert line in str(error.value)
    alone = ["deferral=null", "upstream=null", "upstream_model=null"]
    assert find(*alone) is None
    with pytest.raises(UserError, match=r"defer\.audit=0\.1: goes with deferral, upstream and upstream_model"):
        find(*alone, "defer.audit=0.1")


def test_no_file_names_code(served, tmp_path, capsys):
    config = compose_config("serve", [f"model={served.config.model}", "defer.redact=helpers.redaction:hide"])
    (tmp_path / "serve.yaml").write_text(to_yaml(config))
    assert main(["serve", "--config", str(tmp_path / "serve.yaml")]) == 2
    assert "defer.redact=helpers.redaction:hide: names code to run; give it on the command" in capsys.readouterr().err


def test_rules_name_the_model_its_exits_and_its_numbers(served, rule):
    base = ModelFolder.named(str(served.folder.path.parent / "base"))
    with pytest.raises(UserError, match=r"here: the rule of another small model than .*; run ee-scale defer with it"):
        rule.check_model(base, "here")
    rule.check_model(served.folder, "here")
    bench = Bench(served, rule, fails)
    bench.deferral.check_dtype(SimpleNamespace(dtype=torch.float32))
    with pytest.raises(UserError, match=r"dtype: the deferral rule was made in float32, this server .* bfloat16"):
        bench.deferral.check_dtype(SimpleNamespace(dtype=torch.bfloat16))
