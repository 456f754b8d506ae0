"""A server on a free port of this machine, over models that a test brings."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import uvicorn
from starlette.middleware import Middleware
from starlette.routing import BaseRoute

from edgeroute import Runtime
from edgeroute.server.app import make_app
from edgeroute.server.connection import Connection
from edgeroute.server.errors import ApiError
from edgeroute.server.records import ModelFacts, Services


class OneModel:
    """The `Models` protocol over one Runtime that is always open."""

    def __init__(self, runtime: Runtime, name: str = "base") -> None:
        self.runtime, self.name = runtime, name
        self.n_broken = 0

    @property
    def names(self) -> Sequence[str]:
        return [self.name]

    def facts(self, name: str) -> ModelFacts:
        self._check(name)
        params = self.runtime.params
        return ModelFacts(name=name, state="open", created=1_700_000_000, n_ctx=params.n_ctx,
                          n_bytes=int(self.runtime.stats()["memory_bytes"]),  # type: ignore[call-overload]
                          adapters=tuple(self.runtime.adapters))  # fmt: skip

    @contextlib.asynccontextmanager
    async def use(
        self, name: str, *, deadline: float, counts: bool = True
    ) -> AsyncIterator["OneModel"]:
        self._check(name)
        yield self

    def broke(self) -> None:
        self.n_broken += 1

    async def load(self, name: str) -> None:
        self._check(name)

    async def unload(self, name: str) -> None:
        self._check(name)
        raise ApiError(409, "this one stays")

    def peek(self, name: str) -> Runtime | None:
        return self.runtime

    def snapshot(self) -> Mapping[str, Any]:
        stats = self.runtime.stats()
        return {"budget_bytes": stats["budget_bytes"], "used_bytes": stats["memory_bytes"],
                "models": [{"name": self.name, "state": "open"}]}  # fmt: skip

    def _check(self, name: str) -> None:
        if name != self.name:
            raise ApiError(404, f"there is no model {name!r:.80}", code="model_not_found")


@contextlib.contextmanager
def serving(
    services: Services,
    routes: Sequence[BaseRoute],
    guards: Sequence[Middleware] = (),
    wire: type[asyncio.Protocol] = Connection,
) -> Iterator[str]:
    """Serve on a free port until the block ends; gives `http://127.0.0.1:PORT`."""
    config = uvicorn.Config(
        make_app(services, routes, guards), host="127.0.0.1", port=0, log_level="warning",
        ws="none", http=wire, timeout_graceful_shutdown=2,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive(), "the server did not stop"
