"""What stands before every route: limits, who may ask, and what happens when a route fails.

Plain ASGI: answers pass piece by piece, as they come.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgeroute.runtime.errors import EdgerouteError, UsageError
from edgeroute.server.errors import ApiError, as_api_error
from edgeroute.server.guard_body import BodyGuard, Patience, refuse
from edgeroute.server.guard_head import (
    Head,
    HostCheck,
    KeyCheck,
    OriginCheck,
    check_shape,
    cors_headers,
    preflight,
)
from edgeroute.server.logs import REQUEST_ID, log, log_failure
from edgeroute.server.records import ServerParams, new_request_id

Told = Callable[[int, float], None]
"""Is told the status and the seconds of every answer, refusals included."""

Headers = list[tuple[bytes, bytes]]
ALWAYS: Final[Headers] = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
PAGE_POLICY: Final = (
    b"default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    b"object-src 'none'"
)
DATA_POLICY: Final = b"default-src 'none'; frame-ancestors 'none'"
LAST_WORD_S: Final = 2.0
"""How long the end of a stream that failed may take to be sent."""
CORS: Final = "cors_headers"
"""Where in a request's state stands what lets another origin read its answer."""
QUIET: Final = ("/health/live", "/health/ready", "/metrics")
"""Paths that are asked every few seconds; their success is logged for debugging only."""


def guards(
    params: ServerParams, told: Told | None = None, patience: Patience | None = None
) -> list[Middleware]:
    """Return what every request passes, outermost first.

    Args:
        params: limits, keys, hosts and origins.
        told: hears of every answer, for metrics.
        patience: how slowly a body may come.

    Raises:
        UsageError: every origin is allowed although there are keys, which any page that learns
            one could then use.
    """
    if "*" in params.cors_origins and params.api_keys:
        raise UsageError("cors_origins has * although there are API keys; name the origins")
    return [
        Middleware(Outermost, told),
        Middleware(HeadGuard, params),
        Middleware(BodyGuard, params, patience or Patience()),
    ]


class Outermost:
    """Gives every request an id, every answer its headers, and every failure an answer.

    Sets `scope["state"]["request_id"]`.
    """

    def __init__(self, app: ASGIApp, told: Told | None = None) -> None:
        self._app, self._told = app, told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":  # none is served; this refuses the handshake
                await send({"type": "websocket.close", "code": 1000})
                return
            await self._app(scope, receive, send)
            return
        request_id = Head(scope).request_id or new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id
        token = REQUEST_ID.set(request_id)
        answer = _Answer(send, scope["state"])
        try:
            await self._serve(scope, receive, answer)
        finally:
            REQUEST_ID.reset(token)

    async def _serve(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        started, unfinished = time.monotonic(), 499
        try:
            await self._app(scope, receive, answer)
        except Exception as error:  # whatever it is, only this request may suffer
            unfinished = await _fail(_first(error), scope, answer)
        finally:
            seconds = time.monotonic() - started
            status = answer.status if answer.ended else unfinished
            if self._told is not None:
                self._told(status, seconds)
            quiet = status < 400 and scope["path"] in QUIET
            log(
                logging.DEBUG if quiet else logging.INFO, "request", method=scope["method"][:16],
                path=scope["path"], status=status, seconds=round(seconds, 6),
            )  # fmt: skip


def _first(error: Exception) -> Exception:
    """Return what a failure began with: a refusal in mid-answer comes wrapped by starlette."""
    return error.__cause__ if isinstance(error.__cause__, ApiError) else error


async def _fail(error: Exception, scope: Scope, answer: "_Answer") -> int:
    """Tell of a failure, in the log and, as far as that is still possible, to the client.

    Returns:
        The status that says what happened, whether or not the client can still be told.
    """
    told = as_api_error(error)
    if told.status == 499:  # nobody is there to be told, or to read it
        log(logging.DEBUG, "a client left", why=told.message)
        return told.status
    if told.status >= 500 and not isinstance(error, EdgerouteError | ApiError):
        log_failure("a request failed", error)
    else:
        log(logging.WARNING, "a request failed", error=type(error).__name__, why=str(error))
    if not answer.status:
        await refuse(told, scope, None, answer)
    elif answer.kind.startswith(b"text/event-stream") and not answer.ended:
        line = b"data: " + bytes(told.response().body) + b"\n\n"
        with contextlib.suppress(TimeoutError):  # where the client does not read either
            async with asyncio.timeout(LAST_WORD_S):
                await answer({"type": "http.response.body", "body": line, "more_body": False})
    # Any other answer is left unfinished: the connection ends, and its client sees that.
    return told.status


class _Answer:
    """What a request's answer is sent through: adds headers, and knows how far it has come."""

    def __init__(self, send: Send, state: Mapping[str, Any]) -> None:
        self._send, self._state = send, state
        self.status = 0
        self.kind = b""
        self.ended = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": self._with(list(message.get("headers", [])))}
        await self._send(message)
        if message["type"] == "http.response.body":
            self.ended = not message.get("more_body", False)

    def _with(self, headers: Headers) -> Headers:
        have = {name.lower(): value for name, value in headers}
        self.kind = have.get(b"content-type", b"")
        page = self.kind.startswith(b"text/html")
        wanted = [
            *ALWAYS, (b"content-security-policy", PAGE_POLICY if page else DATA_POLICY),
            (b"cache-control", b"no-store"),
            (b"x-request-id", self._state["request_id"].encode()), *self._state.get(CORS, ()),
        ]  # fmt: skip
        return headers + [(name, value) for name, value in wanted if name not in have]


class HeadGuard:
    """Refuses requests by their head, and answers what browsers ask before another origin's.

    Sets `scope["state"]["has_key"]`: whether the request has shown one of the keys; and what
    lets another origin read the answer, whichever it will be: `Outermost` sends it.
    """

    def __init__(self, app: ASGIApp, params: ServerParams) -> None:
        self._app, self._params = app, params
        self._host, self._origin = HostCheck(params), OriginCheck(params)
        self._key = KeyCheck(params)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        head, state = Head(scope), scope.setdefault("state", {})
        try:
            reader = self._origin(head, self._host(head))
            if reader is not None:
                state[CORS] = cors_headers(reader)
            check_shape(head, self._params)
            asked = None if reader is None else preflight(head)
            if asked is not None:
                answer = Response(status_code=204)
                answer.raw_headers.extend(asked)
                await answer(scope, receive, send)
                return
            state["has_key"] = await self._key(head)
        except ApiError as error:
            await refuse(error, scope, receive, send)
            return
        await self._app(scope, receive, send)


__all__ = ["Patience", "guards"]
