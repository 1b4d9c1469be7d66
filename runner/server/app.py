"""The application: which path gives what, and who may ask."""

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tokenloop.runner.engine import Engine
from tokenloop.runner.server.body import HungUp, read_body
from tokenloop.runner.server.errors import ApiError
from tokenloop.runner.server.fields import ChatFields, CompletionFields, read_fields
from tokenloop.runner.server.generating import Generating, json_response
from tokenloop.runner.server.metrics import CONTENT_TYPE, Metrics

LOG = logging.getLogger(__name__)
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
PAGE = Path(__file__).with_name("page.html")
# Nothing but itself and this server, and in no frame of another page.
PAGE_HEADERS = {
    "content-type": "text/html; charset=utf-8",
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'",
}
# What a client has beyond the time of its request to read what was generated.
READING_SECONDS = 60
HUNG_UP = 499  # of nginx, for the log and the metrics: nobody receives it


@dataclass(frozen=True)
class Settings:
    """`name` is the model's. With an `api_key` everything but /health and the page asks for it. A
    request ends `timeout_s` after it came. `only_loopback` refuses what names another host than
    this machine, as a page does that a name server sends here. `log_prompts` puts prompts and
    outputs in the log."""

    name: str
    api_key: str | None = None
    timeout_s: float = 600.0
    only_loopback: bool = False
    log_prompts: bool = False


class Server:
    """Answers requests with what an engine generates; `app` is the ASGI application."""

    def __init__(self, engine: Engine, settings: Settings):
        self._engine, self._settings = engine, settings
        self._created = int(time.time())
        # After which a client that has not read its answer is given up.
        self.reading_s = settings.timeout_s + READING_SECONDS
        self.metrics = Metrics(engine)
        self._generating = Generating(
            engine, self.metrics, settings.name, settings.timeout_s, settings.log_prompts
        )
        paths = {
            "/v1/chat/completions": ("POST", self._chat),
            "/v1/completions": ("POST", self._complete),
            "/v1/models": ("GET", self._models),
            "/v1/models/{name:path}": ("GET", self._one_model),
            "/metrics": ("GET", self._metrics_text),
            "/health": ("GET", self._health),
            "/": ("GET", self._page),
        }
        routes = [
            Route(path, Endpoint(self, path, answer), methods=[method])
            for path, (method, answer) in paths.items()
        ]
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: http_error})

    def check_client(self, request: Request) -> None:
        """Errors: ApiError for one that may not ask."""
        key = self._settings.api_key
        if key is not None:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            # Headers are Latin-1 to Starlette.
            is_right = hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
            if scheme.lower() != "bearer" or not is_right:
                raise ApiError(
                    401, "the API key is missing or wrong: send Authorization: Bearer KEY",
                    code="invalid_api_key", headers={"www-authenticate": "Bearer"},
                )  # fmt: skip
        elif self._settings.only_loopback:
            host = request.headers.get("host", "")
            if host not in LOOPBACK and host.rpartition(":")[0] not in LOOPBACK:
                raise ApiError(
                    403, f"host is {host!r}; without an API key it must be localhost or 127.0.0.1"
                )

    async def _chat(self, request: Request) -> Response:
        fields = read_fields(ChatFields, await read_body(request))
        self._check_model(fields.model)
        return await self._generating.answer(request, fields)

    async def _complete(self, request: Request) -> Response:
        fields = read_fields(CompletionFields, await read_body(request))
        self._check_model(fields.model)
        return await self._generating.answer(request, fields)

    async def _models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._model()]})

    async def _one_model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return json_response(self._model())

    def _model(self) -> dict:
        chats, cache = self._generating.chats, self._engine.prefix_cache
        return {
            "id": self._settings.name, "object": "model", "created": self._created,
            "owned_by": "tokenloop", "max_model_len": self._engine.model.max_seq_len,
            "rows": self._engine.rows, "prefix_cache": cache is not None,
            "prefix_cache_tokens": cache and cache.size,
            "prefix_cache_fault": self._engine.cache_fault,
            "tool_calls": chats.calls and chats.calls.name,
            "reasoning": chats.reasoning and chats.reasoning.name,
        }  # fmt: skip

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._settings.name:
            raise ApiError(
                404, f"model is {name!r}; this server has {self._settings.name!r}", "model",
                "model_not_found",
            )  # fmt: skip

    async def _metrics_text(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def _page(self, request: Request) -> Response:
        return Response(PAGE.read_bytes(), headers=PAGE_HEADERS)

    async def _health(self, request: Request) -> Response:
        if self._engine.is_open:
            return json_response({"status": "ok"})
        return json_response({"status": "closing"}, 503)


class Endpoint:
    """What one path gives, with what is the same for all: who may ask, errors, counts and the log.

    An endpoint that is an object, and no function, is an ASGI application to Starlette.
    """

    def __init__(self, server: Server, path: str, answer: Callable[[Request], Awaitable[Response]]):
        self._server, self._path, self._answer = server, path, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, start = Request(scope, receive, send), time.perf_counter()
        is_open = self._path in ("/health", "/")
        try:
            if not is_open:
                self._server.check_client(request)
            response = await self._answer(request)
        except ApiError as error:
            response = refusal(error)
        except HungUp:
            response = Response(status_code=HUNG_UP)
        except Exception:
            LOG.exception("%s failed", self._path)
            response = refusal(ApiError(500, "the server failed; the reason is in its log"))
        status = response.status_code
        try:
            await asyncio.wait_for(response(scope, receive, send), self._server.reading_s)
        except (HungUp, asyncio.TimeoutError):
            status = HUNG_UP
        self._server.metrics.answers.labels(self._path, status).inc()
        if not is_open:
            seconds = time.perf_counter() - start
            LOG.info("%s %s: %d, %.3f s", request.method, self._path, status, seconds)


def refusal(error: ApiError) -> Response:
    return json_response(error.as_dict(), error.status, error.headers)


async def http_error(request: Request, error: Exception) -> Response:
    """What Starlette refuses: paths and methods that there are not."""
    assert isinstance(error, HTTPException)
    found = ApiError(error.status_code, error.detail, headers=dict(error.headers or {}))
    return refusal(found)
