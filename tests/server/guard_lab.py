"""Routes of every kind behind the guard."""

from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from edgeroute.runtime.errors import UsageError
from edgeroute.server.errors import ApiError
from edgeroute.server.records import ServerParams
from tests.server.asgi import Ask, Header, Reply, answer, guarded

PLAIN = ServerParams()
KEYED = ServerParams(api_keys=("first-key", "second-key-é"))
SHARED = ServerParams(cors_origins=("https://app.example",))


async def models(request: Request) -> Response:
    return JSONResponse({"id": request.state.request_id, "has_key": request.state.has_key})


async def page(request: Request) -> Response:
    return HTMLResponse("<!doctype html>")


async def breaks(request: Request) -> Response:
    raise RuntimeError("the secret of the house")


async def wrong(request: Request) -> Response:
    raise UsageError("max_tokens must be 1 or more, got 0")


async def refuses(request: Request) -> Response:
    raise ApiError(429, "too many wait", retry_after_s=3)


def _stream(kind: str) -> Route:
    async def give() -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"
        raise RuntimeError("in the middle")

    async def answer(request: Request) -> Response:
        return StreamingResponse(give(), media_type=kind)

    return Route("/" + kind, answer)


ROUTES = [
    Route("/", page), Route("/v1/models", models, methods=["GET", "POST"]),
    Route("/breaks", breaks), Route("/wrong", wrong), Route("/refuses", refuses),
    Route("/health/live", models), Route("/static/app.js", models),
    _stream("text/event-stream"), _stream("text/plain"),
]  # fmt: skip


def app(params: ServerParams = PLAIN) -> ASGIApp:
    return guarded(params, *ROUTES)


def ask(*headers: Header, params: ServerParams = PLAIN, path: str = "/v1/models") -> Reply:
    return answer(app(params), Ask(path=path, headers=headers))
