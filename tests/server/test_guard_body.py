"""The body of a request: JSON, not too long, not too deep, and it must arrive."""

import asyncio
import json
import logging

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from edgeroute.server import guard_body
from edgeroute.server.guard_body import Patience
from edgeroute.server.records import ServerParams
from tests.server.asgi import HOST, JSON, Ask, Header, Reply, answer, guarded, post

SMALL = ServerParams(max_body_bytes=1000, max_json_depth=8)
CHUNKED: Header = ("transfer-encoding", "chunked")


async def echo(request: Request) -> Response:
    body = await request.body()
    return JSONResponse({"n": len(body), "type": request.headers.get("content-type")})


def app(params: ServerParams = SMALL, patience: Patience | None = None) -> ASGIApp:
    route = Route("/echo", echo, methods=["GET", "POST", "DELETE"])
    return guarded(params, route, patience=patience)


def n_echoed(reply: Reply) -> int:
    assert reply.status == 200
    return int(json.loads(reply.body)["n"])


def test_a_body_comes_whole_however_it_was_cut() -> None:
    assert n_echoed(answer(app(), post(b'{"a": 1}'))) == 8
    assert n_echoed(answer(app(), post(b'{"a', b'": ', b"", b"1}"))) == 8
    assert n_echoed(answer(app(), post(b""))) == 0


def test_a_post_without_a_body_needs_no_type() -> None:
    for headers in ([HOST], [HOST, ("content-length", "0")]):
        assert n_echoed(answer(app(), Ask(method="POST", path="/echo", headers=headers))) == 0


@pytest.mark.parametrize("length", ["1001", "99999999999999999999999999", "0001001"])
def test_a_length_over_the_limit_is_refused_unread(length: str) -> None:
    ask = Ask(method="POST", path="/echo", headers=[HOST, JSON, ("content-length", length)])
    ask.pieces = [b"x" * 10, None]
    reply = answer(app(), ask)
    assert reply.status == 413
    assert "1000" in reply.error["message"]
    assert reply["connection"] == "close"


def test_a_body_in_chunks_is_refused_at_the_limit() -> None:
    pieces = [b"1" * 100] * 10
    assert n_echoed(answer(app(), post(*pieces))) == 1000
    ask = post(*pieces, b"1", *pieces)
    reply = answer(app(), ask)
    assert reply.status == 413
    assert reply.error["code"] == "request_too_large"
    assert reply.whole


def test_a_refused_body_is_read_to_its_end_so_that_the_client_hears(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A connection that is closed while its client sends is reset, and the answer with it."""
    n_read: list[int] = []
    pieces = [b"x" * 500] * 20
    ask = post(*pieces)

    async def ask_and_count() -> Reply:
        reply = await ask(app())
        n_read.append(len(pieces))
        return reply

    reply = asyncio.run(ask_and_count())
    assert reply.status == 413
    assert reply.pieces[-1] == b"" and len(reply.pieces) == 2  # told before it was read
    monkeypatch.setattr(guard_body, "DRAIN_BYTES", 1000)
    assert answer(app(), post(*pieces)).whole
    monkeypatch.setattr(guard_body, "DRAIN_S", 0.02)
    assert answer(app(), post(*pieces[:3], 0.5, b"x")).whole


@pytest.mark.parametrize(
    "kind",
    ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
     "application/json; charset=utf-16", "application/jsonx", "text/plain, application/json",
     "application/json, text/plain"],
)  # fmt: skip
def test_only_json_is_taken(kind: str) -> None:
    """What a form of another site can send without being asked is none of it."""
    headers = [HOST, CHUNKED, *([("content-type", kind)] if kind else [])]
    reply = answer(app(), Ask(method="POST", path="/echo", headers=headers, pieces=[b"{}"]))
    assert reply.status == 415
    assert "application/json" in reply.error["message"]


@pytest.mark.parametrize(
    "kind",
    ["application/json", "Application/JSON ; charset=UTF-8", 'application/json;charset="utf-8"'],
)
def test_json_by_any_of_its_spellings_is_taken(kind: str) -> None:
    headers = [HOST, CHUNKED, ("content-type", kind)]
    ask = Ask(method="POST", path="/echo", headers=headers, pieces=[b"{}"])
    assert n_echoed(answer(app(), ask)) == 2


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "identity, gzip", "zstd", "GZIP"])
def test_compressed_bodies_are_refused(encoding: str) -> None:
    """CVE-2024-12886 is a small body that unpacks without end."""
    reply = answer(app(), post(b"\x1f\x8b", more=[("content-encoding", encoding)]))
    assert reply.status == 415


def test_a_body_where_none_belongs_is_refused() -> None:
    for method in ("GET", "HEAD", "OPTIONS"):
        ask = post(b"{}")
        ask.method = method
        assert answer(app(), ask).status == 400, method


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"k": ['])
def test_deep_json_is_refused_before_it_is_parsed(opening: bytes) -> None:
    """L#27434."""
    big = ServerParams()
    reply = answer(app(big), post(opening * 20_000))
    assert reply.status == 400
    assert reply.error["code"] == "json_too_deep"


def test_json_at_the_depth_is_taken() -> None:
    assert n_echoed(answer(app(), post(b"[" * 8 + b"]" * 8))) == 16
    assert answer(app(), post(b"[" * 9 + b"]" * 9)).status == 400
    assert n_echoed(answer(app(), post(b'"' + b"[" * 90 + b'"'))) == 92


def test_a_body_that_stops_coming_is_408() -> None:
    slow = app(patience=Patience(idle_s=0.05))
    reply = answer(slow, post(b'{"a":', 0.5, b"1}"))
    assert reply.status == 408
    assert reply.whole


def test_a_body_that_comes_byte_by_byte_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte in time, and yet it would never end."""
    monkeypatch.setattr(guard_body, "DRAIN_S", 0.02)
    slow = app(patience=Patience(idle_s=10, start_s=0.1, bytes_per_s=1e6))
    pieces: list[bytes | float | None] = [b"1", 0.02] * 100
    reply = answer(slow, post(*pieces, b"1"))
    assert reply.status == 408


def test_a_long_body_that_keeps_coming_is_given_time() -> None:
    patient = app(patience=Patience(idle_s=10, start_s=0.05, bytes_per_s=100))
    pieces: list[bytes | float | None] = [b"1" * 100, 0.02] * 9
    assert n_echoed(answer(patient, post(*pieces, b"1"))) == 901


def test_a_client_that_leaves_while_it_sends_gets_no_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "edgeroute.server"):
        reply = answer(app(), post(b'{"a"', None))
    assert reply.status == 0
    assert caplog.records[-1].edgeroute_fields["status"] == 499  # type: ignore[attr-defined]


def test_all_bodies_together_are_limited_and_freed() -> None:
    """Eight of the longest fit; one more waits for another time; then there is room again."""
    one = app(SMALL)
    body = b"1" * 1000

    async def many() -> list[int]:
        asks = [post(body[:-1], 0.2, b"1") for _ in range(9)]
        replies = await asyncio.gather(*(ask(one) for ask in asks))
        after = await asyncio.gather(*(post(body)(one) for _ in range(8)))
        return [reply.status for reply in (*replies, *after)]

    statuses = asyncio.run(many())
    assert sorted(statuses[:9]) == [200] * 8 + [503]
    assert statuses[9:] == [200] * 8


def test_after_the_body_the_route_hears_that_the_client_left() -> None:
    """What comes after the body is passed on: a route listens for the disconnect."""
    heard: list[str] = []

    async def listen(request: Request) -> Response:
        await request.body()
        heard.append((await request.receive())["type"])
        return Response()

    ask = post(b"{}")
    ask.pieces = [b"{}", None]
    ask.headers = [HOST, JSON, ("content-length", "2")]
    route = Route("/echo", listen, methods=["POST"])

    async def leave() -> None:
        app = guarded(SMALL, route)
        sent = [{"type": "http.request", "body": b"{}", "more_body": False},
                {"type": "http.disconnect"}]  # fmt: skip

        async def receive() -> dict[str, object]:
            return sent.pop(0)

        async def send(message: object) -> None:
            pass

        raw = [(k.encode(), v.encode()) for k, v in ask.headers]
        await app({"type": "http", "method": "POST", "path": "/echo", "headers": raw,
                   "query_string": b"", "raw_path": b"/echo", "scheme": "http",
                   "root_path": "", "server": ("127.0.0.1", 1)},
                  receive, send)  # type: ignore[arg-type]  # fmt: skip

    asyncio.run(leave())
    assert heard == ["http.disconnect"]
