"""Pieces that an engine's thread writes past the event loop: the same bytes, in order, counted."""

import asyncio
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from edgeroute import Runtime
from edgeroute.models import ahead
from edgeroute.run_ahead import Race
from edgeroute.server.answering import Answering
from edgeroute.server.records import ServerParams, Services
from edgeroute.server.short_way import DIRECT, Lane
from edgeroute.server.sse import EventWriter
from edgeroute.stats import Chunk
from tests.edgeroute.engine_lab import SETTINGS
from tests.server.api_lab import CHAT, COMPLETIONS, HELLO, Api, api, events, wait_until
from tests.server.lab import serving
from tests.server.raw import connect, exchange, heard, request

CLOSE = "Connection: close"
WAIT_S = 20.0
N_PIECES = 3000
GREEDY: dict[str, Any] = {"max_tokens": 60, "temperature": 0, "stream": True,
                          "stream_options": {"include_usage": True}}  # fmt: skip


def pieces(size: int) -> list[bytes]:
    rng = random.Random(size)
    return [b"data: %d %b\n\n" % (i, b"x" * rng.randrange(size)) for i in range(N_PIECES)]


class Made:
    """Sends pieces that another thread makes: past the loop where it may, else through it."""

    def __init__(self, size: int) -> None:
        self.pieces = pieces(size)
        self.n_past = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue[bytes]()
        writer = EventWriter(send, stall_s=WAIT_S, beat_s=WAIT_S, direct=scope["state"].get(DIRECT))
        lane = writer.lane
        assert lane is not None
        making = asyncio.create_task(asyncio.to_thread(self._make, lane, loop, inbox))
        minding = asyncio.create_task(writer.mind(lambda: None))
        n_came = 0
        while not making.done() or n_came + self.n_past < N_PIECES:
            try:
                async with asyncio.timeout(0.02):
                    piece = await inbox.get()
            except TimeoutError:
                continue
            n_came += 1
            if not writer.write_now(piece):
                await writer.write(piece)
            lane.came()
            lane.lend()
        await making
        minding.cancel()
        await writer.end()
        writer.close()
        assert not lane.write(b"after the end")

    def _make(
        self, lane: Lane, loop: asyncio.AbstractEventLoop, inbox: "asyncio.Queue[bytes]"
    ) -> None:
        rng, pause = random.Random(1), threading.Event()
        for piece in self.pieces:
            if rng.random() < 0.02:  # of no plain text, say
                lane.leave()
            elif lane.write(piece):
                self.n_past += 1
                continue
            loop.call_soon_threadsafe(inbox.put_nowait, piece)
            pause.wait(0.002 * rng.random())  # as a pass of a model takes


@pytest.fixture
def served() -> Iterator[tuple[str, dict[str, Made]]]:
    made = {"small": Made(50), "large": Made(20_000)}
    services = Services(params=ServerParams(), models=None)  # type: ignore[arg-type]
    with serving(services, [Route(f"/{name}", app) for name, app in made.items()]) as base:
        yield base, made


def unchunked(answer: bytes) -> bytes:
    rest, found = answer.partition(b"\r\n\r\n")[2], b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        n = int(size, 16)
        if not n:
            return found
        assert rest[n : n + 2] == b"\r\n"
        found, rest = found + rest[:n], rest[n + 2 :]


def test_both_ways_together_keep_the_order(served: tuple[str, dict[str, Made]]) -> None:
    base, made = served
    answer = exchange(base, request("GET", "/small", CLOSE))
    assert unchunked(answer) == b"".join(made["small"].pieces)
    assert made["small"].n_past > N_PIECES / 2


def test_a_slow_reader_gets_all_in_order(served: tuple[str, dict[str, Made]]) -> None:
    base, made = served
    with connect(base) as wire:
        wire.sendall(request("GET", "/large", CLOSE))
        head = wire.recv(1024)
        threading.Event().wait(0.5)  # more is written than both systems' buffers hold
        answer = head + heard(wire)
    assert unchunked(answer) == b"".join(made["large"].pieces)


def test_a_client_that_knows_no_chunks_is_written_to_by_the_loop(
    served: tuple[str, dict[str, Made]],
) -> None:
    base, made = served
    old = request("GET", "/small", CLOSE).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    answer = exchange(base, old)
    assert answer.partition(b"\r\n\r\n")[2] == b"".join(made["small"].pieces)
    assert made["small"].n_past == 0


# answers of a model


@pytest.fixture
def served_model(tiny_path: Path) -> Iterator[Api]:
    # One token a pass: `past` holds the engine between two of them, and what goes by the loop
    # leaves the engine's thread before the next pass.
    with Runtime(tiny_path, run_ahead="off", **SETTINGS) as runtime, api(runtime) as found:
        yield found


@pytest.fixture
def past(monkeypatch: pytest.MonkeyPatch) -> list[Chunk]:
    """What went past the loop; the engine waits for the loan, so that all that may do."""
    kept: list[Chunk] = []
    show = Answering._show_past

    def patient(self: Answering, lane: Lane, i: int, chunk: Chunk) -> bool:
        writer, n_begun = self._writer, len(self._begun)
        if writer is not None and writer.started and n_begun == 1 and not chunk.generation:
            wait_until(lambda: lane.lent or lane._n_left == 0)
        found = show(self, lane, i, chunk)
        if found:
            kept.append(chunk)
        return found

    monkeypatch.setattr(Answering, "_show_past", patient)
    return kept


def texts(path: str, told: list[dict[str, Any]]) -> str:
    choices = [each["choices"][0] for each in told if each["choices"]]
    if path == COMPLETIONS:
        return "".join(each["text"] for each in choices)
    return "".join(each["delta"].get("content", "") for each in choices)


@pytest.mark.parametrize(
    ("path", "asked"), [(CHAT, HELLO), (COMPLETIONS, {"prompt": "hello there"})]
)
def test_an_answer_past_the_loop_is_the_same_answer(
    served_model: Api, past: list[Chunk], monkeypatch: pytest.MonkeyPatch,
    path: str, asked: dict[str, Any],
) -> None:  # fmt: skip
    by_lane = events(served_model.post(path, asked | GREEDY).text)
    job = served_model.last_job()
    n_past = len(past)
    monkeypatch.setattr(Lane, "lend", lambda self: None)
    by_loop = events(served_model.post(path, asked | GREEDY).text)
    assert n_past > 10
    assert len(past) == n_past
    assert texts(path, by_lane) == texts(path, by_loop) != ""
    assert by_lane[-1]["usage"]["completion_tokens"] == 60 == job.n_generated
    shapes = [[set(each), [set(choice) for choice in each["choices"]]] for each in by_lane]
    assert shapes == [[set(each), [set(c) for c in each["choices"]]] for each in by_loop]


def test_tokens_that_come_together_keep_their_order_on_both_ways(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "WISHES", 0)
    monkeypatch.setattr(Race, "several", True)
    with Runtime(tiny_path, **SETTINGS) as runtime, api(runtime) as served:
        for path, asked in ((CHAT, HELLO), (COMPLETIONS, {"prompt": "hello there"})):
            whole = served.post(path, asked | GREEDY | {"stream": False, "stream_options": None})
            choice = whole.json()["choices"][0]
            expected = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
            assert texts(path, events(served.post(path, asked | GREEDY).text)) == expected != ""
            with monkeypatch.context() as patched:
                patched.setattr(Lane, "lend", lambda self: None)
                assert texts(path, events(served.post(path, asked | GREEDY).text)) == expected
        levers: Any = runtime.stats()["levers"]
        assert levers["run_ahead"]["passes"] > 0


def test_pieces_past_the_loop_are_counted_when_they_went(
    served_model: Api, past: list[Chunk]
) -> None:
    served_model.post(CHAT, HELLO | GREEDY)
    job = served_model.last_job()
    assert past
    told = [each for each in served_model.watcher.tokens if each[0] == job.id]
    assert sum(n for _, n, _ in told) == 60
    assert all(seconds >= 0 for _, _, seconds in told)
    assert job.first_token is not None and job.last_token is not None
    assert job.created <= job.first_token <= job.last_token


@pytest.mark.parametrize("more", [{"n": 3}, {"logprobs": True}])
def test_choices_and_figures_come_whole(
    served_model: Api, past: list[Chunk], more: dict[str, Any]
) -> None:
    told = events(served_model.post(CHAT, HELLO | GREEDY | more).text)
    whole = served_model.chat(**{"max_tokens": 60, "temperature": 0} | more)
    for i, choice in enumerate(whole["choices"]):
        own = [each["choices"][0] for each in told
               if each["choices"] and each["choices"][0]["index"] == i]  # fmt: skip
        content = "".join(each["delta"].get("content", "") for each in own)
        assert content == choice["message"]["content"]
        if "logprobs" in more:
            figures = [each["logprobs"]["content"] for each in own if each["logprobs"]]
            assert sum(len(each) for each in figures) == 60
            assert not past
