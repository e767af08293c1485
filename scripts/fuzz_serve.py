"""Random bodies for a running `ee-scale serve`: each gets an answer, or one line that says why not.

ee-scale serve model=my-model name=m max_new_tokens=16 policies=[threshold,fixed,patience]
python scripts/fuzz_serve.py --url http://127.0.0.1:8000 --model m --seconds 120

Leaves with 1 at the first body that the server fails on, and prints the smallest one like it.
"""

import argparse
import json
import sys
import time

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

WORDS = ("", "the", "a" * 300, "../../etc/passwd", "file:///x", "\x00", "\ud800", "{{ 1 }}", "🙂", "off", "lossless")
NUMBERS = (0, -1, 1, 2, 3, 0.5, 1e-30, 1e30, 10**30, -(2**63), 2**64, True, False)
PLAIN = st.one_of(st.none(), st.sampled_from(WORDS), st.sampled_from(NUMBERS), st.integers(-5, 5), st.text(max_size=5))
JSON = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(("system", "user", "assistant", "tool")) | PLAIN,
            "content": st.text(max_size=9) | JSON,
        }
    ),
    max_size=3,
)
FIELDS: dict[str, st.SearchStrategy] = {
    "prompt": st.text(max_size=20) | st.lists(st.integers(-1, 400), max_size=4) | JSON,
    "messages": MESSAGES | JSON,
    "max_tokens": st.integers(1, 4) | JSON,
    "temperature": st.floats(0, 2) | PLAIN,
    "top_p": st.floats(0, 1) | PLAIN,
    "top_k": st.integers(1, 9) | PLAIN,
    "n": st.integers(1, 3) | PLAIN,
    "seed": st.integers() | PLAIN,
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3) | JSON,
    "stream": st.booleans() | PLAIN,
    "stream_options": st.just({"include_usage": True}) | JSON,
    "logprobs": st.integers(0, 5) | st.booleans() | PLAIN,
    "top_logprobs": st.integers(0, 5) | PLAIN,
    "exit_policy": st.sampled_from(("off", "threshold", "entropy", "margin", "patience", "fixed", "lossless")) | PLAIN,
    "exit_threshold": st.floats(0, 1) | st.dictionaries(st.sampled_from(("1", "3", "x")), st.floats(0, 1)) | JSON,
    "exit_layer": st.integers(0, 5) | PLAIN,
    "exit_min_layer": st.integers(0, 5) | PLAIN,
    "exit_patience": st.integers(0, 5) | PLAIN,
    "exit_draft_length": st.integers(0, 5) | PLAIN,
    "exit_tag": st.text(max_size=5) | PLAIN,
    "tools": JSON,
    "response_format": JSON,
    "user": JSON,
}


@st.composite
def requests(draw: st.DrawFn, model: str) -> tuple[str, bytes]:
    """(path, body); about half of the bodies could be answered."""
    chat = draw(st.booleans())
    body = {"model": model, "max_tokens": 2}
    body |= {"messages": [{"role": "user", "content": "the"}]} if chat else {"prompt": "the"}
    for field in draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=4, unique=True)):
        body[field] = draw(FIELDS[field])
    if draw(st.integers(0, 9)) == 0:
        body[draw(st.text(max_size=5))] = draw(JSON)
    data = json.dumps(body).encode()
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=3)) + data[at + draw(st.integers(0, 3)) :]
    return ("/v1/chat/completions" if chat else "/v1/completions"), data


def check(client: httpx.Client, path: str, body: bytes) -> None:
    """Asserts that the server answers, or refuses in one line of OpenAI's form."""
    answer = client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code < 500, (answer.text, body)
    assert "Traceback" not in answer.text, body
    if answer.status_code == 200:
        assert '"error"' not in answer.text[:10], body
        return
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}, body
    assert error["message"].isprintable(), body


def fuzz(client: httpx.Client, model: str, examples: int, *, repeats: bool = True) -> None:
    """So many bodies, the same ones every time if it `repeats`."""

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=repeats, suppress_health_check=[*HealthCheck]
    )
    @given(requests(model))
    def one(request: tuple[str, bytes]) -> None:
        check(client, *request)

    one()


def fuzz_for(url: str, model: str, seconds: float) -> int:
    """Other bodies every time, until the time is over; how many there were."""
    end, bodies = time.monotonic() + seconds, 0
    with httpx.Client(base_url=url, timeout=None) as client:
        while time.monotonic() < end:
            fuzz(client, model, 100, repeats=False)
            bodies += 100
    return bodies


def main() -> int:
    """Until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True, help="the name that the server gives it")
    parser.add_argument("--seconds", type=float, default=120)
    arguments = parser.parse_args()
    bodies = fuzz_for(arguments.url, arguments.model, arguments.seconds)
    sys.stdout.write(f"{bodies} bodies, each answered or refused\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
