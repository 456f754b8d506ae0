"""A local OpenAI-compatible server whose faults are at the test's command."""

import contextlib
import itertools
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, Self

Answer = Callable[[dict[str, Any]], Iterable[str]]
"""Makes the texts of an answer, a token each, from a request's body."""

GARBAGE = b"<html>\x00\xff\r\n\r\ndata: {]\n\n"
_TICK_S = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A request as it came. Names of headers are lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What is sent instead of an answer, as it stands; `hold` keeps the connection open then."""

    status: int = 200
    kind: str = "text/event-stream"
    body: Iterable[bytes] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    hold: bool = False


class RemoteServer:
    """Serves `answer` at `/v1/completions`, `/v1/chat/completions` and `/v1/models`.

    `kill`, `slow` and `garbage` take effect in every answer once it has `after` texts, at once
    for `after=0`, be it under way or not; `heal` ends the latter two.

    Args:
        answer: its texts are sent one event each, at most as many as `max_tokens` asks for.
        latency_s: before a reply begins.
        token_s: before each text.
        model: the one it lists.
        key: requests without it get 401.
        refuses: fields that are answered by 400.
        reply: what to send instead, where it is not None.

    Attributes:
        seen: all requests so far.
        n_connections: accepted so far.
        n_cancelled: answers whose reader left before their end.
    """

    def __init__(
        self,
        answer: Answer = lambda body: (),
        *,
        latency_s: float = 0.0,
        token_s: float = 0.0,
        model: str = "big",
        key: str | None = None,
        refuses: Iterable[str] = (),
        reply: Callable[[Seen], Reply | None] = lambda seen: None,
    ) -> None:
        self.answer, self.reply = answer, reply
        self.latency_s, self.token_s = latency_s, token_s
        self.model, self.key, self.refuses = model, key, frozenset(refuses)
        self.seen: list[Seen] = []
        self.n_connections = 0
        self.n_cancelled = 0
        self._fault: tuple[Literal["kill", "slow", "garbage"], int] | None = None
        self._over = threading.Event()
        self._connections: set[socket.socket] = set()
        self._http = _Http(("127.0.0.1", 0), _Handler)
        self._http.owner = self
        self._thread = threading.Thread(target=self._http.serve_forever, args=(_TICK_S,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._end()
        self._thread.join()

    @property
    def host(self) -> str:
        """`127.0.0.1:PORT`."""
        return f"127.0.0.1:{self._http.server_port}"

    @property
    def remote(self) -> str:
        """The setting `remote=`, without a model's name."""
        return f"http://{self.host}/v1"

    def kill(self, after: int = 0) -> None:
        """Close all connections and the port; later calls are refused."""
        self._fault = ("kill", after)
        if after == 0:
            self._end()

    def slow(self, after: int = 0) -> None:
        """Send nothing more, and keep connections open."""
        self._fault = ("slow", after)

    def garbage(self, after: int = 0) -> None:
        """Send bytes that are no answer."""
        self._fault = ("garbage", after)

    def heal(self) -> None:
        """Answer well again."""
        self._fault = None

    def wait(self, condition: Callable[[Self], bool], timeout_s: float = 30.0) -> bool:
        """Wait until a condition on this server holds; return whether it does."""
        end_s = time.monotonic() + timeout_s
        while not condition(self):
            if time.monotonic() > end_s:
                return False
            time.sleep(_TICK_S)
        return True

    @property
    def is_over(self) -> bool:
        """Whether it was killed or closed."""
        return self._over.is_set()

    # What follows is for the handler, in a thread for each connection.

    def pause(self, connection: socket.socket, seconds: float) -> bool:
        """Wait; return False at once if the reader or the server left."""
        end_s = time.monotonic() + seconds
        while not self._over.is_set():
            if select.select([connection], [], [], 0)[0]:
                try:
                    if not connection.recv(1, socket.MSG_PEEK):
                        return False
                except OSError:
                    return False
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                return True
            self._over.wait(min(left_s, _TICK_S))
        return False

    def texts(self, body: dict[str, Any]) -> Iterator[str | bytes]:
        """An answer's texts, and what faults send as it stands: b"" is silence from then on."""
        n_sent = 0
        for text in itertools.islice(self.answer(body), body.get("max_tokens")):
            if (fault := self._due(n_sent)) is not None:
                yield fault
            yield text
            n_sent += 1
        if (fault := self._due(n_sent)) is not None:
            yield fault

    def _due(self, n_sent: int) -> bytes | None:
        """What a fault sends after so many texts; None while there is none."""
        if self._fault is None or n_sent < self._fault[1]:
            return None
        kind = self._fault[0]
        if kind == "kill":
            self._end()
        return GARBAGE if kind == "garbage" else b""

    def _end(self) -> None:
        if self._over.is_set():
            return
        self._over.set()
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):  # the reader left first
                connection.shutdown(socket.SHUT_RDWR)

    def opened(self, connection: socket.socket) -> None:
        """Note a connection."""
        self.n_connections += 1
        self._connections.add(connection)

    def closed(self, connection: socket.socket) -> None:
        """Forget a connection."""
        self._connections.discard(connection)


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    owner: RemoteServer

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: readers that leave are what is tested."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or a reader's late acknowledgements add 40 ms
    server: _Http

    def setup(self) -> None:
        super().setup()
        self.server.owner.opened(self.connection)

    def finish(self) -> None:
        self.server.owner.closed(self.connection)
        super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._serve({})

    def do_POST(self) -> None:
        self._serve(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def _serve(self, body: dict[str, Any]) -> None:
        owner = self.server.owner
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = Seen(method=self.command, path=self.path, headers=headers, body=body)
        owner.seen.append(seen)
        if not owner.pause(self.connection, owner.latency_s):
            self._left()
            return
        if (reply := owner.reply(seen)) is not None:
            self._send(reply)
        elif owner.key is not None and headers.get("authorization") != f"Bearer {owner.key}":
            self._refuse(401, f"Incorrect API key provided: {headers.get('authorization')}")
        elif refused := sorted(owner.refuses & body.keys()):
            self._refuse(400, f"Unrecognized request argument supplied: {refused[0]}")
        elif self.path == "/v1/models":
            listed = json.dumps({"object": "list", "data": [{"id": owner.model}]}).encode()
            self._send(Reply(kind="application/json", body=(listed,)))
        elif self.path in ("/v1/completions", "/v1/chat/completions"):
            self._stream(body)
        else:
            self._refuse(404, f"no such path: {self.path}")

    def _refuse(self, status: int, message: str) -> None:
        raw = json.dumps({"error": {"message": message, "type": "invalid_request_error"}}).encode()
        self._send(Reply(status=status, kind="application/json", body=(raw,)))

    def _send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        self.send_header("content-type", reply.kind)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        for part in reply.body:
            self.wfile.write(part)
            self.wfile.flush()
        if reply.hold and not self.server.owner.pause(self.connection, 600):
            self._left()

    def _stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        owner, chat, n_sent = self.server.owner, self.path.endswith("/chat/completions"), 0
        for text in owner.texts(body):
            silent = text == b""
            if not owner.pause(self.connection, 600 if silent else owner.token_s) or silent:
                self._left()
                return
            self._chunk(text if isinstance(text, bytes) else event(text, None, chat))
            n_sent += 1
        cut = n_sent >= body.get("max_tokens", 1 << 30)
        self._chunk(event("", "length" if cut else "stop", chat))
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _chunk(self, raw: bytes) -> None:
        try:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(raw), raw))
            self.wfile.flush()
        except OSError:
            self._left()
            raise

    def _left(self) -> None:
        self.server.owner.n_cancelled += not self.server.owner.is_over
        self.close_connection = True


def event(text: str | None, reason: str | None = None, chat: bool = False) -> bytes:
    """One chunk of an answer, as these servers send it."""
    holder: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
    choice = {"index": 0, "logprobs": None, "finish_reason": reason, **holder}
    event = {"id": "c-1", "created": 1, "model": "big", "choices": [choice]}
    return b"data: " + json.dumps(event).encode() + b"\n\n"
