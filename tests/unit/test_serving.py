"""The parts of the server without HTTP: who has a row when, what stop texts keep back, what ends a request."""

import asyncio
import json
import re
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from helpers.chats import chat_tokenizer
from helpers.server import write_served_model
from starlette.exceptions import HTTPException

from ee_scale.cli.main import main
from ee_scale.config.compose import compose_config
from ee_scale.errors import UserError
from ee_scale.modeling.row_queue import RowQueue
from ee_scale.reading import write_json
from ee_scale.serving.app import Guard, make_app
from ee_scale.serving.bodies import ChatBody, CompletionBody
from ee_scale.serving.call import Call, Piece, Row
from ee_scale.serving.engine import MOST_QUEUES, Engine
from ee_scale.serving.errors import ApiError
from ee_scale.serving.following import MOST_SHOWN, Following
from ee_scale.serving.metrics import Metrics
from ee_scale.serving.served import Served


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Served:
    model = write_served_model(tmp_path_factory.mktemp("served"))
    settings = ["name=m", "rows=2", "max_waiting=4", "policies=[threshold,fixed,patience]", "max_new_tokens=60"]
    return Served.find(compose_config("serve", [f"model={model}", "device=cpu", "dtype=fp32", *settings]))


@pytest.fixture(scope="module")
def model(served):
    return served.open(torch.device("cpu"))


@pytest.fixture
def engine(served, model) -> Engine:
    """One that takes turns when it is told to, on no thread."""
    found = Engine(served.config, lambda: model, 200, served.settings, {}, Metrics("m"))
    found.model, found.ready = model, True
    return found


def ask(served: Served, **fields: object) -> Call:
    """A request, which keeps what it is told in `told`."""
    body = {"model": "m", "prompt": "the layer", "max_tokens": 20, "temperature": 0.0, **fields}
    call = served.call(CompletionBody(**body))
    call.told = []
    call.tell = call.told.append
    return call


def turn(engine: Engine, times: int = 1) -> None:
    for _ in range(times):
        engine._wait()
        engine._turn()


def finish(engine: Engine) -> None:
    while engine._inbox or engine._calls:
        turn(engine)


def texts(call: Call) -> list[str]:
    pieces = [piece for news in call.told for piece in news]
    return ["".join(piece.text for piece in pieces if piece.row == row.index) for row in call.rows]


def alone(served: Served, engine: Engine, **fields: object) -> list[str]:
    engine.submit(call := ask(served, **fields))
    finish(engine)
    return texts(call)


def test_who_leaves_frees_the_row_within_one_step(served, engine):
    expected = alone(served, engine, prompt="reads")
    calls = [ask(served, max_tokens=60), ask(served, max_tokens=60), ask(served, prompt="reads")]
    for call in calls:
        engine.submit(call)
    turn(engine, 3)
    assert {call for call, *_ in engine._running.values()} == set(calls[:2])
    written = engine.metrics.generated.labels("m")._value.get()
    engine.leave(calls[0])
    turn(engine)
    assert {call for call, *_ in engine._running.values()} == {calls[1], calls[2]}
    assert not engine._waiting
    # The other one got its token meanwhile, the new one its first two, and the one that left none.
    assert engine.metrics.generated.labels("m")._value.get() == written + 1 + 2
    finish(engine)
    assert texts(calls[2]) == expected
    assert calls[1].rows[0].count == 60
    assert engine._held == 0


def test_a_full_line_and_rows_that_come_back(served, engine):
    engine.submit(ask(served, n=6))
    with pytest.raises(ApiError, match="6 answers are under way or wait") as error:
        engine.submit(ask(served))
    assert error.value.status == 429
    finish(engine)
    engine.submit(ask(served, n=6))
    finish(engine)
    assert (engine._held, len(engine._running), len(engine._waiting)) == (0, 0, 0)
    with pytest.raises(ApiError, match="n=7: 1 x 7 answers are more than fit into the queue"):
        ask(served, n=7)


def test_time_over(served, engine):
    engine.submit(late := ask(served))
    engine.submit(other := ask(served))
    turn(engine, 2)
    late.deadline = time.monotonic() - 1
    turn(engine)
    assert isinstance(late.told[-1], ApiError)
    assert (late.told[-1].status, late.told[-1].code) == (503, "timeout")
    finish(engine)
    assert other.rows[0].count == 20


def test_a_step_that_fails_ends_its_own_requests_alone(served, engine, monkeypatch):
    expected = alone(served, engine)
    step = RowQueue.step

    def fails(queue: RowQueue) -> list:
        if queue.policy.name == "fixed":
            raise RuntimeError("no memory\nat all")
        return step(queue)

    engine.submit(good := ask(served))
    engine.submit(bad := ask(served, exit_policy="fixed", exit_layer=1))
    monkeypatch.setattr(RowQueue, "step", fails)
    finish(engine)
    assert texts(good) == expected
    assert (bad.told[-1].status, str(bad.told[-1])) == (500, "decoding failed (no memory)")
    monkeypatch.undo()
    assert alone(served, engine, exit_policy="fixed", exit_layer=1)
    assert engine._held == 0


def test_more_policies_than_caches_take_turns(served, engine):
    """Nobody waits for ever, and no later request goes before an earlier one."""
    kinds = [{"exit_policy": "fixed", "exit_layer": 1}, {"exit_policy": "fixed", "exit_layer": 3}, {}]
    kinds += [{"exit_policy": "patience", "exit_patience": count} for count in (2, 3, 4)]
    engine.config = replace(engine.config, rows=7)
    calls, begun = [ask(served, **kind, max_tokens=9) for kind in (*kinds, kinds[0])], []
    for call in calls:
        engine.submit(call)
    while engine._calls or engine._inbox:
        turn(engine)
        assert len(engine._queues) <= MOST_QUEUES
        begun += [call for call, *_ in engine._running.values() if call not in begun]
    assert [calls.index(call) for call in begun] == sorted(calls.index(call) for call in begun)
    assert all(call.rows[0].count == 9 for call in calls)
    assert len(engine.metrics._seen) == len(engine._queues)


def test_equal_policies_share_a_batch(served, engine):
    for number in range(2):
        engine.submit(ask(served, exit_policy="threshold", exit_threshold=0.5 + number / 10))
    turn(engine)
    (queue,) = engine._queues.values()
    assert len(queue.places) == 2
    finish(engine)


# -- the text of a row -------------------------------------------------------------------------------------------------


def said(stops: list[str], *words: str, ended: bool = True) -> tuple[list[Piece], Row]:
    """The pieces of an answer that says these words, each in one token."""
    row = Row(0, [1], {"max_new_tokens": 99}, chat_tokenizer(), stops, frozenset())
    row._decode = lambda ids: "".join(words[token] for token in ids)
    row.put(torch.tensor([[1]]))
    for token in range(len(words)):
        row.put_exits([token], [token + 1])
        row.put(torch.tensor([token]))
    if ended:
        row.end()
    return row.take("stop"), row


@pytest.mark.parametrize(
    ("stops", "words", "text"),
    [
        ([], ("a", "b"), "ab"),
        (["c"], ("a", "b"), "ab"),
        (["b"], ("a", "b", "c"), "a"),
        (["bc"], ("a", "xb", "cd", "e"), "ax"),
        (["bcd"], ("ab", "c", "e"), "abce"),
        (["bcd"], ("ab", "c"), "abc"),
        (["aab"], ("a", "a", "a", "b"), "a"),
        (["abc", "b"], ("a", "b", "c"), "a"),
        (["bc", "abcd"], ("a", "b", "c"), "a"),
        (["a"], ("a",), ""),
        (["\n\n"], ("x\n", "\n", "y"), "x"),
    ],
)
def test_stop_texts(stops, words, text):
    pieces, row = said(stops, *words)
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.finish for piece in pieces] == [*[None] * (len(pieces) - 1), "stop"]
    tokens = [token for piece in pieces for token in piece.tokens]
    assert tokens == list(range(row.count))
    assert [layer for piece in pieces for layer in piece.layers] == [token + 1 for token in tokens]
    assert row.stopped == (text != "".join(words))


def test_text_is_kept_back_no_longer_than_needed():
    pieces, _ = said(["bcd"], "a", "b", "x", "y")
    assert [piece.text for piece in pieces] == ["a", "bx", "y", ""]


# -- bodies ------------------------------------------------------------------------------------------------------------


def test_what_is_null_or_asks_for_nothing_is_not_there():
    turn = {"role": "assistant", "content": "x", "tool_calls": None, "refusal": None, "annotations": None}
    body = ChatBody(model="m", messages=[turn], stop=None, tools=[], response_format={"type": "text"}, n=1)
    assert body.turns == [{"role": "assistant", "content": "x"}]
    assert body.stops == []
    assert body.ranked is None
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = ChatBody(model="m", messages=[{"role": "developer", "content": parts, "name": "me"}], logprobs=True)
    assert body.turns == [{"role": "system", "content": "a\nb", "name": "me"}]
    assert body.ranked == 0


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts(prompt, prompts):
    assert CompletionBody(model="m", prompt=prompt).prompts == prompts


def test_drafts_and_layers_of_an_operator(served):
    """Options of one policy do not hold for requests that name another; bounds always do."""
    given = ["policy=lossless", "draft_length=2", "min_layer=2", "policies=[threshold]", "loosest=0.3"]
    settings = [f"model={served.config.model}", "name=m", *given]
    other = Served.find(compose_config("serve", settings))
    assert other.policies == ("lossless", "threshold")
    options, limits = other.exit_options(SimpleNamespace(**dict.fromkeys(FIELDS)))
    assert options == {"exit_policy": "lossless", "exit_draft_length": 2, "exit_min_layer": 2}
    assert limits is None
    asked = dict.fromkeys(FIELDS) | {"exit_policy": "threshold", "exit_threshold": 0.4}
    options, limits = other.exit_options(SimpleNamespace(**asked))
    assert limits == {3: 0.4}
    for fields, line in (
        ({"exit_threshold": 0.2}, "exit_threshold=0.2: looser than this server's 0.3"),
        ({"exit_min_layer": 1}, "exit_min_layer=1: this server's least is 2"),
        ({"exit_policy": "off"}, "exit_policy=off: this server allows lossless, threshold"),
    ):
        with pytest.raises(ApiError, match=line):
            other.exit_options(SimpleNamespace(**asked | fields))


FIELDS = [name for name in CompletionBody.model_fields if name.startswith("exit_")]


# -- HTTP, with an engine that says what it is told to -----------------------------------------------------------------


def post(served: Served, news: list, **fields: object) -> httpx.Response:
    """The answer to a request of which the engine tells these pieces and errors."""
    engine = SimpleNamespace(check_open=lambda: None, leave=lambda call: engine.gone.append(call), gone=[])
    engine.submit = lambda call: [call.tell(item) for item in news]
    app = make_app(served, engine, Metrics("m"), None)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            answer = await client.post("/v1/completions", json={"model": "m", "prompt": "the", **fields})
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return answer

    answer = asyncio.run(ask())
    assert len(engine.gone) == 1
    return answer


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_leaves_nothing(served, stream):
    """Before the first piece, behind it, or not at all: the engine is told, and no task goes on."""
    body = json.dumps({"model": "m", "prompt": "the", "stream": stream}).encode()
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
    scope |= {"asgi": {"version": "3.0", "spec_version": "2.3"}}
    for news in ([], [[Piece(0, "a", [5], [4])]], [[Piece(0, "a", [5], [4], finish="stop")]]):
        engine = SimpleNamespace(check_open=lambda: None, gone=[])
        engine.leave = engine.gone.append

        async def ask(engine: Any = engine, news: list = news) -> None:
            app, messages = make_app(served, engine, Metrics("m"), None), asyncio.Queue()
            messages.put_nowait({"type": "http.request", "body": body, "more_body": False})

            def submit(call: Call) -> None:
                for item in news:
                    call.tell(item)
                if not (news and news[-1][-1].finish):
                    asyncio.get_running_loop().call_later(0.05, messages.put_nowait, {"type": "http.disconnect"})

            async def send(message: dict) -> None:
                pass

            engine.submit = submit
            await app(dict(scope), messages.get, send)
            for _ in range(3):
                await asyncio.sleep(0)
            assert asyncio.all_tasks() == {asyncio.current_task()}

        asyncio.run(ask())
        assert len(engine.gone) == 1


# -- limits that follow ------------------------------------------------------------------------------------------------


def following(served: Served, *settings: str) -> Following:
    """That of a server with these settings."""
    given = [f"model={served.config.model}", "policies=[threshold,patience]", "audit=1", "follow=0.9", *settings]
    return Following.find(compose_config("serve", given), ("off", "threshold", "patience"), "m")


def test_levels_survive_a_restart(served, tmp_path):
    setting = f"levels={tmp_path / 'levels.json'}"
    first = following(served, setting)
    for _ in range(9):
        first.limits.saw("sql", agrees=False)
    first.limits.saw(None, agrees=True)
    kept = json.loads((tmp_path / "levels.json").read_text())  # written when the state changed
    assert [(one["tag"], one["state"]) for one in kept["tags"]] == [("sql", "raised")]
    first.save()
    again = following(served, setting)
    assert again.limits.tags == first.limits.tags
    assert again.limits.limits("threshold", [0.5], "sql") == first.limits.limits("threshold", [0.5], "sql") != (0.5,)
    assert [path.name for path in tmp_path.iterdir()] == ["levels.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "other"}, "of model 'other', not 'm'; give another file"),
        ({"model": 5}, "model=5: "),
        ({"tags": None}, "tags=None: "),
        ({"tags": [{"tag": "a", "level": float("nan"), "state": "off", "audited": 1, "agreed": 1}]}, "tags: 0.level="),
        ({"tags": [{"tag": "a", "level": -1.0, "state": "off", "audited": 1, "agreed": 1}]}, "tags: 0.level=-1.0: "),
        ({"tags": [{"tag": "a", "level": 0.0, "state": "on", "audited": 1, "agreed": 1}]}, "tags: 0.state='on': "),
        ({"tags": [{"tag": "a", "level": 0.0, "state": "off", "audited": 1}]}, "tags: 0.agreed: "),
        ({"tags": [{"tag": "a", "level": 0.0, "state": "off", "audited": 1, "agreed": 1}] * 2}, "some of them twice"),
    ],
)
def test_levels_that_are_none(served, tmp_path, change, message):
    write_json(path := tmp_path / "levels.json", {"model": "m", "tags": [], **change})
    before = path.read_bytes()
    with pytest.raises(UserError, match=re.escape(message)):
        following(served, f"levels={path}")
    path.write_text("a letter to somebody")
    with pytest.raises(UserError, match="not a whole file of ours"):
        following(served, f"levels={path}")
    assert before
    assert path.read_text() == "a letter to somebody"


def test_levels_that_cannot_be_written(served, tmp_path, caplog, monkeypatch):
    """One line in the log; whoever decodes goes on."""
    found = following(served, f"levels={tmp_path / 'levels.json'}")
    found.path = tmp_path / "gone" / "levels.json"
    monkeypatch.setattr("ee_scale.log.log.handlers", [])  # of a command that ran in this process before
    monkeypatch.setattr("ee_scale.log.log.propagate", True)
    found.save()
    assert [record.getMessage() for record in caplog.records] == [
        f"levels={found.path}: cannot write (No such file or directory)"
    ]


def test_what_metrics_tell_of_tags(served):
    """Of a bounded number, those of the highest levels; whatever the tags are, each line is one."""
    found, metrics = following(served), Metrics("m")
    metrics.registry.register(found)
    for number in range(2 * MOST_SHOWN):
        found.limits.saw(f"tag {number}", agrees=number % 2 == 0)
    for _ in range(30):
        found.limits.saw('a"b\n\n# c', agrees=False)
    lines = [line for line in metrics.text().decode().splitlines() if line.startswith("ee_scale:exit_follow_")]
    assert len(lines) == 4 * MOST_SHOWN
    tag = 'tag="a\\"b\\n\\n# c"'
    assert f'ee_scale:exit_follow_state{{model_name="m",{tag}}} 2.0' in lines
    assert f'ee_scale:exit_follow_audited_tokens_total{{model_name="m",{tag}}} 30.0' in lines
    assert sum(line.endswith(" 0.0") and "level" in line for line in lines) == 0


def test_policies_without_limits_do_not_follow(served, engine):
    """Their requests are answered; what is audited of them moves no level."""
    found = following(served)
    engine.logged = {"exit_audit": 1.0, "exit_follow": found.limits}
    alone(served, engine, exit_policy="patience", exit_patience=2)
    alone(served, engine, exit_policy="off")
    assert not found.limits.tags
    alone(served, engine, exit_policy="threshold", exit_threshold=0.0, exit_tag="sql")
    assert found.limits.tags["sql"].audited == 19  # all but the first, which the prompt's pass gives


def test_an_error_in_the_middle_of_a_stream(served):
    pieces, error = [Piece(0, "a", [5], [4])], ApiError(503, "not done", code="timeout")
    told = {"message": "not done", "type": "server_error", "param": None, "code": "timeout"}
    for news in ([error], [pieces, error]):
        whole = post(served, news)
        assert (whole.status_code, whole.json()) == (503, {"error": told})
    before = post(served, [error], stream=True)  # what is wrong before the first token has a status
    assert (before.status_code, before.json()) == (503, {"error": told})
    streamed = post(served, [pieces, error], stream=True)
    first, last, end = streamed.text.split("\n\n")
    assert json.loads(first.removeprefix("data: "))["choices"][0]["text"] == "a"
    assert json.loads(last.removeprefix("data: ")) == {"error": told}
    assert end == ""


def guarded(receive: list, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch, **options: object) -> int:
    """The status of a request whose body comes like this; of an application that reads it to its end."""
    monkeypatch.setattr("ee_scale.serving.app.BODY_SECONDS", 0)
    seen = []

    async def app(scope: dict, receive: Any, send: Any) -> None:
        try:
            while (await receive())["more_body"]:
                pass
            seen.append(200)
        except HTTPException as error:
            seen.append(error.status_code)

    async def give() -> dict:
        if not receive:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": receive.pop(0), "more_body": True}

    async def send(message: dict) -> None:
        if message["type"] == "http.response.start":
            seen.append(message["status"])

    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "path": "/v1/completions", "headers": pairs}
    asyncio.run(Guard(app, **{"api_key": None, "most_bytes": 10, **options})(scope, give, send))
    return seen[0]


def test_bodies_that_do_not_come_or_do_not_end(monkeypatch):
    assert guarded([], {}, monkeypatch) == 408
    assert guarded([b"12345"], {}, monkeypatch) == 408
    assert guarded([b"123456"] * 2, {}, monkeypatch) == 413
    assert guarded([], {"content-length": "11"}, monkeypatch) == 413
    assert guarded([], {"content-length": "9" * 5000}, monkeypatch) == 413


def test_hosts_and_keys(monkeypatch):
    for host, status in (
        ("localhost:80", 408),
        ("127.0.0.1", 408),
        ("[::1]:8000", 408),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("", 403),
    ):
        assert guarded([], {"host": host}, monkeypatch, local=True) == status
    for given, status in (("Bearer kéy", 408), ("Bearer ké", 401), ("kéy", 401), ("", 401)):
        assert guarded([], {"authorization": given}, monkeypatch, api_key="kéy") == status


def test_a_model_that_does_not_open(served, monkeypatch, capsys):
    """After the server has begun to listen: one line, and the code of bad input."""

    def opens(found: Served, device: torch.device) -> None:
        raise UserError("model: a number in it is none")

    monkeypatch.setattr(Served, "open", opens)
    assert main(["serve", f"model={served.config.model}", "device=cpu", "port=0"]) == 2
    assert capsys.readouterr().err.endswith("error: model: a number in it is none\n")
