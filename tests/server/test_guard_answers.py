"""What the guard does to answers: headers, failures, streams, and the log."""

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from edgeroute.server.errors import ApiError
from tests.server.asgi import HOST, Ask, answer, guarded
from tests.server.guard_lab import KEYED, PLAIN, ROUTES, app, ask


def test_all_answers_have_the_security_headers() -> None:
    for path, status in {
        "/v1/models": 200, "/none": 404, "/breaks": 500, "/wrong": 400, "/refuses": 429, "/": 200,
    }.items():  # fmt: skip
        reply = ask(HOST, path=path)
        assert reply.status == status
        assert reply["x-content-type-options"] == "nosniff"
        assert reply["referrer-policy"] == "no-referrer"
        assert reply["cross-origin-resource-policy"] == "same-origin"
        assert reply["cache-control"] == "no-store"
        assert "frame-ancestors 'none'" in reply["content-security-policy"]
        source = "'self'" if path == "/" else "'none'"
        assert reply["content-security-policy"].startswith(f"default-src {source};")
        assert reply.has("x-request-id")
    assert ask(HOST, path="/refuses")["retry-after"] == "3"


def test_headers_that_a_route_sets_are_kept_and_come_once() -> None:
    async def own(request: Request) -> Response:
        return Response(headers={"Cache-Control": "max-age=60", "Referrer-Policy": "origin"})

    reply = answer(guarded(PLAIN, Route("/v1/models", own)), Ask())
    assert (reply["cache-control"], reply["referrer-policy"]) == ("max-age=60", "origin")


def test_a_crash_is_500_with_the_request_id_and_without_details(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "edgeroute.server"):
        reply = ask(HOST, path="/breaks")
    assert reply.status == 500
    assert reply.whole
    assert reply.error["type"] == "server_error"
    assert b"secret" not in reply.body
    (failed,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert failed.exc_info is not None
    assert isinstance(failed.exc_info[1], RuntimeError)
    assert ask(HOST).status == 200


def test_a_mistake_of_the_client_is_no_crash(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "edgeroute.server"):
        reply = ask(HOST, path="/wrong")
    assert reply.error["message"] == "max_tokens must be 1 or more, got 0"
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


def test_a_stream_that_breaks_ends_with_an_error_event() -> None:
    reply = ask(HOST, path="/text/event-stream")
    assert reply.status == 200
    assert reply.pieces[0] == b"data: 1\n\n"
    assert reply.pieces[-1].startswith(b'data: {"error":')
    assert reply.pieces[-1].endswith(b"\n\n")
    assert reply.whole


def test_a_client_that_leaves_in_mid_answer_is_no_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Routes end its work by an ApiError of status 499, which nobody reads."""

    async def give() -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"
        raise ApiError(499, "the client left")

    async def stream(request: Request) -> Response:
        return StreamingResponse(give(), media_type="text/event-stream")

    told: list[int] = []
    one = guarded(PLAIN, Route("/v1/models", stream), told=lambda status, _: told.append(status))
    with caplog.at_level(logging.INFO, "edgeroute.server"):
        reply = answer(one, Ask())
    assert reply.pieces == [b"data: 1\n\n"]
    assert told == [499]
    (line,) = caplog.records
    assert line.edgeroute_fields["status"] == 499  # type: ignore[attr-defined]


def test_any_other_answer_that_breaks_is_left_unfinished() -> None:
    """Its client must not take the half for the whole."""
    reply = ask(HOST, path="/text/plain")
    assert reply.pieces == [b"data: 1\n\n"]
    assert not reply.whole


def test_streams_pass_piece_by_piece() -> None:
    async def give() -> AsyncIterator[bytes]:
        for i in range(3):
            yield str(i).encode()

    async def stream(request: Request) -> Response:
        return StreamingResponse(give())

    reply = answer(guarded(PLAIN, Route("/v1/models", stream)), Ask())
    assert reply.pieces == [b"0", b"1", b"2", b""]


def test_every_answer_is_told_of() -> None:
    told: list[int] = []

    def hear(status: int, seconds: float) -> None:
        assert seconds >= 0
        told.append(status)

    one = guarded(KEYED, *ROUTES, told=hear)
    answer(one, Ask(path="/health/live"))
    answer(one, Ask())
    answer(one, Ask(headers=()))
    assert told == [200, 401, 400]


def test_the_log_has_the_path_without_its_query(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "edgeroute.server"):
        answer(app(), Ask(query=b"key=secret", headers=[HOST, ("x-request-id", "id-7")]))
    (line,) = caplog.records
    fields = line.edgeroute_fields  # type: ignore[attr-defined]
    assert fields["path"] == "/v1/models"
    assert fields["status"] == 200
    assert "secret" not in str(vars(line))


def test_websockets_are_refused() -> None:
    sent: list[str] = []

    async def send(message: dict[str, object]) -> None:
        sent.append(str(message["type"]))

    async def receive() -> dict[str, object]:
        return {"type": "websocket.connect"}

    asyncio.run(app()({"type": "websocket", "path": "/"}, receive, send))  # type: ignore[arg-type]
    assert sent == ["websocket.close"]
