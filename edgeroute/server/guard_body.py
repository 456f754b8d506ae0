"""What a request's body must be: JSON, not too long, not too deep, and it must arrive.

The whole body is read here, under limits, and handed on in one piece. Answers are not touched.
"""

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import Final

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgeroute.server.errors import ApiError
from edgeroute.server.guard_head import Head
from edgeroute.server.json_scan import JsonScan
from edgeroute.server.records import ServerParams

HELD_BODIES: Final = 8
"""Bodies of the longest size that all requests under way may hold together."""
DRAIN_S, DRAIN_BYTES = 2.0, 64 << 20
"""How long, and how much, of a refused body is read and dropped, so that the client hears why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How slowly a body may come.

    Attributes:
        idle_s: longest time without any of it.
        start_s: time that any body has.
        bytes_per_s: what it must bring for each further second.
    """

    idle_s: float = 10.0
    start_s: float = 20.0
    bytes_per_s: float = 16384.0


class Gone(Exception):
    """The client left before its request was whole."""


class BodyGuard:
    """Reads the body of every request, or refuses it."""

    def __init__(self, app: ASGIApp, params: ServerParams, patience: Patience) -> None:
        self._app, self._params, self._patience = app, params, patience
        self._n_held = 0
        self._max_held = HELD_BODIES * params.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        head = Head(scope)
        if not head.has_body:
            await self._app(scope, receive, send)
            return
        coming = _Coming(receive)
        try:
            self._check(head)
            body = await self._read(coming)
            await self._app(scope, _again(body, receive), send)
        except Gone:
            return  # nobody is left to hear of it
        except ApiError as error:
            # Of one that was too slow, nothing more is waited for.
            more = None if coming.ended or error.status == 408 else receive
            await refuse(error, scope, more, send)
        finally:
            self._n_held -= coming.n_held

    def _check(self, head: Head) -> None:
        if head.method not in ("POST", "DELETE"):
            raise ApiError(400, f"{head.method} takes no body")
        encodings = b",".join(head.all(b"content-encoding")).strip().lower()
        if encodings not in (b"", b"identity"):
            raise ApiError(415, "compressed bodies are not taken; send it without "
                                "Content-Encoding")  # fmt: skip
        kind, _, rest = (head.one(b"content-type") or "").lower().partition(";")
        charset = rest.replace(" ", "").replace('"', "")
        if kind.strip() != "application/json" or charset not in ("", "charset=utf-8"):
            # A form of another site could send any other kind without being asked.
            raise ApiError(415, "the body must be JSON in UTF-8, with the header Content-Type: "
                                "application/json")  # fmt: skip
        length = head.one(b"content-length")
        if length is not None and length.isdigit() and int(length[:20]) > self._limit:
            raise self._too_long()

    @property
    def _limit(self) -> int:
        return self._params.max_body_bytes

    def _too_long(self) -> ApiError:
        return ApiError(413, f"the body is longer than {self._limit} bytes, the most that is "
                             "taken", code="request_too_large")  # fmt: skip

    async def _read(self, coming: "_Coming") -> bytes:
        scan = JsonScan(self._params.max_json_depth)
        pieces: list[bytes] = []
        started = time.monotonic()
        while not coming.ended:
            left = self._patience.start_s + coming.n_held / self._patience.bytes_per_s
            left = min(self._patience.idle_s, started + left - time.monotonic())
            try:
                async with asyncio.timeout(max(0.0, left)):
                    piece = await coming.piece()
            except TimeoutError:
                raise ApiError(408, "the body came too slowly; send it again") from None
            self._hold(coming, len(piece))
            scan.feed(piece)
            pieces.append(piece)
        return b"".join(pieces)

    def _hold(self, coming: "_Coming", n_bytes: int) -> None:
        if coming.n_held + n_bytes > self._limit:
            raise self._too_long()
        if self._n_held + n_bytes > self._max_held:
            raise ApiError(503, f"the requests under way hold {self._n_held} bytes of bodies; "
                                f"the limit is {self._max_held}; try again",
                           retry_after_s=1)  # fmt: skip
        coming.n_held += n_bytes
        self._n_held += n_bytes


class _Coming:
    """The body of one request as it comes.

    Attributes:
        n_held: bytes of it that count as held.
        ended: whether its last piece came.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.n_held = 0
        self.ended = False

    async def piece(self) -> bytes:
        """Wait for the next piece.

        Raises:
            Gone: the client left.
        """
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise Gone
        self.ended = not message.get("more_body", False)
        piece: bytes = message.get("body", b"")
        return piece


def _again(body: bytes, receive: Receive) -> Receive:
    """Give the body once, then what else comes, which is that the client left."""
    waiting: list[bytes] = [body]

    async def give() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return give


async def refuse(error: ApiError, scope: Scope, more: Receive | None, send: Send) -> None:
    """Answer with an error; what the client still sends is read for a while and dropped.

    A connection that is closed while its client sends is reset, and the answer with it.

    Args:
        error: what to tell.
        scope: of the request.
        more: gives the rest of its body; None where nothing is left to be read.
        send: where the answer goes.
    """
    response = error.response()
    unread = Head(scope).has_body and (more is not None or error.status == 408)
    if not unread:
        await response(scope, _nothing, send)
        return
    response.headers["connection"] = "close"
    await _start(response, send)
    if more is not None:
        with contextlib.suppress(TimeoutError):  # it was told; that it goes on is its own affair
            async with asyncio.timeout(DRAIN_S):
                await _drain(more)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _drain(receive: Receive) -> None:
    n_bytes, more = 0, True
    while more and n_bytes < DRAIN_BYTES:
        message = await receive()
        n_bytes += len(message.get("body", b""))
        more = message.get("more_body", False)  # False too where the client left


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


async def _start(response: Response, send: Send) -> None:
    start = {"type": "http.response.start", "status": response.status_code}
    await send(start | {"headers": response.raw_headers})
    await send({"type": "http.response.body", "body": bytes(response.body), "more_body": True})
