"""The bytes on the connection: slow heads, idle connections, smuggling, pipelines, garbage."""

import asyncio
import gc
import random
import socket
from collections.abc import Iterator

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from edgeroute.server import connection
from edgeroute.server.errors import ApiError
from edgeroute.server.guard import Patience, guards
from edgeroute.server.records import ServerParams, Services
from tests.server.api_lab import wait_until
from tests.server.lab import serving
from tests.server.raw import connect, exchange, heard, request, statuses

PARAMS = ServerParams(max_body_bytes=1 << 20)
CLOSE = "Connection: close"
LONG = 16 << 20
"""Bytes that no socket's buffer holds."""


async def live(request: Request) -> Response:
    return JSONResponse({"path": request.url.path})


class Endless:
    """An answer of as many pieces as one likes, each when the one before was taken."""

    def __init__(self, n_pieces: int, piece: bytes) -> None:
        self._n, self._piece = n_pieces, piece

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        leaving = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(self._n):
            await send({"type": "http.response.body", "body": self._piece, "more_body": True})
            await asyncio.sleep(0)
            if leaving.done():
                return
        leaving.cancel()
        raise ApiError(499, "its reader reads nothing")


async def echo(request: Request) -> Response:
    return JSONResponse({"n": len(await request.body())})


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    """A server that is quick to give up."""
    services = Services(params=PARAMS, models=None)  # type: ignore[arg-type]
    routes = [
        Route("/health/live", live), Route("/echo", echo, methods=["POST"]),
        Route("/endless", Endless(1 << 30, b"x" * 65536)), Route("/long", Endless(1, b"x" * LONG)),
    ]  # fmt: skip
    patience = Patience(idle_s=0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "HEAD_S", 0.2)
        patch.setattr(connection, "STUCK_S", 0.2)
        with serving(services, routes, guards(PARAMS, patience=patience)) as base:
            yield base


@pytest.fixture(autouse=True)
def _healthy_after(base: str) -> Iterator[None]:
    yield
    assert statuses(exchange(base, request("GET", "/health/live", CLOSE))) == [200]


def test_a_connection_that_says_nothing_is_closed(base: str) -> None:
    with connect(base) as wire:
        assert statuses(heard(wire)) in ([], [408])


def test_a_head_that_comes_byte_by_byte_is_given_up(base: str) -> None:
    drops: list[bytes | float] = [b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nX: "]
    drops += [0.05, b"a"] * 20
    assert statuses(exchange(base, *drops, b"\r\n\r\n")) in ([], [408])


def test_the_second_head_of_a_connection_is_given_up_too(base: str) -> None:
    whole = request("GET", "/health/live")
    found = exchange(base, whole, 0.1, b"GET /hea", 1.0, b"lth/live HTTP/1.1\r\n\r\n")
    assert statuses(found) in ([200], [200, 408])


def test_a_slow_body_is_given_up(base: str) -> None:
    head = request("POST", "/echo", "Content-Length: 100", "Content-Type: application/json")
    assert statuses(exchange(base, head + b'{"a"', 0.6)) == [408]


@pytest.mark.parametrize("path", ["/endless", "/long"])
def test_a_client_that_reads_nothing_is_given_up(base: str, path: str) -> None:
    """Its connection would count, and keep its buffer, for as long as it likes."""
    with socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.connect(("127.0.0.1", int(base.rpartition(":")[2])))
        wire.sendall(request("GET", path))
        wait_until(lambda: not kept(wire.getsockname()))


def kept(client: object) -> bool:
    """Whether the server still has a client's connection."""
    found = [each for each in gc.get_objects() if isinstance(each, connection.Connection)]
    return any(each in each.connections and each.client == client for each in found)


def test_requests_in_a_pipeline_are_answered_in_order(base: str) -> None:
    several = request("POST", "/echo", body=b"[1]") + request("GET", "/health/live", CLOSE)
    found = exchange(base, request("POST", "/echo", body=b"{}") + several)
    assert statuses(found) == [200, 200, 200]
    assert found.index(b'{"n":2}') < found.index(b'{"n":3}') < found.index(b"/health/live")


def test_length_and_chunks_together_smuggle_nothing(base: str) -> None:
    """The chunks count, as RFC 9112 says; the bytes behind them are no second request's body."""
    both = request("POST", "/echo", "Content-Length: 4", "Transfer-Encoding: chunked", CLOSE,
                   "Content-Type: application/json")  # fmt: skip
    found = exchange(base, both + b"2\r\n{}\r\n0\r\n\r\n" + request("GET", "/health/live"))
    assert statuses(found) in ([200], [400])
    assert b"/health/live" not in found


@pytest.mark.parametrize(
    "head",
    [["Content-Length: 2", "Content-Length: 3"], ["Content-Length: -1"], ["Content-Length: 2, 3"],
     ["Content-Length: 0x2"], ["Transfer-Encoding: gzip"], ["Transfer-Encoding: chunked, chunked"],
     ["Content-Length : 2"], ["Content-Length: 2", " folded: header"], ["Bad Name: x"],
     ["X: a\x00b"], ["X: a\rb"], ["Host: a\nX: b"]],
)  # fmt: skip
def test_heads_that_two_parsers_could_read_in_two_ways_are_refused(
    base: str, head: list[str]
) -> None:
    found = exchange(base, request("POST", "/echo", *head, body=b"{}"))
    assert set(statuses(found)) <= {400, 403, 413, 501}
    assert statuses(found)


@pytest.mark.parametrize(
    "chunk",
    [b"zz\r\n{}\r\n", b"-2\r\n{}\r\n", b"2;" + b"x" * 99_999 + b"\r\n", b"f" * 20 + b"\r\n"],
)
def test_broken_chunks_end_the_connection(base: str, chunk: bytes) -> None:
    head = request("POST", "/echo", "Transfer-Encoding: chunked", "Content-Type: application/json")
    assert set(statuses(exchange(base, head + chunk, end=True))) <= {400, 408, 413}


def test_a_huge_head_is_refused(base: str) -> None:
    found = exchange(base, request("GET", "/health/live", "X: " + "a" * 40_000, CLOSE))
    assert statuses(found) == [431]
    found = exchange(base, b"GET /" + b"a" * (1 << 20), end=True)
    assert set(statuses(found)) <= {400}


def test_a_long_body_is_refused_and_the_client_hears_it(base: str) -> None:
    """Though it sends on, at first: the answer must not be lost in a reset connection."""
    body = b"[" + b" " * (3 << 20)
    assert statuses(exchange(base, request("POST", "/echo", body=body))) == [413]


def test_garbage_is_refused(base: str) -> None:
    draw = random.Random(1)
    for _ in range(30):
        found = exchange(base, draw.randbytes(draw.randint(1, 3000)), end=True)
        assert set(statuses(found)) <= {400, 405, 408}
    for text in (
        b"\x16\x03\x01\x02\x00\x01",
        b"\r\n" * 1000,
        b"SSH-2.0-x\r\n",
        b"PRI * HTTP/2.0\r\n\r\n",
    ):
        assert set(statuses(exchange(base, text, end=True))) <= {400, 405, 408}


@pytest.mark.parametrize(
    "headers",
    [("Connection: Upgrade", "Upgrade: websocket"), ("Connection: Upgrade", "Upgrade: h2c"),
     ("Expect: 100-continue",), ("Expect: everything",), ("Range: bytes=0-1",)],
)  # fmt: skip
def test_upgrades_and_expectations_change_nothing(base: str, headers: tuple[str, ...]) -> None:
    kept = [header for header in headers if not header.startswith("Connection")]
    both = ["Connection: close, Upgrade"] if len(kept) < len(headers) else [CLOSE]
    found = exchange(base, request("GET", "/health/live", *kept, *both))
    assert statuses(found) == [200]


def test_an_http_1_0_request_without_a_host_is_refused(base: str) -> None:
    assert statuses(exchange(base, b"GET /health/live HTTP/1.0\r\n\r\n")) == [400]


def test_a_client_that_leaves_in_the_middle_harms_nobody(base: str) -> None:
    for piece in (b"POST /echo HT", request("POST", "/echo", "Content-Length: 99") + b"{"):
        with connect(base) as wire:
            wire.sendall(piece)
