"""The HTTP side: routes, keys, sizes, disconnections. Needs starlette, which the extra `web` brings."""

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from . import chat, completions
from .answers import Answer, Asked
from .errors import ApiError
from .fields import Fields
from .scheduler import Scheduler, Stream
from .served import Served

BODY_BYTES = 4 * 2**20  # of a request; a conversation that fits a model is far smaller
PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
# the page is three files of its own: nothing is loaded from elsewhere, nothing stands inline
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class Site:
    """What the server serves, and to whom: with a `key` only to requests that carry it."""

    served: Served
    scheduler: Scheduler
    key: str | None = None
    settings: Mapping[str, Any] | None = None  # what the page shows and begins with


class Sending(Response):
    """A response that streams and notices when its client goes, even while nothing is sent."""

    def __init__(self, events: AsyncIterator[str], stream: Stream) -> None:
        super().__init__(headers={"cache-control": "no-store"}, media_type="text/event-stream")
        self.events, self.stream = events, stream
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events, or cancel the stream."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with _watched(receive, self.stream):
            async for event in self.events:
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


@contextlib.asynccontextmanager
async def _watched(receive: Receive, stream: Stream) -> AsyncGenerator[None]:
    """Close the stream when the client goes, and at the end."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        stream.close()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        stream.close()


def build_app(site: Site) -> Starlette:
    """The application of one model; its scheduler starts and stops with it."""

    @contextlib.asynccontextmanager
    async def life(app: Starlette) -> AsyncGenerator[None]:
        site.scheduler.start()
        yield
        await asyncio.to_thread(site.scheduler.stop)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(site.served)]})

    async def model(request: Request) -> Response:
        _check_model(site.served, request.path_params["name"])
        return JSONResponse(_model(site.served))

    async def health(request: Request) -> Response:
        alive, scheduler = site.scheduler.alive, site.scheduler
        body = {"status": "ok" if alive else "unavailable", "running": scheduler.busy, "rows": scheduler.engine.rows}
        return JSONResponse(body, 200 if alive else 503)

    async def settings(request: Request) -> Response:
        return JSONResponse({"model": site.served.name, "key": site.key is not None, **(site.settings or {})})

    def answering(parse: Callable[[Fields, Served], Asked]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            return await _answer(site, request, parse)

        return answer

    def guarded(endpoint: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def checked(request: Request) -> Response:
            _check_key(site.key, request.headers.get("authorization", ""))
            return await endpoint(request)

        return checked

    routes = [
        *(Route(path, _file(*where)) for path, where in PAGE.items()),
        Route("/settings", settings),
        Route("/health", health),
        Route("/v1/models", guarded(models)),
        Route("/v1/models/{name:path}", guarded(model)),
        Route("/v1/chat/completions", guarded(answering(chat.parse)), methods=["POST"]),
        Route("/v1/completions", guarded(answering(completions.parse)), methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {ApiError: _api_error, HTTPException: _http_error, Exception: _own_error}
    return Starlette(routes=routes, lifespan=life, exception_handlers=handlers)


async def _answer(site: Site, request: Request, parse: Callable[[Fields, Served], Any]) -> Response:
    body = _json(request.headers.get("content-type", ""), await _body(request))
    fields = Fields(body)
    _check_model(site.served, fields.text("model"))
    asked = parse(fields, site.served)
    stream = site.scheduler.submit(asked.requests)
    answer = Answer(asked, stream)
    if asked.stream:
        return Sending(answer.events(), stream)
    async with _watched(request.receive, stream):
        return JSONResponse(await answer.whole())


async def _body(request: Request) -> bytes:
    """The body; ApiError 413 as soon as it is larger than BODY_BYTES."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > BODY_BYTES:
            raise ApiError(413, f"a request has at most {BODY_BYTES:,} bytes", code="request_too_large")
    return body


def _json(kind: str, body: bytes) -> Any:
    # a page of another site can send texts and forms unasked, but no JSON
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, f"content-type {kind or 'none'!r} is not served; send application/json")
    try:
        value = json.loads(body)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON that can be read ({str(error)[:100]})") from None
    return value


def _check_model(served: Served, name: str | None) -> None:
    if name is None:
        raise ApiError(400, "you must provide a model parameter", "model")
    if name != served.name:
        message = f"The model `{name[:80]}` does not exist; this server has `{served.name}`"
        raise ApiError(404, message, "model", "model_not_found")


def _check_key(key: str | None, given: str) -> None:
    if key is not None and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
        message = "Incorrect API key provided" if given else "You didn't provide an API key"
        raise ApiError(401, f"{message}; send it as `Authorization: Bearer KEY`", code="invalid_api_key")


def _model(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "nanochat_hf",
        "max_model_len": served.length,
    }


def _file(name: str, kind: str) -> Callable[[Request], Any]:
    """Serves a file that comes with the package."""

    async def file(request: Request) -> Response:
        content = resources.files("nanochat_hf.serving").joinpath(name).read_bytes()
        headers = {
            "content-security-policy": POLICY,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        }
        return Response(content, headers=headers, media_type=kind)

    return file


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}}.get(error.status)
    return JSONResponse(error.body, error.status, headers=headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {404: f"{request.url.path} is not served here", 405: f"{request.method} is not allowed here"}
    status = error.status_code
    return JSONResponse(ApiError(status, message.get(status, error.detail)).body, status, headers=error.headers)


async def _own_error(request: Request, error: Exception) -> Response:
    # starlette raises the error again, so the log has it
    return JSONResponse(ApiError(500, "the server failed; its log says why").body, 500)
