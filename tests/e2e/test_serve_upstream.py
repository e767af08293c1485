"""`ee-scale serve upstream=...` with a second `ee-scale serve` as upstream: whose answer is given, and what leaves."""

import json
import os
import re
import shutil
import signal
import threading

import pytest
import torch
from helpers.server import hold_steps, serving, write_served_model
from transformers import AutoModelForCausalLM

from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.config.defer import DeferConfig
from ee_scale.evaluation.answering import Case, answer
from ee_scale.inference.deferral import VERSION, DeferralRule, fingerprint_of

PROMPTS = ("the layer reads", "hidden state of the token and", "user", "the token asks for more and the user reads it")
MESSAGES = [{"role": "user", "content": "the user reads the hidden state"}]
NEW = 12
ASK = {"exit_tag": "ask"}


def hold_with_key(rank: int) -> None:
    """In the upstream: what it wants to be told, and steps that wait."""
    os.environ["EE_SCALE_API_KEY"] = "k-upstream"
    hold_steps(rank)


def give_key(rank: int) -> None:
    os.environ["EE_SCALE_UPSTREAM_KEY"] = "k-upstream"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A small model, and a large one of the same size that says something else."""
    small = write_served_model(tmp_path_factory.mktemp("served"))
    base, large = small.parent / "base", small.parent / "large"
    model = AutoModelForCausalLM.from_pretrained(base)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.roll(7, 0))
    shutil.copytree(base, large)
    model.save_pretrained(large)
    return small, large


@pytest.fixture(scope="module")
def scores(models):
    """As `ee-scale defer` finds them."""
    config = DeferConfig(small=str(models[0]), data="", out="", max_new_tokens=NEW, device="cpu", dtype="fp32")
    return answer(config, "small", [Case(prompt, None, (), "", None) for prompt in PROMPTS], scored=True)


@pytest.fixture(scope="module")
def pair(models, scores, tmp_path_factory):
    """(the server that answers, its upstream): two of the prompts are kept."""
    small, large = models
    folder, rule = tmp_path_factory.mktemp("small"), tmp_path_factory.mktemp("rule") / "deferral.json"
    limit = sum(sorted(scores.scores)[1:3]) / 2
    found = fingerprint_of(ModelFolder.named(str(small)), "margin")
    tags = {"ask": None, "keep": 0.0}
    DeferralRule(
        VERSION, "generate", "margin", limit, tags, [0.5], [0.5], found, "exact", 0.02, 0.95, {"dtype": "float32"}
    ).write(rule)
    with serving(large, tmp_path_factory.mktemp("large"), "name=big", inject=hold_with_key) as upstream:
        asks = [f"deferral={rule}", f"upstream={upstream.url}/v1", "upstream_model=big", "defer.seconds=600"]
        asks += ["defer.redact=helpers.redaction:hide", "name=tiny", "log=decisions.jsonl", "rows=2"]
        with serving(small, folder, *asks, inject=give_key) as server:
            yield server, upstream


@pytest.fixture(scope="module")
def clients(pair):
    return pair[0].client(), pair[1].client("k-upstream")


def complete(client, prompt, model="tiny", **options):
    given = {"temperature": 0, "max_tokens": NEW, **options}
    return client.completions.create(model=model, prompt=prompt, **given)


def marks(response):
    extra = response.model_extra
    return extra["deferred"], extra["upstream"], response.model


def test_scores_are_those_of_defer_and_decide(clients, scores):
    own, big = clients
    kept = 0
    for prompt, text, score in zip(PROMPTS, scores.texts, scores.scores, strict=True):
        found = complete(own, prompt)
        assert found.model_extra["score"] == pytest.approx(score, abs=1e-6)
        (choice,) = found.choices
        if score >= sorted(scores.scores)[2]:
            kept += 1
            assert (choice.text, *marks(found)) == (text, False, "not_asked", "tiny")
            assert found.usage.completion_tokens == NEW
        else:
            there = complete(big, prompt.replace("user", "token"), "big")
            assert (choice.text, *marks(found)) == (there.choices[0].text, True, "answered", "big")
            assert choice.text != text
            assert (choice.finish_reason, found.usage) == (there.choices[0].finish_reason, there.usage)
    assert kept == 2
    for tag, word in (("keep", "not_asked"), ("ask", "answered")):
        for prompt in PROMPTS[:2]:
            assert marks(complete(own, prompt, extra_body={"exit_tag": tag}))[1] == word


def test_settings_go_along_and_streams_are_the_whole_answer(clients):
    own, big = clients
    options = {"temperature": 1.2, "seed": 5, "top_p": 0.9, "max_tokens": 9, "messages": MESSAGES}
    redacted = [{"role": "user", "content": "the token reads the hidden state"}]
    there = big.chat.completions.create(model="big", **options | {"messages": redacted})
    whole = own.chat.completions.create(model="tiny", extra_body=ASK, **options)
    assert whole.choices[0].message.content == there.choices[0].message.content
    assert (*marks(whole), whole.usage) == (True, "answered", "big", there.usage)
    chunks = list(
        own.chat.completions.create(
            model="tiny", extra_body=ASK, stream=True, stream_options={"include_usage": True}, **options
        )
    )
    *parts, last = chunks
    assert "".join(part.choices[0].delta.content for part in parts) == there.choices[0].message.content
    assert (parts[-1].choices[0].finish_reason, last.usage) == ("length", there.usage)
    assert {marks(part) for part in chunks} == {(True, "answered", "big")}
    stop = there.choices[0].message.content[3:6]
    cut = own.chat.completions.create(model="tiny", extra_body=ASK, stop=stop, **options).choices[0]
    assert (cut.message.content, cut.finish_reason) == (there.choices[0].message.content.partition(stop)[0], "stop")
    kept = [part.choices[0].text for part in complete(own, PROMPTS[0], stream=True, extra_body={"exit_tag": "keep"})]
    assert "".join(kept) == complete(own, PROMPTS[0], extra_body={"exit_tag": "keep"}).choices[0].text
    assert len(kept) > 1


def test_a_hook_that_fails_lets_nothing_leave(pair, clients):
    before = pair[1].raw().get("/metrics", headers={"authorization": "Bearer k-upstream"}).text
    found = complete(clients[0], "the secret layer", extra_body=ASK)
    assert marks(found) == (False, "withheld", "tiny")
    assert (
        found.choices[0].text
        == complete(clients[0], "the secret layer", extra_body={"exit_tag": "keep"}).choices[0].text
    )
    assert pair[1].raw().get("/metrics", headers={"authorization": "Bearer k-upstream"}).text == before
    assert "ValueError; nothing left this machine" in pair[0].output


def test_an_upstream_that_is_killed_in_the_middle(pair, clients):
    """The last one: afterwards there is no upstream. What was told of it all holds no prompt and no key."""
    server, upstream = pair
    small = complete(clients[0], PROMPTS[0], extra_body={"exit_tag": "keep"}).choices[0].text
    (upstream.folder / "hold").touch()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(complete(clients[0], PROMPTS[0], extra_body=ASK)))
    thread.start()
    with upstream.raw() as raw:
        while not re.search(
            r"num_requests_(running|waiting)\{.*\} 1.0",
            raw.get("/metrics", headers={"authorization": "Bearer k-upstream"}).text,
        ):
            pass
    os.kill(upstream.process.pid, signal.SIGKILL)
    thread.join()
    answers.append(complete(clients[0], PROMPTS[0], extra_body=ASK))
    for found in answers:
        assert (found.choices[0].text, *marks(found)) == (small, False, "unavailable", "tiny")
        assert found.usage.completion_tokens == NEW
    failures = {
        reason: server.metric("upstream_failures_total", reason=reason) for reason in ("connection", "back_off")
    }
    assert failures["connection"] >= 1
    assert sum(failures.values()) == 2
    assert server.metric("deferral_decisions_total", upstream="unavailable") == 2
    assert server.metric("upstream_latency_seconds_count") == server.metric(
        "deferral_decisions_total", upstream="answered"
    )
    assert 0 < server.metric("deferral_share") < 1
    (card,) = clients[0].models.list().data
    assert card.model_extra["deferral"]["upstream_model"] == "big"
    os.kill(server.process.pid, signal.SIGTERM)
    server.process.join()
    assert server.process.exitcode == 0
    written = (server.folder / "decisions.jsonl").read_text()
    lines = [json.loads(line) for line in written.splitlines()]
    assert {line["upstream"] for line in lines} == {"not_asked", "answered", "withheld", "unavailable"}
    assert {line["reason"] for line in lines} >= {None, "redact", "connection"}
    assert all(
        isinstance(line["score"], float) and line["deferred"] == (line["upstream"] == "answered") for line in lines
    )
    said = server.output + written
    assert f"go as helpers.redaction:hide returns them to {upstream.url}/v1 (big)" in said
    for word in ("k-upstream", "secret", "hidden", "Traceback"):
        assert word not in said
