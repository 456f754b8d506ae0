"""What lends a device to a network: exact limits, one client at a time, and none ends it."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator

import pytest

from edgeroute.runtime import rpc_engine, rpc_front, rpc_link, rpc_wire
from edgeroute.runtime import rpc_frames as frames
from edgeroute.runtime.errors import DeviceLostError, LibraryError
from edgeroute.runtime.ggml.api import ggml
from edgeroute.runtime.rpc_engine import EngineParams, RpcEngine
from edgeroute.runtime.rpc_front import Lent, RpcFront
from edgeroute.runtime.rpc_link import RpcLink
from tests.runtime import rpc_lab as lab
from tests.runtime.rpc_lab import Client, until

LIMIT = 1 << 20
pytestmark = pytest.mark.skipif(
    ggml().ggml_backend_reg_by_name(b"RPC") is None, reason="this ggml is built without RPC"
)


class Lender:
    """A front on a loopback port, and what it reported."""

    def __init__(self) -> None:
        self.said: list[str] = []
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        self.engine = RpcEngine(EngineParams())
        self.front = RpcFront(listener, self.engine, Lent(memory_bytes=LIMIT), self.said.append)
        self.thread = threading.Thread(target=self.front.serve)
        self.thread.start()

    def client(self, hello: bool = True) -> "lab.Client":
        return Client(self.address, hello)

    def close(self) -> None:
        self.front.close()
        self.thread.join(lab.GUARD_S)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def lender() -> Iterator[Lender]:
    found = Lender()
    yield found
    found.close()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc_wire, "TICK_S", 0.02)
    monkeypatch.setattr(rpc_engine, "HELLO_S", 0.5)
    monkeypatch.setattr(rpc_link, "BUSY_S", 0.1)


def allocate(client: "lab.Client", n_bytes: int) -> int:
    pointer, _ = frames.PAIR.unpack(client.ask(frames.ALLOC_BUFFER, frames.ALLOC.pack(0, n_bytes)))
    return int(pointer)


def free_bytes(client: "lab.Client") -> int:
    free, total = frames.PAIR.unpack(client.ask(frames.GET_DEVICE_MEMORY, bytes(4)))
    assert total == LIMIT
    return int(free)


def test_the_limit_is_exact_and_what_is_freed_can_be_had_again(lender: Lender) -> None:
    with lender.client() as client:
        assert client.version[:3] == bytes(frames.VERSION)
        first = allocate(client, LIMIT - 1000)
        assert first and free_bytes(client) == 1000
        assert allocate(client, 1001) == 0 and free_bytes(client) == 1000
        second = allocate(client, 1000)
        assert second and free_bytes(client) == 0 and allocate(client, 1) == 0
        client.tell(frames.FREE_BUFFER, frames.SIZE.pack(first))
        assert free_bytes(client) == LIMIT - 1000
        assert allocate(client, LIMIT - 1000)
        assert allocate(client, 1 << 63) == 0


def test_who_leaves_leaves_nothing_behind(lender: Lender) -> None:
    for _ in range(3):
        with lender.client() as client:
            assert free_bytes(client) == LIMIT
            assert allocate(client, LIMIT)
            client.tell(frames.GET_ALIGNMENT, bytes(4))  # and is not there for the answer
    assert any("held 1 MiB at most" in line for line in lender.said)


def test_a_second_client_is_refused_and_told_why(lender: Lender) -> None:
    with lender.client() as client:
        with lender.client() as second:
            assert second.version == bytes(4) + frames.BUSY
            assert second.ends()
        with pytest.raises(DeviceLostError, match="is busy with another client; it takes one"):
            RpcLink.open(lender.address)
        assert free_bytes(client) == LIMIT
    with RpcLink.open(lender.address) as link:
        link.check()


BAD_FIRST = {
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "no hello": frames.request(frames.DEVICE_COUNT),
    "huge hello": frames.HEAD.pack(frames.HELLO, 1 << 60),
}
BAD_LATER = {
    "unknown": frames.HEAD.pack(18, 0),
    "unknown too": frames.HEAD.pack(255, 1 << 63),
    "hello again": frames.request(frames.HELLO, bytes(24)),
    "long": frames.HEAD.pack(frames.GET_ALIGNMENT, 5) + bytes(5),
    "huge": frames.HEAD.pack(frames.FREE_BUFFER, (1 << 64) - 1),
    "huge graph": frames.HEAD.pack(frames.GRAPH_COMPUTE, 1 << 62),
    "graph of wrong counts": frames.request(
        frames.GRAPH_COMPUTE, bytes(4) + b"\xff" * 4 + bytes(300)
    ),
    "large graph of wrong counts": frames.request(
        frames.GRAPH_COMPUTE, bytes(4) + b"\xff" * 4 + bytes(1 << 19)
    ),
    "upload into nothing": frames.HEAD.pack(frames.SET_TENSOR, 305 + (1 << 30)) + bytes(305),
    "small upload into nothing": frames.request(frames.SET_TENSOR, lab.set_tensor(b"1")),
    "download of nothing": frames.request(frames.GET_TENSOR, lab.get_tensor(1 << 40)),
    "free of nothing": frames.request(frames.FREE_BUFFER, frames.SIZE.pack(4096)),
    "clear of nothing": frames.request(frames.BUFFER_CLEAR, frames.SIZE.pack(4096) + b"\1"),
    "another device": frames.request(frames.GET_ALIGNMENT, frames.U32.pack(1)),
    "kept graph of nothing": frames.request(frames.USE_GRAPH, frames.U32.pack(7)),
    "slot beyond the last": frames.request(frames.KEEP_GRAPH, frames.U32.pack(512) + lab.graph()),
    "kept graph of wrong counts": frames.request(
        frames.KEEP_GRAPH, bytes(8) + b"\xff" * 4 + bytes(300)
    ),
    "graph of nothing": frames.request(frames.GRAPH_RECOMPUTE, bytes(4)),
}


@pytest.mark.parametrize("name", [*BAD_FIRST, *BAD_LATER])
def test_a_hostile_frame_ends_that_client_only(lender: Lender, name: str) -> None:
    with lender.client(hello=name in BAD_LATER) as client:
        with contextlib.suppress(ConnectionError):  # it may have heard enough before the end
            client.sock.sendall((BAD_FIRST | BAD_LATER)[name])
        assert client.ends()
    with lender.client() as client:
        assert free_bytes(client) == LIMIT


def test_what_ends_ggml_ends_that_client_only(lender: Lender) -> None:
    """A tensor before its buffer's start: ggml ends its process."""
    before = lender.engine.pid
    with lender.client() as client:
        pointer = allocate(client, 4096)
        head = bytearray(lab.set_tensor(bytes(16)))
        head[12:20] = frames.SIZE.pack(pointer)
        head[20:36] = frames.U32.pack(4) * 4
        at = 8 + 4 + 8 + 32 + 4 + 64 + 4 + 80 + 16
        head[at : at + 8] = frames.SIZE.pack(64)
        client.tell(frames.SET_TENSOR, bytes(head))
        assert client.ends()
    assert until(lambda: "signal" in lender.said[-1])
    with lender.client() as client:
        assert free_bytes(client) == LIMIT and allocate(client, LIMIT)
    assert lender.engine.pid != before


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGSTOP")
def test_who_leaves_a_long_computation_does_not_keep_the_next_waiting(lender: Lender) -> None:
    with lender.client() as client:
        assert allocate(client, 4096)
        os.kill(lender.engine.pid, signal.SIGSTOP)  # as busy as can be
        client.tell(frames.GET_ALIGNMENT, bytes(4))
    with lender.client() as client:
        assert free_bytes(client) == LIMIT


def test_a_client_that_says_nothing_is_not_waited_for(
    lender: Lender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc_front, "GREET_S", 0.05)
    with lender.client(hello=False) as silent:
        assert silent.ends()
    with lender.client() as client:
        assert free_bytes(client) == LIMIT


def test_a_device_that_is_not_there_is_refused() -> None:
    with (
        RpcEngine(EngineParams(device="warp9")) as engine,
        pytest.raises(LibraryError, match="there is no device 'warp9' here; ggml offers: CPU"),
    ):
        engine.connect()
