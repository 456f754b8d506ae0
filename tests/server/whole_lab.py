"""The whole server over one tiny model, as `edgeroute serve` builds it, and what requests leave."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from edgeroute.server.records import ServerParams
from edgeroute.server.serve import Built, Server, build, listen, urls
from tests.server.api_lab import CHAT, HELLO, wait_until
from tests.server.fleet_lab import shelf_model

KEY = "a-key-for-tests"
SETTLE_S = 60.0


@dataclass
class Whole:
    """A running server with one model, `base`."""

    url: str
    client: httpx2.Client
    built: Built

    def post(self, path: str, body: object) -> httpx2.Response:
        return self.client.post(path, json=body)

    def send(self, path: str, raw: bytes) -> httpx2.Response:
        """Post bytes as they are."""
        return self.client.post(path, content=raw, headers={"content-type": "application/json"})

    def check(self) -> None:
        """Nothing is left over of any request, and a normal one works, in the same engine."""
        before = self.built.fleet.peek("base")
        wait_until(self._rests)
        answer = self.post(CHAT, HELLO | {"max_tokens": 2})
        assert answer.status_code == 200, answer.text
        wait_until(self._rests)
        assert self.built.fleet.peek("base") is before, "the engine was opened anew"

    def _rests(self) -> bool:
        runtime = self.built.fleet.peek("base")
        if runtime is None:
            return False
        found: dict[str, Any] = runtime.stats()
        cells = found["kv_free_cells"] + found["kv_kept_cells"]
        nobody = not found["running"] and not found["waiting"]
        busy = self.built.fleet.facts("base").n_busy
        return nobody and cells == found["kv_cells"] and not busy


@contextlib.contextmanager
def whole(path: Path, sessions: Path, **params: Any) -> Iterator[Whole]:
    """Serve a model file with all that `edgeroute serve` has; saved sessions go to a folder."""
    given = ServerParams(**({
        "api_keys": (KEY,), "max_tokens": 24, "memory": 1 << 30, "sessions": sessions,
    } | params))  # fmt: skip
    built = build(given, [shelf_model("base", path, n_kv=2048)])
    sockets, ready = listen("127.0.0.1", 0), threading.Event()
    server = Server(built, ready.set)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve_with_care(sockets)))
    (url,) = urls(sockets)
    thread.start()
    try:
        assert ready.wait(SETTLE_S)
        head = {"authorization": f"Bearer {KEY}"} if given.api_keys else {}
        with httpx2.Client(base_url=url, timeout=60.0, headers=head) as client:
            assert client.post(CHAT, json=HELLO | {"max_tokens": 1}).status_code == 200
            yield Whole(url, client, built)
    finally:
        server.should_exit = True
        thread.join(SETTLE_S)
        assert built.fleet.close(20)
