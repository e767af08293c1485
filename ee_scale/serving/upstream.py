"""The server that is asked where the small model is unsure: one address of the operator's, bounded in time and size.

What it says is data. Nothing it says is followed: no redirect, no address, no code.
"""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_address

import httpx

from ee_scale.errors import UserError
from ee_scale.log import log
from ee_scale.reading import parse_json
from ee_scale.serving.bodies import ChatBody, CompletionBody
from ee_scale.serving.forms import Json

KEY = "EE_SCALE_UPSTREAM_KEY"
MOST_BYTES = 4 << 20  # of an answer
FINISHES = ("stop", "length", "content_filter")
SHORTEST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds without a try, after a failure
OWN_FAULT = (400, 413, 422)  # of one request: the next one may fare better
MOST_TOKENS = 1 << 31


class UpstreamError(Exception):
    """No answer came from upstream.

    Attributes:
        reason: one word, for /metrics and the log.
        lasting: whether the next request would meet the same.
    """

    def __init__(self, reason: str, words: str, *, lasting: bool = True):
        super().__init__(words)
        self.reason, self.lasting = reason, lasting


@dataclass(frozen=True)
class Told:
    """What came from upstream: the text, why it ends there, and the usage it tells, if it does."""

    text: str
    finish: str
    usage: Json | None


@dataclass
class BackOff:
    """When a server that has failed is tried again: after 1 second, then after twice as long each time, at most 60."""

    clock: Callable[[], float] = time.monotonic
    wait: float = 0.0
    failed_at: float = field(default=float("-inf"))
    until: float = field(default=float("-inf"))

    def may_try(self) -> bool:
        """Whether to ask now. While it is tried, others do not wait for what comes of it."""
        now = self.clock()
        if now < self.until:
            return False
        if self.wait:
            self.until = now + self.wait
        return True

    def failed(self, began: float) -> None:
        """A request that began then has failed; those that were under way at an earlier failure count as one."""
        if began < self.failed_at:
            return
        self.failed_at = self.clock()
        self.wait = min(LONGEST_WAIT, max(SHORTEST_WAIT, 2 * self.wait))
        self.until = self.failed_at + self.wait

    def worked(self) -> None:
        """It answers."""
        self.wait, self.until = 0.0, float("-inf")


class Upstream:
    """Asks one model of one server, `most` requests at a time."""

    def __init__(
        self, url: str, model: str, key: str | None, most: int, transport: httpx.AsyncBaseTransport | None = None
    ):
        """url: checked (`check_url`); key: bearer token; transport: another way than the network."""
        self.url, self.model, self.most, self.under_way = url.rstrip("/"), model, most, 0
        self.back_off = BackOff()
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json", "User-Agent": "ee-scale"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        # Nothing of the environment: no proxy sees the prompts, and no .netrc adds a password.
        self.client = httpx.AsyncClient(
            headers=headers, timeout=None, follow_redirects=False, trust_env=False, transport=transport
        )

    async def ask(self, path: str, values: Json, seconds: float) -> Told:
        """Raises `UpstreamError`."""
        if self.under_way >= self.most:
            raise UpstreamError("busy", f"{self.under_way} requests to it are under way", lasting=False)
        if not self.back_off.may_try():
            raise UpstreamError("back_off", "it has failed, and is not tried again yet", lasting=False)
        began = self.back_off.clock()
        self.under_way += 1
        try:
            async with asyncio.timeout(seconds):
                told = _told(await self._body(path, values))
        except UpstreamError as error:
            if error.lasting:
                self.back_off.failed(began)
            raise
        except TimeoutError as error:
            self.back_off.failed(began)
            raise UpstreamError("timeout", f"no answer within {seconds:.3g} seconds") from error
        except Exception as error:  # of the network, or what a library makes of whatever comes
            self.back_off.failed(began)
            raise UpstreamError("connection", f"no answer ({type(error).__name__})") from error
        finally:
            self.under_way -= 1
        self.back_off.worked()
        return told

    async def _body(self, path: str, values: Json) -> bytes:
        content, body = json.dumps(values).encode(), bytearray()
        async with self.client.stream("POST", f"{self.url}{path}", content=content) as response:
            status = response.status_code
            if status != 200:
                # Not what it says of it: that may hold the prompt.
                raise UpstreamError(f"status_{status // 100}xx", f"status {status}", lasting=status not in OWN_FAULT)
            if response.headers.get("content-encoding", "identity") != "identity":
                raise UpstreamError("invalid", "a compressed answer, which nobody asked for")
            async for part in response.aiter_raw():
                body += part
                if len(body) > MOST_BYTES:
                    raise UpstreamError("too_large", f"an answer of more than {MOST_BYTES} bytes")
        return bytes(body)


def check_url(url: str) -> None:
    """Raise `UserError` for what is no address of a server; warn of one that whoever is on the way can read."""
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UserError(f"upstream={url}: no address ({error})") from error
    if parts.userinfo:
        raise UserError(f"upstream: a password in an address is seen by many; leave it out and set {KEY}")
    if parts.scheme not in ("http", "https") or not parts.host or parts.query or parts.fragment:
        raise UserError(f"upstream={url}: give http(s)://host:port/v1, without '?' and '#'")
    if parts.scheme == "http" and not _is_here(parts.host):
        log.warning(f"upstream={url}: prompts and the key go over the network unencrypted; https hides them")


def request_for(body: CompletionBody | ChatBody, model: str, room: int, messages: list[dict[str, str]]) -> Json:
    """The JSON for the endpoint that a request came to: these messages (or this one's text) and its sampling settings.

    room: tokens of an answer at most.
    """
    chat = isinstance(body, ChatBody)
    prompt: Json = {"messages": messages} if chat else {"prompt": messages[0]["content"]}
    newer = isinstance(body, ChatBody) and body.max_completion_tokens is not None
    values = {"model": model, **prompt, "temperature": body.temperature}
    values["max_completion_tokens" if newer else "max_tokens"] = room
    asked = {"top_p": body.top_p, "top_k": body.top_k, "seed": body.seed, "stop": body.stops or None}
    return values | {name: value for name, value in asked.items() if value is not None}


def _is_here(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _told(body: bytes) -> Told:
    """Of an answer in OpenAI's form, chat or not. Raises `UpstreamError` for any other."""
    try:
        value = parse_json(body.decode())
        (choice,) = value["choices"]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        finish, usage = choice["finish_reason"], value.get("usage")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UpstreamError("invalid", f"no answer in OpenAI's form ({type(error).__name__})") from error
    if not isinstance(text, str) or finish not in FINISHES:
        raise UpstreamError("invalid", "no answer in OpenAI's form (its text, or why it ends)")
    return Told(text.encode("utf-8", "replace").decode(), finish, _usage(usage))


def _usage(value: object) -> Json | None:
    """Numbers of tokens; None where they are none."""
    counts: dict[str, int] = {}
    for name in ("prompt_tokens", "completion_tokens"):
        count = value.get(name) if isinstance(value, dict) else None
        if type(count) is not int or not 0 <= count < MOST_TOKENS:
            return None
        counts[name] = count
    return {**counts, "total_tokens": sum(counts.values())}
