"""Which answers of the small model stand, and what is asked of the upstream: the rule of `ee-scale defer` at work.

Without the upstream, or without leave to ask it, the small model's answer is given, and says so.
"""

import asyncio
import os
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from math import isfinite
from pathlib import Path
from random import SystemRandom
from typing import TypeVar

from transformers import PreTrainedModel

from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.config.serve import ServeConfig
from ee_scale.errors import UserError, one_line
from ee_scale.inference.deferral import DeferralRule, plain, read_rule, type_name
from ee_scale.log import log
from ee_scale.modeling.decision_log import DecisionLog
from ee_scale.serving.bodies import ChatBody, CompletionBody
from ee_scale.serving.call import Call, Piece
from ee_scale.serving.errors import ApiError
from ee_scale.serving.forms import Form, Json
from ee_scale.serving.metrics import DeferralMetrics, Metrics
from ee_scale.serving.upstream import KEY, Told, Upstream, UpstreamError, check_url, request_for

NOT_ASKED, ANSWERED, UNAVAILABLE, WITHHELD = "not_asked", "answered", "unavailable", "withheld"
HOOKS = 4  # calls of the operator's hook at the same time
Messages = list[dict[str, str]]
Redact = Callable[[Messages], Messages]
T = TypeVar("T")


class WithheldError(Exception):
    """The operator's hook let nothing leave."""


@dataclass(frozen=True)
class Asked:
    """What came of asking: the answer, if there is one, what the upstream did, why, and in how many seconds."""

    told: Told | None
    word: str
    reason: str | None
    seconds: float


class Deferral:
    """Settles answers of a server's small model. Its methods run in the event loop.

    Attributes:
        audits: background tasks.
    """

    def __init__(self, config: ServeConfig, rule: DeferralRule, upstream: Upstream, redact: Redact | None):
        self.config, self.rule, self.upstream, self.redact = config.defer, rule, upstream, redact
        self.hooks = ThreadPoolExecutor(HOOKS, "redaction")
        self.random = SystemRandom()
        self.audits: set[asyncio.Task[None]] = set()

    @classmethod
    def find(cls, config: ServeConfig, folder: ModelFolder) -> "Deferral | None":
        """What the settings ask for; None: nothing. Raises `UserError`."""
        given = {"deferral": config.deferral, "upstream": config.upstream, "upstream_model": config.upstream_model}
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == len(given):
            for name in ("audit", "redact", "log_text"):
                if value := getattr(config.defer, name):
                    raise UserError(f"defer.{name}={value}: goes with deferral, upstream and upstream_model")
            return None
        if missing:
            raise UserError(f"{missing[0]}: give all of deferral, upstream and upstream_model, or none")
        assert config.deferral is not None
        assert config.upstream is not None
        assert config.upstream_model is not None
        check_url(config.upstream)
        rule, here = read_rule(Path(config.deferral).expanduser()), f"deferral={config.deferral}"
        if rule.task != "generate":
            raise UserError(f"{here}: a rule of task={rule.task}; this server generates text")
        rule.check_model(folder, here)
        redact = None if config.defer.redact is None else _hook(config.defer.redact)
        most = config.rows + config.max_waiting
        upstream = Upstream(config.upstream, config.upstream_model, os.environ.get(KEY), most)
        return cls(config, rule, upstream, redact)

    def check_dtype(self, model: PreTrainedModel) -> None:
        """Raise `UserError` unless the model computes in the number type that the rule's scores are of."""
        own, made = type_name(model), self.rule.evidence.get("dtype", type_name(model))
        if own != made:
            raise UserError(f"dtype: the deferral rule was made in {made}, this server computes in {own}; set dtype")

    def open(self, metrics: Metrics, decisions: DecisionLog | None) -> None:
        """Begin to count and to log, and say what leaves the machine."""
        self.metrics, self.decisions = DeferralMetrics(metrics), decisions
        limit = "every prompt" if self.rule.limit is None else f"prompts whose answer scores below {self.rule.limit:g}"
        limit += ", or below the limit of their tag" if self.rule.tags else ""
        others = f", a share of {self.config.audit:g} of the others for audit" if self.config.audit else ""
        hook = f" as {self.config.redact} returns them" if self.redact else ""
        log.info(
            f"{limit} ({self.rule.score}){others} go{hook} to {self.upstream.url} ({self.upstream.model}), with their "
            "sampling settings and stop texts; nothing else leaves this machine"
        )

    def card(self) -> Json:
        """As /v1/models tells of it."""
        rule = self.rule
        promised = {"loss": rule.loss, "confidence": rule.confidence}
        return {"upstream_model": self.upstream.model, "score": rule.score, "limit": rule.limit, **promised}

    def check(self, body: CompletionBody | ChatBody) -> None:
        """Raise `ApiError` for what two models cannot answer alike."""
        here = "this server may let another model answer"
        if body.n > 1:
            raise ApiError(400, f"n={body.n}: {here}, and asks it for one answer; leave n out", "n")
        if body.ranked is not None:
            raise ApiError(400, f"logprobs: {here}, whose tokens are others; leave it out", "logprobs")
        if isinstance(body, CompletionBody) and (len(body.prompts) > 1 or not isinstance(body.prompts[0], str)):
            raise ApiError(400, f"prompt: {here}; give one text, and no token ids", "prompt")

    async def settle(self, body: CompletionBody | ChatBody, call: Call, form: Form, pieces: list[Piece]) -> list[Piece]:
        """The pieces of the answer that is given: those of the small model, or the upstream's one. Marks `form`."""
        (row,), tag = call.rows, body.exit_tag
        text, score = "".join(piece.text for piece in pieces), row.score if isfinite(row.score) else None
        room, messages = row.queued.settings["max_new_tokens"], _messages(body)
        facts: Json = {"request": form.head["id"], "tag": tag, "score": score, "limit": self.rule.limit_of(tag)}
        texts: Json = {"prompt": messages, "text": text} if self.config.log_text else {}
        kept = self.rule.keeps(row.score, tag)
        asked = Asked(None, NOT_ASKED, None, 0.0)
        if not kept:
            asked = await self._ask(body, room, messages, call.deadline - time.monotonic())
        told = asked.told
        form.head |= {"deferred": told is not None, "score": score, "upstream": asked.word}
        self.metrics.decided(asked.word, below=not kept)
        self._note(facts, texts, asked)
        if told is not None:
            form.hand_over(self.upstream.model, told.usage)
            return [Piece(row.index, told.text, finish=told.finish)]
        if kept and body.temperature == 0 and self.random.random() < self.config.audit:
            audit = asyncio.create_task(self._audit(body, room, messages, text, facts, texts))
            self.audits.add(audit)
            audit.add_done_callback(self.audits.discard)
        return pieces

    async def _audit(
        self, body: CompletionBody | ChatBody, room: int, messages: Messages, text: str, facts: Json, texts: Json
    ) -> None:
        asked = await self._ask(body, room, messages, self.config.seconds)
        agrees = None if asked.told is None else plain(text) == plain(asked.told.text)
        if agrees is not None:
            self.metrics.compared(agrees)
        self._note(facts | {"audit": True, "agrees": agrees}, texts, asked)

    async def _ask(self, body: CompletionBody | ChatBody, room: int, messages: Messages, left: float) -> Asked:
        """Never longer than the time that is set, and left; what goes wrong is counted, and said in the log."""
        began, word, reason = time.monotonic(), UNAVAILABLE, None
        seconds = max(0.0, min(self.config.seconds, left))
        try:
            async with asyncio.timeout(seconds):
                messages = await self._leaving(messages, one=not isinstance(body, ChatBody))
            values = request_for(body, self.upstream.model, room, messages)
            path = "/chat/completions" if isinstance(body, ChatBody) else "/completions"
            told = await self.upstream.ask(path, values, max(0.0, began + seconds - time.monotonic()))
        except (WithheldError, TimeoutError) as error:  # the time was over in the hook
            word, reason = WITHHELD, "redact"
            log.warning(f"defer.redact={self.config.redact}: {error or 'not done in time'}; nothing left this machine")
        except UpstreamError as error:
            reason = error.reason
            if reason != "back_off":
                log.warning(f"upstream={self.upstream.url}: {one_line(error)}; the small model's answer is given")
        else:
            took = time.monotonic() - began
            self.metrics.answered(took)
            return Asked(told, ANSWERED, None, took)
        self.metrics.failed(reason)
        return Asked(None, word, reason, time.monotonic() - began)

    async def _leaving(self, messages: Messages, *, one: bool) -> Messages:
        """What the hook lets leave; `one`: a single message, of the text of a prompt. Raises `WithheldError`."""
        if self.redact is None:
            return messages
        copies = [dict(message) for message in messages]
        try:
            found = await asyncio.get_running_loop().run_in_executor(self.hooks, self.redact, copies)
        except Exception as error:  # without its words, which may hold the prompt
            raise WithheldError(f"{type(error).__name__}") from error
        if not _are_messages(found) or (one and (len(found) != 1 or not found[0]["content"])):
            raise WithheldError("gave no list of messages" if not one else "gave no list of one message with a text")
        return found

    def _note(self, facts: Json, texts: Json, asked: Asked) -> None:
        if self.decisions is None:
            return
        if texts and asked.told is not None:
            texts = texts | {"upstream_text": asked.told.text}
        outcome: Json = {"upstream": asked.word, "reason": asked.reason, "seconds": round(asked.seconds, 3)}
        deferred = asked.told is not None and "audit" not in facts
        self.decisions.note(facts | {"deferred": deferred} | outcome | texts)


async def unless_left(call: Call, work: Coroutine[None, None, T]) -> T:
    """What comes of the work; ended, with an `ApiError`, when the call's client leaves."""
    task, heard = asyncio.create_task(work), asyncio.create_task(call.hear())
    try:
        await asyncio.wait({task, heard}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has left")
        return task.result()
    finally:
        task.cancel()
        heard.cancel()


def _hook(name: str) -> Redact:
    """The function that the operator names. Raises `UserError`."""
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function)
    except Exception as error:  # whatever its module does
        raise UserError(f"defer.redact={name}: {one_line(error)}; give package.module:function") from error
    if not callable(found):
        raise UserError(f"defer.redact={name}: no function")
    return found  # type: ignore[no-any-return]


def _messages(body: CompletionBody | ChatBody) -> Messages:
    """Of a prompt, one of its user's."""
    if isinstance(body, ChatBody):
        return body.turns
    return [{"role": "user", "content": str(body.prompts[0])}]


def _are_messages(value: object) -> bool:
    """Whether messages have the fields of requests, all of them text."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict)
            and {"role", "content"} <= message.keys() <= {"role", "content", "name"}
            and all(isinstance(text, str) for text in message.values())
            for message in value
        )
    )
