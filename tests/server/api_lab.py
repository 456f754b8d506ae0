"""The OpenAI-compatible endpoints over one Runtime, and readers of what they send."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2

from edgeroute import Runtime
from edgeroute.server.api import routes
from edgeroute.server.records import Job, ServerParams, Services
from tests.server.lab import OneModel, serving

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "hello there"}]}


@dataclass
class Watcher:
    """An observer that keeps what it is told."""

    begun: list[Job] = field(default_factory=list)
    over: list[Job] = field(default_factory=list)
    tokens: list[tuple[str, int, float]] = field(default_factory=list)

    def began(self, job: Job) -> None:
        self.begun.append(job)

    def token(self, job: Job, n_tokens: int, seconds: float) -> None:
        self.tokens.append((job.id, n_tokens, seconds))

    def ended(self, job: Job) -> None:
        self.over.append(job)


class SlowModel(OneModel):
    """A model that takes `delay_s` to open."""

    delay_s = 0.0

    @contextlib.asynccontextmanager
    async def use(
        self, name: str, *, deadline: float, counts: bool = True
    ) -> AsyncIterator[OneModel]:
        await asyncio.sleep(self.delay_s)
        async with super().use(name, deadline=deadline) as found:
            yield found


@dataclass
class Api:
    """A running server."""

    url: str
    client: httpx2.Client
    models: SlowModel
    watcher: Watcher
    runtime: Runtime

    def post(self, path: str, body: object) -> httpx2.Response:
        return self.client.post(path, json=body)

    def chat(self, **body: Any) -> dict[str, Any]:
        return _ok(self.post(CHAT, HELLO | body))

    def complete(self, **body: Any) -> dict[str, Any]:
        # Greedy: a random model's answer never ends by chance then.
        return _ok(self.post(COMPLETIONS, {"prompt": "hello there", "temperature": 0} | body))

    def refused(self, path: str, body: object, status: int = 400) -> dict[str, Any]:
        answer = self.post(path, body)
        assert answer.status_code == status, answer.text
        told = answer.json()["error"]
        assert set(told) == {"message", "type", "param", "code"}
        return dict(told)

    def last_job(self) -> Job:
        """The record of the request before; it ends a moment after the client has its answer."""
        wait_until(lambda: len(self.watcher.over) == len(self.watcher.begun))
        return self.watcher.over[-1]

    def rests(self) -> bool:
        """Whether no request is anywhere and all cells are free or kept."""
        found = self.runtime.stats()
        cells = found["kv_free_cells"] + found["kv_kept_cells"]  # type: ignore[operator]
        nobody = not found["running"] and not found["waiting"]
        return nobody and cells == found["kv_cells"]


@contextlib.contextmanager
def api(runtime: Runtime, **params: Any) -> Iterator[Api]:
    watcher, models = Watcher(), SlowModel(runtime)
    services = Services(params=ServerParams(**params), models=models, observers=(watcher,))
    with (
        serving(services, routes(services)) as url,
        httpx2.Client(base_url=url, timeout=60.0) as client,
    ):
        yield Api(url, client, models, watcher, runtime)


@contextlib.contextmanager
def held(runtime: Runtime) -> Iterator[None]:
    """Keep an engine from computing until the block ends."""
    begun, go = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        go.wait(60)

    thread = threading.Thread(target=runtime._engine.order, args=(hold,))
    thread.start()
    assert begun.wait(60)
    try:
        yield
    finally:
        go.set()
        thread.join(60)


def wait_until(done: Callable[[], bool]) -> None:
    """Wait for what must happen at once, on however busy a machine."""
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream that ended properly, without its last one."""
    pieces = text.split("\n\n")
    assert pieces.pop() == ""
    assert pieces.pop() == "data: [DONE]"
    told = [piece for piece in pieces if not piece.startswith(":")]
    assert all(piece.startswith("data: ") for piece in told)
    return [json.loads(piece.removeprefix("data: ")) for piece in told]


def choice(told: list[dict[str, Any]], index: int = 0) -> list[dict[str, Any]]:
    """What a stream says of one choice."""
    found = [each for event in told for each in event["choices"]]
    return [each for each in found if each["index"] == index]


def chat_text(told: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(each["delta"].get("content") or "" for each in choice(told, index))


def _ok(answer: httpx2.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return dict(answer.json())
