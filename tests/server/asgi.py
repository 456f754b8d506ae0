"""An ASGI application asked without a network: every header and every piece as a test wants it."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message

from edgeroute.server.app import make_app
from edgeroute.server.guard import Patience, guards
from edgeroute.server.guard import Told as Told
from edgeroute.server.records import ServerParams, Services

Header = tuple[str, str]
HOST: Header = ("host", "localhost:8080")
JSON: Header = ("content-type", "application/json")


@dataclass
class Reply:
    """What came back; `pieces` are the bodies of its messages, `whole` whether it ended."""

    status: int = 0
    headers: list[Header] = field(default_factory=list)
    pieces: list[bytes] = field(default_factory=list)
    whole: bool = False

    def __getitem__(self, name: str) -> str:
        (value,) = [value for key, value in self.headers if key == name]
        return value

    def has(self, name: str) -> bool:
        return any(key == name for key, _ in self.headers)

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def error(self) -> dict[str, Any]:
        told = json.loads(self.body)["error"]
        assert set(told) == {"message", "type", "param", "code"}
        assert isinstance(told["message"], str)
        return dict(told)


@dataclass
class Ask:
    """One request. A piece that is a number is a pause in seconds; the client leaves at None."""

    method: str = "GET"
    path: str = "/v1/models"
    headers: Sequence[Header] = (HOST,)
    pieces: Sequence[bytes | float | None] = ()
    query: bytes = b""
    scheme: str = "http"

    async def __call__(self, app: ASGIApp) -> Reply:
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in self.headers]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "state": {},
            "method": self.method, "path": self.path, "raw_path": self.path.encode(),
            "query_string": self.query, "scheme": self.scheme, "root_path": "",
            "headers": raw, "client": ("127.0.0.1", 5000), "server": ("127.0.0.1", 8080),
        }  # fmt: skip
        waiting, reply = list(self.pieces) or [b""], Reply()
        n_left = sum(isinstance(piece, bytes) for piece in waiting)

        async def receive() -> Message:
            nonlocal n_left
            while waiting:
                piece = waiting.pop(0)
                if isinstance(piece, float):
                    await asyncio.sleep(piece)
                elif piece is None:
                    return {"type": "http.disconnect"}
                else:
                    n_left -= 1
                    more = bool(n_left) or None in waiting
                    return {"type": "http.request", "body": piece, "more_body": more}
            if reply.whole:
                return {"type": "http.disconnect"}
            await asyncio.sleep(3600)
            raise AssertionError

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                assert not reply.status, "two answers"
                reply.status = message["status"]
                reply.headers = [(k.decode(), v.decode("latin-1")) for k, v in message["headers"]]
            else:
                assert not reply.whole, "more after the end"
                reply.pieces.append(message.get("body", b""))
                reply.whole = not message.get("more_body", False)

        await app(scope, receive, send)
        return reply


def post(*pieces: bytes | float | None, path: str = "/echo", more: Sequence[Header] = ()) -> Ask:
    """Return a POST of JSON that comes in pieces."""
    headers = [HOST, JSON, ("transfer-encoding", "chunked"), *more]
    return Ask(method="POST", path=path, headers=headers, pieces=pieces)


def guarded(
    params: ServerParams, *routes: Any, told: Told | None = None, patience: Patience | None = None
) -> ASGIApp:
    """Return an application of some routes behind the guards."""
    services = Services(params=params, models=None)  # type: ignore[arg-type]
    return make_app(services, routes, guards(params, told, patience))


def answer(app: ASGIApp, ask: Ask) -> Reply:
    """Ask once, in an event loop of its own."""
    return asyncio.run(ask(app))
