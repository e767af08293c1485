"""`ee-scale serve follow=...`: the task changes in mid-stream; and a server that is told to stop."""

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from helpers.server import EASY, HARD, Server, hold_steps, serving, write_drifting_model

from ee_scale.modeling.following import FollowedLimits


def test_limits_follow_a_change_of_task(tmp_path):
    """Exits that go wrong are switched off within the stated number of tokens, for that tag alone; they come back."""
    rows, wanted = 4, 0.8
    # Of each row nine tokens may wait for their audit while exits are being switched off.
    settles = FollowedLimits(wanted).settles(9 * rows)
    settings = [f"rows={rows}", "policy=threshold", "threshold=0.5", "audit=1", f"follow={wanted}"]
    model = write_drifting_model(tmp_path)
    with serving(model, tmp_path, *settings, "levels=levels.json", inject=hold_steps) as server:
        client = server.client()

        def early(token: int, tag: str, tokens: int) -> float:
            """The share of tokens that an exit gave: behind hard text all of them are wrong."""
            options = {"max_tokens": -(-tokens // rows), "model": "model", "extra_body": {"exit_tag": tag}}
            answer = client.completions.create(prompt=[[token]] * rows, temperature=0, **options)
            layers = [layer for choice in answer.choices for layer in choice.model_extra["exit_layers"]]
            return layers.count(1) / len(layers)

        def told(name: str, tag: str = "task") -> float:
            return server.metric(f"exit_follow_{name}", tag=tag)

        assert client.models.list().data[0].model_extra["follow"] == wanted
        for tag in ("task", "other"):
            assert early(EASY, tag, 100) > 0.8
            assert (told("level", tag), told("state", tag)) == (0, 0)
        assert told("audited_tokens_total") == told("agreed_tokens_total") > 80
        assert 0 < early(HARD, "task", settles) <= 1 - wanted
        assert told("state") == 2
        assert told("audited_tokens_total") > told("agreed_tokens_total")
        assert early(HARD, "task", settles) <= 1 - wanted
        assert (told("level", "other"), told("state", "other")) == (0, 0)
        early(EASY, "task", 400)
        assert early(EASY, "task", 100) > 0.8
        assert (told("level"), told("state")) == (0, 0)
        lines = [line.partition("follow: ")[2] for line in server.output.splitlines() if "follow: " in line]
        assert all(line.startswith("limits of tag 'task' ") for line in lines)
        assert ["were raised" in lines[0], "take no exit" in lines[1], "as they were" in lines[-1]] == [True] * 3
        early(HARD, "task", 100)
        drain_by(signal.SIGINT, server, tmp_path)
    kept = json.loads((tmp_path / "levels.json").read_text())
    assert kept["model"] == "model"
    assert {one["tag"]: one["state"] for one in kept["tags"]} == {"task": "off", "other": "usual"}


def drain_by(number: int, server: Server, folder: Path) -> None:
    """What is under way is answered to its end after a signal, new requests are refused, and the code is 0."""
    (folder / "hold").touch()
    with server.raw() as raw, ThreadPoolExecutor() as pool:
        body = {"model": "model", "prompt": [EASY], "max_tokens": 9, "exit_tag": "other"}
        answer = pool.submit(raw.post, "/v1/completions", json=body)
        while not server.metric("num_requests_running"):
            pass
        os.kill(server.process.pid, number)
        while "stopping" not in server.output:
            pass
        refused = raw.post("/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["message"][:22]) == (503, "the server is stopping")
        (folder / "hold").unlink()
        assert answer.result().json()["usage"]["completion_tokens"] == 9
    server.process.join()
    assert server.process.exitcode == 0
    assert "Traceback" not in server.output
