"""Inputs that nobody wrote on purpose, for property tests of everything that reads outside files.

`settings` keep a test short and the same on every machine (no database, no clock, no randomness). To hunt for longer,
with other examples each time: `HYPOTHESIS_PROFILE=hunt HUNT_EXAMPLES=5000 pytest tests/unit/test_properties_*.py`.
A fault that is found stays in its test as an `@example`.
"""

import copy
import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from ee_scale.errors import UserError

HUNTING = os.environ.get("HYPOTHESIS_PROFILE") == "hunt"
DEEP = 100_000
LONGEST_LINE = 2000
T = TypeVar("T")


def examples(count: int) -> settings:
    """How many examples a test takes in CI; many times more in a hunt, where what fails is made small too."""
    common = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
    if HUNTING:
        return settings(max_examples=int(os.environ.get("HUNT_EXAMPLES", "2000")), **common)
    return settings(max_examples=count, derandomize=True, phases=[Phase.explicit, Phase.generate], **common)


# Values that break code which believes what it reads.
ODD = (
    *(None, True, False, 0, 1, -1, 2, 10**12, -(10**12), 2**63, 10**400, 10**4000, 0.5, -0.0, 1e308, 5e-324),
    *(float("nan"), float("inf"), float("-inf")),
    *("", " ", "0", "1", "x", "\x00", "a\nb", "../..", "/", "\ud800", "é", "x" * 600, "[/red]", "${x}"),
    *([], {}, [[]], [None], ["x"], [1, 2], {"": 0}, {"x": {"x": {}}}, {"\ud800": "\udfff"}),
)
scalars = st.one_of(
    st.sampled_from(ODD),
    st.integers(),
    st.floats(),
    st.text(st.characters(exclude_categories=()), max_size=8),
)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every node of a document."""
    yield path
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield from places(value, (*path, key))


def replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at one place."""
    if not path:
        return value
    changed = copy.deepcopy(document)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


@st.composite
def mutated(draw: Callable[..., Any], document: Any) -> Any:
    """A document with one or two nodes replaced, left out, doubled or added."""
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(list(places(document))))
        kind = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add", "borrow")))
        if kind == "borrow":  # what is right elsewhere
            other = draw(st.sampled_from(list(places(document))))
            value = document
            for key in other:
                value = value[key]
            document = replaced(document, path, copy.deepcopy(value))
        elif kind == "remove" and path:
            document = copy.deepcopy(document)
            inner = document
            for key in path[:-1]:
                inner = inner[key]
            del inner[path[-1]]
        elif kind == "add":
            inner = copy.deepcopy(document)
            target = inner
            for key in path:
                target = target[key]
            if isinstance(target, dict):
                target[draw(st.text(max_size=4))] = draw(json_values)
            elif isinstance(target, list):
                target.append(draw(json_values))
            document = inner
        else:
            document = replaced(document, path, draw(json_values))
    return document


@st.composite
def damaged(draw: Callable[..., Any], content: bytes) -> bytes:
    """Bytes that were cut off, flipped, doubled, or have others put between them."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(("cut", "flip", "insert", "overwrite", "drop", "double")))
        if kind == "cut":
            content = content[:at]
        elif kind == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]
        elif kind == "insert":
            content = content[:at] + draw(st.binary(min_size=1, max_size=8)) + content[at:]
        elif kind == "overwrite":
            new = draw(
                st.sampled_from((b"\x00" * 8, b"\xff" * 8, b"\xff\xff\xff\x7f", b"9" * 20)) | st.binary(max_size=8)
            )
            content = content[:at] + new + content[at + len(new) :]
        elif kind == "drop":
            content = content[:at] + content[at + draw(st.integers(1, 64)) :]
        else:
            content = content[:at] + content[max(0, at - 64) : at] + content[at:]
    return content


# Whole files that are no JSON document of ours, or JSON at its edges.
HOSTILE_JSON = (
    b"",
    b"\x00",
    b"\xff\xfe{\x00}\x00",
    b"\xef\xbb\xbf{}",
    b"{",
    b"{}{}",
    b"null",
    b"[]",
    b"0",
    b'"x"',
    b"NaN",
    b"[" * DEEP,
    b'{"a":' * DEEP,
    b"[" * DEEP + b"]" * DEEP,
    b"9" * 10_000,
    b'{"a": ' + b"9" * 10_000 + b"}",
    b'{"a": 1e999999}',
    b'{"\\ud800": "\\udfff"}',
    b'{"a": "\xff"}',
    b'{"a": 1, "a": [2]}',
)
hostile_json = st.sampled_from(HOSTILE_JSON)


def as_json(value: Any) -> bytes:
    """JSON text of any value, lone surrogates escaped and numbers that are none as Python writes them."""
    return json.dumps(value).encode()


def json_files(document: Any) -> st.SearchStrategy[bytes]:
    """Contents for a file in which `document` should lie."""
    return st.one_of(mutated(document).map(as_json), damaged(as_json(document)), hostile_json, json_values.map(as_json))


def nearly(document: Any) -> st.SearchStrategy[Any]:
    """A document, itself or with changes."""
    return mutated(document)


def refused(read: Callable[[], T], *, megabytes: float | None = None) -> T | None:
    """What `read` gives; None if it refuses with one line. Anything else is raised.

    `megabytes`: the most that Python's allocators may hold on the way.
    """
    if megabytes is not None:
        tracemalloc.start()
    try:
        return read()
    except UserError as error:
        line = str(error)
        assert line
        assert "\n" not in line.strip("\n"), line[:300]
        assert len(line) < LONGEST_LINE, f"{len(line)} characters: {line[:300]}"
        return None
    finally:
        if megabytes is not None:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < megabytes * 1e6, f"{peak / 1e6:.1f} MB"
