"""A scripted RPC server, and a client that speaks frames as ggml's does."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from edgeroute.runtime import rpc_frames as frames

GUARD_S = 60.0
"""Far longer than anything here takes: a test that hangs fails in place of hanging."""


def receive(sock: socket.socket, n: int) -> bytes:
    """Receive exactly n bytes."""
    found = bytearray()
    while len(found) < n:
        piece = sock.recv(n - len(found))
        if not piece:
            raise EOFError(f"{len(found)} of {n} bytes, then the end")
        found += piece
    return bytes(found)


def tensor(n_bytes_at_end: bytes = b"") -> bytes:
    """A serialised tensor of zeros, and what follows it."""
    return bytes(frames.TENSOR_BYTES) + n_bytes_at_end


def get_tensor(n_bytes: int) -> bytes:
    """What a GET_TENSOR carries."""
    return tensor(frames.PAIR.pack(0, n_bytes))


def set_tensor(data: bytes) -> bytes:
    """What a SET_TENSOR carries."""
    return tensor(bytes(9)) + data


def graph(device: int = 0, filler: int = 0) -> bytes:
    """What a GRAPH_COMPUTE of one node carries."""
    head = frames.U32.pack(device) + frames.U32.pack(1) + bytes(8) + frames.U32.pack(1)
    return head + bytes([filler]) * frames.TENSOR_BYTES


@dataclass
class FakeServer:
    """What it answers, by command: bytes as they go over the wire, or a function of the payload.

    None in their place closes the connection; an empty answer keeps the client waiting.
    """

    answers: dict[int, bytes | Callable[[bytes], bytes] | None] = field(default_factory=dict)
    seen: list[tuple[int, bytes]] = field(default_factory=list)
    n_clients: int = 0
    n_ended: int = 0
    after: dict[int, bytes] = field(default_factory=dict)  # said unasked after a command
    address: str = ""

    def answer(self, command: int, payload: bytes) -> bytes | None:
        if command in self.answers:
            given = self.answers[command]
            return given(payload) if callable(given) else given
        if command >= len(frames.COMMANDS):  # our own, which have no answer
            return b""
        if command == frames.GET_TENSOR:
            n = frames.SIZE.unpack(payload[-8:])[0]
            return frames.answer(bytes(i % 251 for i in range(n)))
        good = {
            frames.HELLO: frames.hello_answer(frames.VERSION),
            frames.DEVICE_COUNT: frames.answer(frames.U32.pack(2)),
            frames.GET_ALIGNMENT: frames.answer(frames.SIZE.pack(32)),
            frames.GET_MAX_SIZE: frames.answer(frames.SIZE.pack(1 << 62)),
            frames.GET_DEVICE_MEMORY: frames.answer(frames.PAIR.pack(1000, 2000)),
            frames.ALLOC_BUFFER: frames.answer(frames.PAIR.pack(77, 4096)),
        }
        if command in good:
            return good[command]
        n_bytes = frames.COMMANDS[command].answer_bytes
        return b"" if n_bytes is None else frames.answer(b"\1".ljust(n_bytes, b"\0"))

    def _client(self, sock: socket.socket) -> None:
        while True:
            command, n = frames.HEAD.unpack(receive(sock, 9))
            payload = receive(sock, n)
            self.seen.append((command, payload))
            answer = self.answer(command, payload)
            if answer is None:
                return
            sock.sendall(answer + self.after.get(command, b""))

    def run(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            self.n_clients += 1
            with sock, contextlib.suppress(EOFError, OSError):
                self._client(sock)
            self.n_ended += 1

    def commands(self) -> list[int]:
        """What it was asked since the handshake."""
        return [c for c, _ in self.seen if c not in (frames.HELLO, frames.DEVICE_COUNT)]


@contextlib.contextmanager
def fake_server(**given: object) -> Iterator[FakeServer]:
    """Run a scripted server on a loopback port until the block ends."""
    server = FakeServer(**given)  # type: ignore[arg-type]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server.address = f"127.0.0.1:{listener.getsockname()[1]}"
        threading.Thread(target=server.run, args=(listener,), daemon=True).start()
        yield server
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)


class Client:
    """A connection as ggml's client has one."""

    def __init__(self, address: str, hello: bool = True) -> None:
        host, _, port = address.rpartition(":")
        self.sock = socket.create_connection((host, int(port)), timeout=GUARD_S)
        if hello:
            self.version = self.ask(frames.HELLO, bytes(frames.CAPS_BYTES))

    def tell(self, command: int, payload: bytes = b"") -> None:
        """Send a request."""
        self.sock.sendall(frames.request(command, payload))

    def ask(self, command: int, payload: bytes = b"") -> bytes:
        """Send a request and return its answer."""
        self.tell(command, payload)
        (n,) = frames.SIZE.unpack(receive(self.sock, 8))
        return receive(self.sock, n)

    def ends(self) -> bool:
        """Whether the other end closes the connection, now or soon."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionError:
            return True

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


def until(condition: Callable[[], object]) -> bool:
    """Wait until something is so; False after far longer than it may take."""
    end = time.monotonic() + GUARD_S
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True
