"""The short way of a token to its client: the same bytes as the usual way, or none."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from edgeroute.server.guard import guards
from edgeroute.server.records import ServerParams, Services
from edgeroute.server.short_way import DIRECT
from edgeroute.server.sse import EventWriter
from tests.server.api_lab import wait_until
from tests.server.lab import serving
from tests.server.raw import connect, exchange, heard, request

PARAMS = ServerParams()
PIECES = [b"data: one\n\n", b"data: " + b"x" * 300 + b"\n\n", b"data: \xc3\xa4\n\n"]
CLOSE = "Connection: close"
WAIT_S = 20.0


class Pieces:
    """Sends pieces through a writer, by the short way where it goes; keeps what it said."""

    def __init__(self, *, short: bool) -> None:
        self.said: list[bool] = []
        self._short = short

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        direct = scope["state"].get(DIRECT) if self._short else None
        writer = EventWriter(send, stall_s=WAIT_S, beat_s=WAIT_S, direct=direct)
        for piece in PIECES:
            self.said.append(writer.write_now(piece))
            if not self.said[-1]:
                await writer.write(piece)
        await writer.end()
        if direct is not None:
            assert not direct(b"after the end")


class Unread:
    """Writes by the short way for as long as it goes."""

    def __init__(self) -> None:
        self.n_bytes = 0
        self.refused = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        direct = scope["state"][DIRECT]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        while direct(b"x" * 4096):
            self.n_bytes += 4096
            await asyncio.sleep(0)
        self.refused = True


@pytest.fixture
def served() -> Iterator[tuple[str, dict[str, Any]]]:
    """A server, and what answers at each path."""
    apps = {"short": Pieces(short=True), "usual": Pieces(short=False), "unread": Unread()}
    routes = [Route(f"/{name}", app) for name, app in apps.items()]
    services = Services(params=PARAMS, models=None)  # type: ignore[arg-type]
    with serving(services, routes, guards(PARAMS)) as base:
        yield base, apps


def body(answer: bytes) -> bytes:
    return answer.partition(b"\r\n\r\n")[2]


def test_both_ways_give_the_same_bytes(served: tuple[str, dict[str, Any]]) -> None:
    base, apps = served
    short = exchange(base, request("GET", "/short", CLOSE))
    usual = exchange(base, request("GET", "/usual", CLOSE))
    assert body(short) == body(usual)
    assert body(short).endswith(b"\r\n0\r\n\r\n")
    assert apps["short"].said == [False, True, True]  # the first one brings the head
    assert apps["usual"].said == [False, False, False]


def test_the_connection_serves_another_request_after_it(
    served: tuple[str, dict[str, Any]],
) -> None:
    base, apps = served
    both = exchange(base, request("GET", "/short") + request("GET", "/short", CLOSE))
    assert both.count(b"HTTP/1.1 200") == 2
    assert both.count(PIECES[1]) == 2
    assert apps["short"].said == 2 * [False, True, True]


def test_a_client_that_knows_no_chunks_gets_none(served: tuple[str, dict[str, Any]]) -> None:
    base, apps = served
    old = request("GET", "/short", CLOSE).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    assert body(exchange(base, old)) == b"".join(PIECES)
    assert apps["short"].said == [False, False, False]


def test_a_reader_that_reads_nothing_ends_the_short_way(
    served: tuple[str, dict[str, Any]],
) -> None:
    base, apps = served
    with connect(base) as wire:
        wire.sendall(request("GET", "/unread", CLOSE))
        wait_until(lambda: apps["unread"].refused)
        got = heard(wire)
    assert len(got) >= apps["unread"].n_bytes
