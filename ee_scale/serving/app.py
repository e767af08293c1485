"""The HTTP side: routes, who may ask, how large a request may be, and answers that end when their client leaves."""

import asyncio
import base64
import hashlib
import hmac
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ee_scale.serving.bodies import ChatBody, CompletionBody, error_of
from ee_scale.serving.call import Call, Piece
from ee_scale.serving.deferral import unless_left
from ee_scale.serving.engine import Engine
from ee_scale.serving.errors import ApiError
from ee_scale.serving.forms import event, form_of
from ee_scale.serving.metrics import Metrics
from ee_scale.serving.served import Served

OPEN_PATHS = ("/", "/health")  # without a key
LOCAL = ("127.0.0.1", "::1", "localhost")
LOCAL_NAME = re.compile(rb"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]+)?")
BODY_SECONDS = 30.0  # in which all of a body has to come
Settle = Callable[[list[Piece]], Coroutine[None, None, list[Piece]]]


def make_app(served: Served, engine: Engine, metrics: Metrics, api_key: str | None) -> FastAPI:
    """The application that uvicorn runs."""
    app = FastAPI(title="ee-scale serve", docs_url=None, redoc_url=None)
    alone = served.config.host in LOCAL and api_key is None
    app.add_middleware(Guard, api_key=api_key, most_bytes=served.config.max_body_bytes, local=alone)
    app.add_exception_handler(ApiError, _request_error)
    app.add_exception_handler(RequestValidationError, _not_valid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _failed)

    page, policy = read_page()

    @app.get("/")
    async def page_text() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.get("/health")
    async def health() -> JSONResponse:
        engine.check_open()
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics_text() -> PlainTextResponse:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [served.card()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        if name != served.name:
            raise ApiError(404, f"model={name!r}: this server has {served.name!r}", "model", "model_not_found")
        return JSONResponse(served.card())

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await _answer(served, engine, body, request)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        return await _answer(served, engine, body, request)

    return app


def read_page() -> tuple[str, str]:
    """The page at `/`, and what a browser may do for it: run its own script, and ask this server."""
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'"
    return text, f"default-src 'none'; {allowed}; frame-ancestors 'none'; form-action 'none'; base-uri 'none'"


async def _answer(served: Served, engine: Engine, body: CompletionBody | ChatBody, request: Request) -> Response:
    engine.check_open()
    if (deferral := served.deferral) is not None:
        deferral.check(body)
    call = await asyncio.to_thread(served.call, body)
    call.listen()
    engine.submit(call)
    form = form_of(body, call, served.tokenizer)
    settle = None if deferral is None else partial(deferral.settle, body, call, form)
    stream = _pieces(engine, call, request, settle)
    if not body.stream:
        async with aclosing(stream):
            return JSONResponse(form.whole([piece async for piece in stream]))
    first = await anext(stream)  # what is wrong before it still has a status of its own

    async def events() -> AsyncIterator[str]:
        async with aclosing(stream):
            yield form.chunk(first)
            try:
                async for piece in stream:
                    yield form.chunk(piece)
            except ApiError as error:
                yield event(dict(error.body()))
            else:
                yield form.last()

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


async def _pieces(engine: Engine, call: Call, request: Request, settle: Settle | None = None) -> AsyncGenerator[Piece]:
    """All pieces of a call; when the client leaves, or whoever reads them stops, its rows are freed.

    settle: gets them when all are there, and says which are given.
    """

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        call.tell(None)

    gone, left, held = asyncio.create_task(watch()), len(call.rows), []
    try:
        while left:
            news = await call.hear()
            if news is None:
                raise ApiError(499, "the client has left")
            for piece in news:
                left -= piece.finish is not None
                if settle is None:
                    yield piece
                else:
                    held.append(piece)
        if settle is not None:
            for piece in await unless_left(call, settle(held)):
                yield piece
    finally:
        gone.cancel()
        engine.leave(call)


class Guard:
    """Before anything of a body is read: the key; while it is read: its size, and how long that takes.

    local: requests must name this machine as their host, so that no page elsewhere reaches it by a name of its own.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, most_bytes: int, *, local: bool = False):
        self.app, self.api_key, self.most_bytes, self.local = app, api_key, most_bytes, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if (error := self._error(scope["path"], headers)) is not None:
            await _json(error)(scope, receive, send)
            return
        await self.app(scope, self._limited(receive), send)

    def _error(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        if self.local and not LOCAL_NAME.fullmatch(headers.get(b"host", b"")):
            return ApiError(403, "this server answers requests to 127.0.0.1 and localhost; set host or api_key")
        if self.api_key is not None and path not in OPEN_PATHS:
            given, wanted = headers.get(b"authorization", b""), b"Bearer " + self.api_key.encode()
            if not hmac.compare_digest(given, wanted):
                return ApiError(401, "give the server's key: Authorization: Bearer <key>", code="invalid_api_key")
        size = headers.get(b"content-length", b"0")
        return self._too_large() if size.isdigit() and int(size[:20]) > self.most_bytes else None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self.most_bytes} bytes", code="body_too_large")

    def _limited(self, receive: Receive) -> Receive:
        seen, whole = 0, False

        async def limited() -> Message:
            nonlocal seen, whole
            if whole:
                return await receive()
            message = await _in_time(receive())
            seen += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if seen > self.most_bytes:
                raise HTTPException(413, str(self._too_large()))
            return message

        return limited


async def _in_time(message: Awaitable[Message]) -> Message:
    with suppress(TimeoutError):
        async with asyncio.timeout(BODY_SECONDS):
            return await message
    raise HTTPException(408, f"the body did not come within {BODY_SECONDS:g} seconds")


def _json(error: ApiError) -> JSONResponse:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.body(), error.status, headers)


async def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _json(error)


async def _not_valid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _json(error_of(error.errors()))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: f"{request.url.path}: no such address", 405: f"{request.method} is not for {request.url.path}"}
    if error.status_code == 400:
        return _json(ApiError(400, "the body is no JSON in UTF-8"))
    return _json(ApiError(error.status_code, words.get(error.status_code, str(error.detail))))


async def _failed(request: Request, error: Exception) -> Response:
    return _json(ApiError(500, "the server failed on this request; its log says how"))
