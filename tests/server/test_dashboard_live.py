"""The stream of snapshots: one sampler for all, bounded, nothing queued, nothing left behind."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import httpx2
import pytest

from edgeroute.runtime.errors import ClosedError
from edgeroute.server import live as live_module
from edgeroute.server.errors import ApiError
from edgeroute.server.live import Live, LiveResponse, routes
from edgeroute.server.records import ServerParams, Services
from tests.server import lab

STALL_S = 30.0
PLAIN: dict[str, Any] = {
    "arch": "llama", "budget_bytes": 100, "memory_bytes": 60, "memory": {"weights": 60},
    "kv_cells": 512, "kv_free_cells": 512, "kv_kept_cells": 0, "reused_cells": 0, "running": 0,
    "waiting": 0, "finished": 0, "decode_steps": 0, "mean_batch": 0.0, "threads": 1,
    "threads_max": 2,
}  # fmt: skip


class FakeRuntime:
    """What a snapshot reads of a Runtime."""

    def __init__(self) -> None:
        self.n_read = 0
        self.bitmap = "3"
        self.before: Callable[[], None] = lambda: None

    def stats(self) -> dict[str, Any]:
        self.n_read += 1
        self.before()
        return PLAIN | {"decode_steps": self.n_read}

    def residency(self) -> dict[str, Any]:
        return {"experts": {"n_expert": 4, "layers": [[0, self.bitmap]], "leased": self.n_read}}


class FakeModels:
    """What a snapshot reads of Models."""

    def __init__(self, *names: str) -> None:
        self.runtimes = {name: FakeRuntime() for name in names or ("base",)}

    @property
    def names(self) -> Sequence[str]:
        return [*self.runtimes, "shut"]

    def peek(self, name: str) -> FakeRuntime | None:
        return self.runtimes.get(name)

    def snapshot(self) -> dict[str, Any]:
        return {"budget_bytes": 100, "used_bytes": 60,
                "models": [{"name": name, "state": "open"} for name in self.runtimes]}  # fmt: skip


def make_live(models: FakeModels, period_s: float = 0.01) -> Live:
    return Live(models, period_s=period_s)  # type: ignore[arg-type]


def services(live: Live, **params: Any) -> Services:
    return Services(params=ServerParams(**params), models=live._models, observers=(live,))


def parse(text: str) -> list[tuple[str, Any]]:
    """Events as (name, value); comments are left out."""
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n")
                     if line and not line.startswith(":"))  # fmt: skip
        if lines:
            found.append((lines["event"], json.loads(lines["data"])))
    return found


class Client:
    """One reader of the stream, at the ASGI interface; `hold` makes its connection full."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.status = 0
        self.over = False
        self.gone = asyncio.Event()
        self.free = asyncio.Event()
        self.free.set()

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        await self.free.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = dict(message["headers"])
        else:
            self.sent.append(message["body"])
            self.over = not message["more_body"]

    @property
    def events(self) -> list[tuple[str, Any]]:
        return parse(b"".join(self.sent).decode())

    def steps(self) -> list[int]:
        """The number of the reading, of each snapshot."""
        return [told["models"]["base"]["decode_steps"] for name, told in self.events
                if name == "snapshot"]  # fmt: skip

    @asynccontextmanager
    async def reading(self, live: Live, stall_s: float = STALL_S) -> AsyncIterator["Client"]:
        task = asyncio.create_task(
            LiveResponse(live, stall_s)({"type": "http"}, self.receive, self.send)  # type: ignore[arg-type]
        )
        try:
            yield self
        finally:
            self.gone.set()
            self.free.set()
            await asyncio.wait_for(task, 10)


async def until(true: Callable[[], bool]) -> None:
    for _ in range(2000):
        if true():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came")


def test_a_snapshot_has_the_figures_and_large_parts_come_only_when_they_changed() -> None:
    async def run() -> None:
        models = FakeModels()
        live = make_live(models)
        async with Client().reading(live) as client:
            await until(lambda: len(client.steps()) >= 3)
            names = [name for name, _ in client.events]
            assert names[:3] == ["snapshot", "jobs", "residency"]
            assert names.count("jobs") == names.count("residency") == 1
            models.runtimes["base"].bitmap = "9"
            await until(lambda: [name for name, _ in client.events].count("residency") == 2)
            told = [value for name, value in client.events if name == "residency"]
            assert told[-1] == {"model": "base", "residency": {
                "experts": {"n_expert": 4, "layers": [[0, "9"]]}}}  # fmt: skip
        assert client.headers[b"content-type"].startswith(b"text/event-stream")
        assert client.headers[b"cache-control"] == b"no-store"
        assert b"content-length" not in client.headers

    asyncio.run(run())


def test_all_listeners_share_one_sampler_which_ends_with_the_last() -> None:
    async def run() -> None:
        models = FakeModels()
        live = make_live(models)
        assert not live.sampling
        async with asyncio.TaskGroup() as group:
            clients = [Client() for _ in range(20)]
            done = asyncio.Event()

            async def listen(client: Client) -> None:
                async with client.reading(live):
                    await done.wait()

            for client in clients:
                group.create_task(listen(client))
            await until(lambda: all(len(each.steps()) >= 3 for each in clients))
            assert live.n_listeners == 20
            samplers = [each for each in asyncio.all_tasks() if each.get_name() == "edgeroute-live"]
            assert len(samplers) == 1
            same = [set(each.steps()) for each in clients]
            assert len(set.intersection(*same)) >= 3  # the same readings, not one each
            done.set()
        assert live.n_listeners == 0 and not live.sampling
        n_read = models.runtimes["base"].n_read
        await asyncio.sleep(0.1)
        assert models.runtimes["base"].n_read <= n_read + 1
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())


def test_a_later_listener_gets_everything_at_once() -> None:
    async def run() -> None:
        live = make_live(FakeModels(), period_s=1000)
        async with Client().reading(live) as first:
            await until(lambda: bool(first.sent))
            async with Client().reading(live) as second:
                await until(lambda: bool(second.sent))
                assert second.sent == first.sent

    asyncio.run(run())


def test_a_slow_listener_skips_snapshots_and_holds_nobody_up() -> None:
    async def run() -> None:
        live = make_live(FakeModels())
        async with Client().reading(live) as slow, Client().reading(live) as quick:
            await until(lambda: bool(slow.steps()) and bool(quick.steps()))
            slow.free.clear()
            begun = len(quick.steps())
            await until(lambda: len(quick.steps()) >= begun + 20)
            slow.free.set()
            seen, newest = len(slow.steps()), max(quick.steps())
            await until(lambda: len(slow.steps()) >= seen + 2)
            # At most the one that was being sent is old.
            assert slow.steps()[seen + 1] >= newest

    asyncio.run(run())


def test_a_listener_that_takes_nothing_is_dropped() -> None:
    async def run() -> None:
        live = make_live(FakeModels())
        async with Client().reading(live, stall_s=0.05) as client:
            await until(lambda: bool(client.sent))
            client.free.clear()
            await until(lambda: live.n_listeners == 0)
        assert not live.sampling and not client.over

    asyncio.run(run())


def test_listeners_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_module, "MAX_LISTENERS", 2)
    live = make_live(FakeModels())
    with lab.serving(services(live), routes(services(live))) as base, ExitStack() as own:
        client = own.enter_context(httpx2.Client(base_url=base, timeout=20))
        for _ in range(2):
            stream = own.enter_context(client.stream("GET", "/edgeroute/live"))
            assert stream.status_code == 200
        refused = client.get("/edgeroute/live")
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "too_many_listeners"


def test_over_http_events_parse_and_a_disconnect_leaves_nothing() -> None:
    live = make_live(FakeModels())
    given = services(live)
    with lab.serving(given, routes(given)) as base, httpx2.Client(timeout=20) as client:
        assert client.head(f"{base}/edgeroute/live").status_code == 200
        with client.stream("GET", f"{base}/edgeroute/live") as stream:
            text = ""
            for piece in stream.iter_text():
                text += piece
                assert live.n_listeners == 1
                if text.count("event: snapshot") >= 4:
                    break
        told = parse(text[: text.rindex("\n\n") + 2])
        assert {name for name, _ in told} == {"snapshot", "jobs", "residency"}
        assert len(text) < 20_000
        for _ in range(1000):
            if live.n_listeners == 0:
                break
            time.sleep(0.01)
        assert live.n_listeners == 0 and not live.sampling


def test_the_end_of_the_server_ends_streams_properly() -> None:
    async def run() -> None:
        live = make_live(FakeModels(), period_s=1000)
        async with Client().reading(live) as client:
            await until(lambda: bool(client.sent))
            live.end()
            await until(lambda: client.over)
        with pytest.raises(ApiError, match="stopping"), live.listening():
            pass

    asyncio.run(run())


def assert_set(event: threading.Event) -> None:
    assert event.wait(10)


def test_a_long_reading_is_bridged_by_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_module, "HEARTBEAT_S", 0.02)
    go = threading.Event()

    async def run() -> None:
        models = FakeModels()
        models.runtimes["base"].before = lambda: assert_set(go)
        live = make_live(models)
        async with Client().reading(live) as client:
            await until(lambda: client.sent[:2] == [b": still here\n\n"] * 2)
            go.set()
            await until(lambda: bool(client.steps()))

    asyncio.run(run())


def test_a_model_that_closes_or_breaks_meanwhile_hides_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def close() -> None:
        raise ClosedError("this Runtime was closed; make a new one")

    def fail() -> None:
        raise RuntimeError("a bug")

    async def run() -> None:
        models = FakeModels("base", "closing", "broken")
        models.runtimes["closing"].before, models.runtimes["broken"].before = close, fail
        live = make_live(models)
        async with Client().reading(live) as client:
            await until(lambda: len(client.steps()) >= 3)
        assert set(client.events[0][1]["models"]) == {"base"}

    asyncio.run(run())
    assert [each.message for each in caplog.records] == [
        "the figures of model broken cannot be read"
    ]


def test_sampling_goes_on_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(live_module, "RETRY_S", 0.01)

    async def run() -> None:
        models = FakeModels()
        known = models.snapshot
        broken = [True]

        def snapshot() -> dict[str, Any]:
            if broken:
                broken.clear()
                raise RuntimeError("a bug")
            return known()

        models.snapshot = snapshot  # type: ignore[method-assign]
        live = make_live(models)
        async with Client().reading(live) as client:
            await until(lambda: bool(client.steps()))

    asyncio.run(run())
    assert "no snapshot could be taken" in caplog.text
