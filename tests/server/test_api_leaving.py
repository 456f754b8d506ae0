"""Clients who leave, read slowly or wait too long; engines that break: cells and streams after."""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol

from edgeroute import Runtime
from edgeroute.runtime.errors import ClosedError
from edgeroute.server import answering
from tests.server.api_lab import CHAT, COMPLETIONS, HELLO, Api, api, events, held, wait_until
from tests.server.raw import connect

T = TypeVar("T")
LONG: dict[str, Any] = {"prompt": "hello there", "max_tokens": 4000, "temperature": 0,
                        "logit_bias": {"65": 100}}  # fmt: skip


@pytest.fixture
def runtime(tiny_path: Path) -> Iterator[Runtime]:
    with Runtime(tiny_path, n_ctx=4096, n_kv=8192, threads=1) as found:
        yield found


@pytest.fixture(autouse=True)
def _nothing_unforeseen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Who leaves is no error of the server: no traceback may be logged for it."""
    seen: list[logging.LogRecord] = []
    handle = logging.Logger.handle

    def note(self: logging.Logger, record: logging.LogRecord) -> None:
        seen.append(record)
        handle(self, record)

    monkeypatch.setattr(logging.Logger, "handle", note)
    yield
    assert not [record for record in seen if record.exc_info]


@contextmanager
def asking(
    served: Api, path: str, body: object, room: int | None = None
) -> Iterator[socket.socket]:
    """Send a request by hand; leaving the block closes the connection, answered or not."""
    told, address = json.dumps(body).encode(), urlsplit(served.url)
    with socket.socket() as wire:
        if room is not None:  # bytes that are taken in before they are read
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        wire.settimeout(60)
        wire.connect((address.hostname, address.port))
        wire.sendall(
            f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            f"content-length: {len(told)}\r\n\r\n".encode()
            + told
        )
        yield wire


def _in_thread(work: Callable[[], T]) -> Callable[[], T]:
    """Begin some work; what is returned waits for its result."""
    found: list[T] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()

    def result() -> T:
        thread.join(60)
        return found[0]

    return result


def left(served: Api) -> None:
    """Check that the last request was dropped, and that nothing of it stays behind."""
    wait_until(lambda: bool(served.watcher.over))
    job = served.watcher.over[-1]
    assert (job.status, job.error) == (499, "the client left")
    wait_until(served.rests)
    assert served.complete(max_tokens=3, temperature=0)["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_leaves_while_tokens_come(runtime: Runtime, streaming: bool, n: int) -> None:
    with api(runtime) as served:
        with asking(served, COMPLETIONS, LONG | {"stream": streaming, "n": n}) as wire:
            wait_until(lambda: len(served.watcher.tokens) > 3 * n)
            if streaming:
                assert wire.recv(10).startswith(b"HTTP/1.1")
        left(served)
        assert served.watcher.over[0].n_generated < 4000 * n


@pytest.mark.parametrize("streaming", [False, True])
def test_a_client_leaves_during_prefill(smollm2: Runtime, streaming: bool) -> None:
    """A prompt that takes seconds is dropped within it: no token of its answer is computed."""
    body = {"prompt": "apples and pears " * 600, "max_tokens": 100, "stream": streaming,
            "edgeroute": {"prefix": "off"}}  # fmt: skip
    with api(smollm2) as served:
        before = smollm2.stats()["decode_steps"]
        with asking(served, COMPLETIONS, body):
            wait_until(lambda: smollm2.stats()["running"] == 1)
        wait_until(lambda: bool(served.watcher.over))
        assert served.watcher.over[0].status == 499
        wait_until(served.rests)
        assert served.watcher.over[0].n_generated == 0
        assert smollm2.stats()["decode_steps"] == before


@pytest.mark.parametrize("streaming", [False, True])
def test_a_client_leaves_before_the_engine_took_his_request(
    runtime: Runtime, streaming: bool
) -> None:
    with api(runtime) as served:
        with held(runtime):
            with asking(served, CHAT, HELLO | {"stream": streaming}):
                wait_until(lambda: runtime.stats()["waiting"] == 1)
            wait_until(lambda: bool(served.watcher.over))
        left(served)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_client_leaves_while_the_model_is_opened(runtime: Runtime, streaming: bool) -> None:
    with api(runtime) as served:
        served.models.delay_s = 600.0
        with asking(served, CHAT, HELLO | {"stream": streaming}):
            wait_until(lambda: bool(served.watcher.begun))
        wait_until(lambda: bool(served.watcher.over))
        assert served.watcher.over[0].status == 499
        assert served.watcher.over[0].started is None
        served.models.delay_s = 0.0
        left_nothing = served.complete(max_tokens=2)
        assert left_nothing["usage"]["completion_tokens"] == 2


def test_a_reader_that_takes_nothing_is_ended(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = H11Protocol.connection_made

    def small(self: H11Protocol, transport: asyncio.Transport) -> None:
        wire: socket.socket = transport.get_extra_info("socket")
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # else it takes megabytes
        made(self, transport)  # type: ignore[arg-type]

    monkeypatch.setattr(H11Protocol, "connection_made", small)
    with api(runtime, stall_s=0.3) as served:
        with asking(served, COMPLETIONS, LONG | {"stream": True, "logprobs": 5}, room=4096):
            wait_until(lambda: bool(served.watcher.over))
            job = served.watcher.over[0]
            assert job.status == 499
            assert job.error is not None and "took nothing" in job.error
        wait_until(served.rests)
        assert served.complete(max_tokens=2)["usage"]["completion_tokens"] == 2


def test_an_engine_that_breaks_in_mid_stream(runtime: Runtime) -> None:
    """The stream says so as its last event and ends properly; the model is to be opened anew."""
    with api(runtime) as served, served.client.stream(
        "POST", COMPLETIONS, json=LONG | {"stream": True, "n": 2}
    ) as answer:  # fmt: skip
        pieces = answer.iter_text()
        begun = next(pieces)
        runtime.abandon(ClosedError("the engine was given up"))
        told = events(begun + "".join(pieces))
        error = told[-1]["error"]
        assert "given up" in error["message"]
        assert (error["type"], error["code"]) == ("overloaded_error", "engine_stopped")
        assert all("error" not in event for event in told[:-1])
        job = served.last_job()
        assert job.status == 503
        assert served.models.n_broken == 1


def test_an_engine_that_broke_before_is_a_503(runtime: Runtime) -> None:
    with api(runtime) as served:
        runtime.abandon(ClosedError("the engine was given up"))
        for streaming in (False, True):
            answer = served.post(CHAT, HELLO | {"stream": streaming})
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "engine_stopped"
        assert served.models.n_broken == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_an_answer_that_is_cut_by_its_time(runtime: Runtime, streaming: bool) -> None:
    with api(runtime, timeout_s=0.4) as served:
        answer = served.post(COMPLETIONS, LONG | {"stream": streaming})
        if streaming:
            told = events(answer.text)
            reason, more = told[-1]["choices"][0]["finish_reason"], told[-1]["edgeroute"]
            text = "".join(event["choices"][0]["text"] for event in told)
        else:
            (only,) = answer.json()["choices"]
            reason, text = only["finish_reason"], only["text"]
            more = answer.json()["edgeroute"]
        assert (reason, more["finish_reason"]) == ("length", "timeout")
        assert text


@pytest.mark.parametrize("streaming", [False, True])
def test_an_answer_without_a_token_in_time_is_a_504(runtime: Runtime, streaming: bool) -> None:
    body = HELLO | {"stream": streaming, "edgeroute": {"timeout_s": 0.2}}
    with api(runtime) as served:
        with held(runtime):
            answers = _in_thread(lambda: served.post(CHAT, body))
            wait_until(lambda: runtime.stats()["waiting"] == 1)
            asked = served.watcher.begun[0].created
            wait_until(lambda: time.monotonic() > asked + 0.3)
        answer = answers()
        assert answer.status_code == 504
        assert answer.json()["error"]["type"] == "timeout_error"
        assert served.last_job().status == 504
        wait_until(served.rests)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_engine_that_does_not_end_an_answer_is_not_waited_for(
    runtime: Runtime, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "GRACE_S", 0.1)
    body = HELLO | {"stream": streaming, "edgeroute": {"timeout_s": 0.1}}
    with api(runtime) as served:
        with held(runtime):
            error = served.refused(CHAT, body, 504)
        assert error["code"] == "timeout"
        wait_until(served.rests)


def test_no_time_at_all_is_a_504(runtime: Runtime) -> None:
    with api(runtime) as served:
        for streaming in (False, True):
            body = HELLO | {"stream": streaming, "edgeroute": {"timeout_s": 1e-9}}
            served.refused(CHAT, body, 504)


def test_one_client_leaves_and_another_hears_all(runtime: Runtime) -> None:
    ask = {"prompt": "hello there", "max_tokens": 300, "temperature": 0}
    with api(runtime) as served:
        alone = served.complete(**ask)["choices"]
        with held(runtime):
            answers = _in_thread(lambda: served.complete(**ask))
            wait_until(lambda: runtime.stats()["waiting"] == 1)
            with asking(served, COMPLETIONS, LONG):
                wait_until(lambda: runtime.stats()["waiting"] == 2)
        assert answers()["choices"] == alone
        wait_until(served.rests)


@pytest.mark.parametrize("streaming", [False, True])
def test_silence_is_filled_with_comments(
    runtime: Runtime, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "BEAT_S", 0.05)
    with api(runtime) as served:
        body = HELLO | {"stream": streaming, "max_tokens": 3}
        with held(runtime), asking(served, CHAT, body) as wire:
            if streaming:
                wire.settimeout(60)
                found = b""
                while b": still there" not in found:
                    found += wire.recv(4096)
            else:
                wait_until(lambda: runtime.stats()["waiting"] == 1)
        wait_until(served.rests)
        answer = served.post(CHAT, body)
        assert answer.status_code == 200


def test_a_head_is_no_request(runtime: Runtime) -> None:
    with api(runtime) as served:
        with connect(served.url) as wire:
            wire.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n"
                         b"\r\n{")  # fmt: skip
        assert httpx2.get(f"{served.url}/v1/models").status_code == 200
        assert not served.watcher.begun
