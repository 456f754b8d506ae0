"""The relay between ggml's RPC client and a server: whatever that does, ggml is answered."""

import socket
import sys
import threading
from collections.abc import Iterator

import pytest

from edgeroute.runtime import rpc_frames as frames
from edgeroute.runtime import rpc_link, rpc_peer, rpc_relay, rpc_shelf, rpc_wire
from edgeroute.runtime.errors import DeviceLostError, UsageError
from edgeroute.runtime.rpc_link import RpcLink
from edgeroute.runtime.rpc_throttle import Bucket
from edgeroute.runtime.rpc_wire import Wire, WireLostError, parse_silence
from tests.runtime import rpc_lab as lab
from tests.runtime.rpc_lab import Client, fake_server, until

ASKED = {
    frames.ALLOC_BUFFER: frames.ALLOC.pack(0, 4096),
    frames.GET_ALIGNMENT: bytes(4),
    frames.GET_MAX_SIZE: bytes(4),
    frames.BUFFER_GET_BASE: bytes(8),
    frames.SET_TENSOR_HASH: bytes(312),
    frames.GET_TENSOR: lab.get_tensor(1000),
    frames.COPY_TENSOR: bytes(592),
    frames.GET_DEVICE_MEMORY: bytes(4),
    frames.GET_ALLOC_SIZE: bytes(3260),
}
TOLD = {
    frames.FREE_BUFFER: bytes(8),
    frames.BUFFER_CLEAR: bytes(9),
    frames.SET_TENSOR: lab.set_tensor(b"x" * 100),
    frames.GRAPH_COMPUTE: lab.graph(),
    frames.INIT_TENSOR: bytes(296),
    frames.GRAPH_RECOMPUTE: bytes(4),
    frames.MEMSET_TENSOR: bytes(313),
}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc_wire, "TICK_S", 0.02)
    monkeypatch.setattr(rpc_link, "BUSY_S", 0.1)


@pytest.fixture
def server() -> Iterator["lab.FakeServer"]:
    with fake_server() as found:
        yield found


def size_of(command: int) -> int:
    """How long ggml wants the answer to be; any other ends its process."""
    return 1000 if command == frames.GET_TENSOR else frames.COMMANDS[command].answer_bytes or 0


def is_answered(client: "lab.Client") -> None:
    """Every command is answered in its size, with what ggml can live with."""
    for command, payload in TOLD.items():
        client.tell(command, payload)
    for command, payload in ASKED.items():
        answer = client.ask(command, payload)
        assert len(answer) == size_of(command), frames.COMMANDS[command].name
        if command in (frames.GET_ALIGNMENT, frames.GET_MAX_SIZE, frames.BUFFER_GET_BASE):
            assert any(answer)  # a null would end ggml's process
    assert client.ask(frames.DEVICE_COUNT) == frames.U32.pack(2)


HOSTILE = {
    "another protocol": (b"HTTP/1.1 400 Bad Request\r\n\r\n", "HELLO answered with"),
    "closed at once": (None, "closed the connection; it is no RPC server"),
    "silence": (b"", "gave no answer for 0.2 s"),
    "version 6": (frames.hello_answer((6, 0, 0)), "speaks version 6.0.0 .* this machine 7.0.0"),
    "newer": (frames.hello_answer((7, 1, 0)), "speaks version 7.1.0"),
    "other operations": (frames.hello_answer((7, 0, 1)), "speaks version 7.0.1"),
    "huge": (frames.SIZE.pack(1 << 60), "answered with 1152921504606846976 bytes"),
    "short": (frames.answer(b"\7\0\0"), "answered with 3 bytes, not 28"),
    "busy": (frames.hello_answer((0, 0, 0), frames.BUSY), "busy with another client; .* one at"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_server_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, message = HOSTILE[name]
    if name == "silence":  # elsewhere a busy machine may take its time
        monkeypatch.setattr(rpc_link, "CONNECT_S", 0.2)
    with (
        fake_server(answers={frames.HELLO: answer}) as server,
        pytest.raises(DeviceLostError, match=f"rpc:{server.address} .*{message}"),
    ):
        RpcLink.open(f"rpc:{server.address}")


@pytest.mark.parametrize("count", [0, 65, 0xFFFFFFFF])
def test_a_count_of_devices_that_cannot_be_is_refused(count: int) -> None:
    answers = {frames.DEVICE_COUNT: frames.answer(frames.U32.pack(count))}
    with (
        fake_server(answers=answers) as server,
        pytest.raises(DeviceLostError, match=f"offers {count} devices"),
    ):
        RpcLink.open(server.address)


def test_nobody_there_is_an_error_that_says_how_to_start_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(
        DeviceLostError, match=f"edgeroute rpc-server --host 127.0.0.1 --port {port}"
    ):
        RpcLink.open(f"rpc:127.0.0.1:{port}")


@pytest.mark.parametrize("text", ["rpc:", "rpc:host", "rpc:host:0", "rpc:host:65536", "a b:1"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no address of a device"):
        RpcLink.open(text)


def test_frames_pass_both_ways_unchanged(server: "lab.FakeServer") -> None:
    data = bytes(range(256)) * 5000 + b"the end"
    with RpcLink.open(server.address) as link, Client(link.endpoint) as client:
        assert client.version[:3] == bytes(frames.VERSION)
        client.tell(frames.SET_TENSOR, lab.set_tensor(data))
        n = 700_001
        assert client.ask(frames.GET_TENSOR, lab.get_tensor(n)) == bytes(i % 251 for i in range(n))
        assert client.ask(frames.GET_DEVICE_MEMORY, bytes(4)) == frames.PAIR.pack(1000, 2000)
        assert client.ask(frames.DEVICE_COUNT) == frames.U32.pack(2)
        assert link.lost is None and link.loopback_or_private
        assert server.seen[2:] == [
            (frames.SET_TENSOR, lab.set_tensor(data)),
            (frames.GET_TENSOR, lab.get_tensor(n)),
            (frames.GET_DEVICE_MEMORY, bytes(4)),
        ]
        stats = link.stats()
        assert stats.n_answers == 2 and stats.n_requests == 5
        handshake = 9 + 24 + 9, 8 + 28 + 8 + 4
        assert stats.bytes_out == handshake[0] + 9 + 305 + len(data) + 9 + 312 + 9 + 4
        assert stats.bytes_in == handshake[1] + 8 + n + 8 + 16


def test_ggml_may_leave_and_come_again(server: "lab.FakeServer") -> None:
    """It drops its connection with its last buffer; the server keeps ours."""
    with RpcLink.open(server.address) as link:
        for _ in range(5):
            with Client(link.endpoint) as client:
                assert client.ask(frames.GET_ALIGNMENT, bytes(4)) == frames.SIZE.pack(32)
        assert server.n_clients == 1 and link.lost is None


MALFORMED = {
    "short": (frames.GET_ALIGNMENT, frames.answer(b"1234"), "4 bytes, not 8"),
    "huge": (frames.GET_ALIGNMENT, frames.SIZE.pack(1 << 63), "bytes, not 8"),
    "alignment 0": (frames.GET_ALIGNMENT, frames.answer(bytes(8)), "answered 0"),
    "alignment 48": (frames.GET_ALIGNMENT, frames.answer(frames.SIZE.pack(48)), "power of two"),
    "alignment 2^40": (frames.GET_ALIGNMENT, frames.answer(frames.SIZE.pack(1 << 40)), "answered"),
    "no most": (frames.GET_MAX_SIZE, frames.answer(bytes(8)), "answered 0"),
    "null base": (frames.BUFFER_GET_BASE, frames.answer(bytes(8)), "answered 0"),
    "last base": (frames.BUFFER_GET_BASE, frames.answer(b"\xff" * 8), "BUFFER_GET_BASE"),
    "overflow": (frames.GET_ALLOC_SIZE, frames.answer(b"\xff" * 8), "GET_ALLOC_SIZE"),
    "small buffer": (frames.ALLOC_BUFFER, frames.answer(frames.PAIR.pack(7, 4095)), "4096 bytes"),
    "huge buffer": (frames.ALLOC_BUFFER, frames.answer(frames.PAIR.pack(7, 1 << 49)), "ALLOC"),
    "hash": (frames.SET_TENSOR_HASH, frames.answer(b"\2"), "it is 0 or 1"),
    "copy": (frames.COPY_TENSOR, frames.answer(b"\xff"), "it is 0 or 1"),
    "memory": (frames.GET_DEVICE_MEMORY, frames.answer(b"\xff" * 16), "GET_DEVICE_MEMORY"),
    "tensor": (frames.GET_TENSOR, frames.answer(bytes(999)), "999 bytes, not 1000"),
    "end": (frames.GET_ALIGNMENT, None, "closed the connection"),
    "end in a tensor": (frames.GET_TENSOR, None, "closed the connection"),
    "silence": (frames.GET_ALIGNMENT, b"", "gave no answer for 0.1 s"),
    "half a tensor": (frames.GET_TENSOR, frames.SIZE.pack(1000) + b"x" * 400, "gave no answer"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_answer_loses_the_server_and_ggml_goes_on(name: str) -> None:
    command, answer, message = MALFORMED[name]
    with (
        fake_server(answers={command: answer}) as server,
        RpcLink.open(server.address, answer_s=0.1 if "no answer" in message else 60) as link,
        Client(link.endpoint) as client,
    ):
        link.check()
        assert len(client.ask(command, ASKED[command])) == size_of(command)
        assert link.lost is not None and message in link.lost
        with pytest.raises(DeviceLostError, match=f"rpc:{server.address} is gone: "):
            link.check()
        is_answered(client)


def test_a_server_that_ends_while_nobody_asks_is_noticed() -> None:
    with (
        fake_server(answers={frames.BUFFER_CLEAR: None}) as server,
        RpcLink.open(server.address) as link,
    ):
        with Client(link.endpoint) as client:
            client.tell(frames.BUFFER_CLEAR, bytes(9))
            assert until(lambda: link.lost is not None)
            is_answered(client)
        with Client(link.endpoint) as client:  # also one that comes after
            is_answered(client)


def test_a_server_that_speaks_unasked_is_lost() -> None:
    with (
        fake_server(after={frames.GET_ALIGNMENT: b"and more"}) as server,
        RpcLink.open(server.address) as link,
        Client(link.endpoint) as client,
    ):
        client.ask(frames.GET_ALIGNMENT, bytes(4))
        assert until(lambda: link.lost == "it answered what nobody asked")
        is_answered(client)


def test_more_memory_free_than_there_is_counts_as_all() -> None:
    answers = {frames.GET_DEVICE_MEMORY: frames.answer(frames.PAIR.pack((1 << 64) - 5, 100))}
    with fake_server(answers=answers) as server, RpcLink.open(server.address) as link:
        with Client(link.endpoint) as client:
            found = client.ask(frames.GET_DEVICE_MEMORY, bytes(4))
        assert frames.PAIR.unpack(found) == (100, 100) and link.lost is None


def test_a_large_upload_to_a_lost_server_is_swallowed(server: "lab.FakeServer") -> None:
    server.answers[frames.GET_ALIGNMENT] = None
    with RpcLink.open(server.address) as link, Client(link.endpoint) as client:
        client.ask(frames.GET_ALIGNMENT, bytes(4))
        client.tell(frames.SET_TENSOR, lab.set_tensor(bytes(3 << 20)))
        assert client.ask(frames.GET_TENSOR, lab.get_tensor(1 << 20)) == bytes(1 << 20)


def test_a_link_is_shared_and_counted(server: "lab.FakeServer") -> None:
    first, second = RpcLink.open(server.address), RpcLink.open(f"rpc:{server.address}")
    assert first.endpoint == second.endpoint and server.n_clients == 1
    first.close()
    first.close()  # counts once
    with Client(second.endpoint) as client:
        assert client.ask(frames.GET_ALIGNMENT, bytes(4)) == frames.SIZE.pack(32)
    second.check()
    second.close()
    assert until(lambda: server.n_ended == 1)


def test_an_address_opens_again_with_another_endpoint(server: "lab.FakeServer") -> None:
    """ggml keeps what it knows of an endpoint for as long as the process lives."""
    with RpcLink.open(server.address) as link:
        before = link.endpoint
    with RpcLink.open(server.address) as link:
        assert link.endpoint != before
        with Client(link.endpoint) as client:
            assert client.ask(frames.GET_ALIGNMENT, bytes(4)) == frames.SIZE.pack(32)


def test_a_lost_link_is_not_shared_with_who_comes_later(server: "lab.FakeServer") -> None:
    server.answers[frames.GET_ALIGNMENT] = None
    with RpcLink.open(server.address) as lost:
        with Client(lost.endpoint) as client:
            client.ask(frames.GET_ALIGNMENT, bytes(4))
        del server.answers[frames.GET_ALIGNMENT]
        with RpcLink.open(server.address) as link:
            assert link.lost is None and lost.lost is not None
            lost.close()
            with Client(link.endpoint) as client:
                assert client.ask(frames.GET_ALIGNMENT, bytes(4)) == frames.SIZE.pack(32)
        link.close()


def test_who_holds_a_connection_beyond_close_is_answered(server: "lab.FakeServer") -> None:
    """A buffer that is freed too late must not end the process."""
    link = RpcLink.open(server.address)
    with Client(link.endpoint) as client:
        client.ask(frames.GET_ALIGNMENT, bytes(4))
        link.close()
        assert until(lambda: server.n_ended == 1)
        is_answered(client)
        assert link.lost is not None


def test_a_graph_that_was_just_computed_is_not_sent_again(server: "lab.FakeServer") -> None:
    """Until a buffer is freed: the server forgets its graphs then."""
    one, two, other = lab.graph(filler=1), lab.graph(filler=2), lab.graph(device=1, filler=1)
    free = (frames.FREE_BUFFER, bytes(8))
    again = (frames.GRAPH_RECOMPUTE, frames.U32.pack(0))
    sent = [(frames.GRAPH_COMPUTE, each) for each in (one, one, two, one, other, one)]
    with RpcLink.open(server.address) as link, Client(link.endpoint) as client:
        for command, payload in [*sent, free, sent[0], sent[0], sent[4]]:
            client.tell(command, payload)
        client.ask(frames.GET_ALIGNMENT, bytes(4))
        stats = link.stats()
    assert [each for each in server.seen[2:] if each[0] != frames.GET_ALIGNMENT] == [
        sent[0], again, sent[2], sent[0], sent[4], again, free, sent[0], again, sent[4],
    ]  # fmt: skip
    assert (stats.n_graphs, stats.n_repeated) == (9, 3)


def test_graphs_that_a_server_keeps_are_named_and_not_sent() -> None:
    one, two, other = lab.graph(filler=1), lab.graph(filler=2), lab.graph(device=1, filler=1)
    large = lab.graph() + bytes(frames.MOST_KEPT_BYTES)
    hello = {frames.HELLO: frames.hello_answer(frames.VERSION, keeps=True)}
    with fake_server(answers=hello) as server, RpcLink.open(server.address) as link:
        with Client(link.endpoint) as client:
            for each in (one, two, one, one, two, other, large, other):
                client.tell(frames.GRAPH_COMPUTE, each)
            client.tell(frames.FREE_BUFFER, bytes(8))  # the bytes are as good as sent again
            client.tell(frames.GRAPH_COMPUTE, other)
            client.ask(frames.GET_ALIGNMENT, bytes(4))
        stats = link.stats()

    def slot(n: int) -> bytes:
        return frames.U32.pack(n)

    keep, use, again = frames.KEEP_GRAPH, frames.USE_GRAPH, frames.GRAPH_RECOMPUTE
    assert server.seen[2:-1] == [
        (keep, slot(0) + one), (keep, slot(1) + two), (use, slot(0)), (again, slot(0)),
        (use, slot(1)), (keep, slot(2) + other), (frames.GRAPH_COMPUTE, large), (again, slot(1)),
        (frames.FREE_BUFFER, bytes(8)), (use, slot(2)),
    ]  # fmt: skip
    assert (stats.n_graphs, stats.n_repeated, stats.n_recalled) == (9, 2, 3)


def test_the_least_recent_graph_leaves_a_full_shelf() -> None:
    shelf = rpc_shelf.GraphShelf(2)
    assert (shelf.find(b"a"), shelf.put(b"a"), shelf.put(b"b")) == (None, 0, 1)
    assert shelf.find(b"a") == 0
    assert shelf.put(b"c") == 1 and shelf.find(b"b") is None
    assert (shelf.find(b"a"), shelf.find(b"c")) == (0, 1)


def test_a_client_that_is_not_ggml_is_dropped(server: "lab.FakeServer") -> None:
    with RpcLink.open(server.address) as link:
        with Client(link.endpoint, hello=False) as client:
            client.sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert client.ends()
        with Client(link.endpoint) as client:
            assert client.ask(frames.GET_ALIGNMENT, bytes(4)) == frames.SIZE.pack(32)
        assert link.lost is None


def test_another_user_of_this_machine_is_turned_away(
    server: "lab.FakeServer", monkeypatch: pytest.MonkeyPatch
) -> None:
    strangers = [True, False]
    monkeypatch.setattr(rpc_relay, "is_strangers", lambda _: strangers.pop(0))
    with RpcLink.open(server.address) as link:
        with Client(link.endpoint, hello=False) as client:
            assert client.ends()
        with Client(link.endpoint) as client:
            assert client.ask(frames.GET_ALIGNMENT, bytes(4)) == frames.SIZE.pack(32)


def test_the_owner_of_a_connection_is_read_from_the_systems_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = (
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n"
        "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     5\n"
        "   1: 0100007F:1F90 0100007F:C001 01 00000000:00000000 00:00000000 00000000     6\n"
        "   2: 0100007F:C001 0100007F:1F90 01 00000000:00000000 00:00000000 00000000  1007\n"
        "  of a system to come\n"
    )
    assert rpc_peer.owner(table, 0xC001, 0x1F90) == 1007
    assert rpc_peer.owner(table, 0xC002, 0x1F90) is None and rpc_peer.owner("", 1, 2) is None
    ours, theirs = _tcp_pair()
    with ours, theirs:
        assert not rpc_peer.is_strangers(ours)
        monkeypatch.setattr(rpc_peer.os, "geteuid", lambda: 54321, raising=False)
        assert rpc_peer.is_strangers(ours) == (sys.platform == "linux")


def test_a_vanished_machine_is_told_from_a_busy_one() -> None:
    """Bytes sent twice or more, and nothing heard since: u8 at 2 and 3, u32 at 56, in ms."""

    def info(retransmits: int, probes: int, last_ack_ms: int) -> bytes:
        found = bytearray(104)
        found[2], found[3] = retransmits, probes
        found[56:60] = last_ack_ms.to_bytes(4, sys.byteorder)
        return bytes(found)

    assert parse_silence(info(3, 0, 4100)) == 4.1
    assert parse_silence(info(0, 4, 6000)) == 6.0
    assert parse_silence(info(0, 0, 60_000)) is None  # nothing was sent: keepalive's business
    assert parse_silence(info(0, 1, 60_000)) is None  # it lets bytes wait, and answers probes
    assert parse_silence(b"") is None


def test_a_silent_machine_ends_a_read_and_a_send(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc_wire, "silence_s", lambda _: 4.0)
    ours, theirs = _tcp_pair()
    with theirs, Wire(ours) as wire:
        with pytest.raises(WireLostError, match="has not answered for 4 s"):
            wire.read(1)
        with pytest.raises(WireLostError, match="has not answered for 4 s"):
            wire.send(bytes(1 << 26))


def test_stop_ends_a_read_of_another_thread() -> None:
    ours, theirs = _tcp_pair()
    with theirs, Wire(ours) as wire:
        threading.Timer(0.05, wire.stop).start()
        with pytest.raises(WireLostError, match="closed here"):
            wire.read(1)


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        return ours, listener.accept()[0]


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def test_a_link_imitated_lets_so_many_bytes_a_second_through_and_saves_none_up() -> None:
    clock = Clock()
    bucket = Bucket(1e6, 0.25, lambda: clock.now, clock.sleep)
    for n in (1, 10, 100_000, 7, 899_882):
        bucket.wait(n)
    assert clock.now == pytest.approx(1.0, abs=2e-4)
    clock.now = 100.0  # a pause earns nothing
    bucket.wait(500_000)
    assert clock.now == pytest.approx(100.5)
    bucket.travel()
    assert clock.now == pytest.approx(101.0)  # there and back
    back = bucket.twin()  # the other direction owes nothing of this one's
    back.wait(1_000_000)
    assert clock.now == pytest.approx(102.0)


def test_both_directions_of_a_link_go_at_its_pace(server: "lab.FakeServer") -> None:
    clock = Clock()
    bucket = Bucket(1e6, 0.0, lambda: clock.now, clock.sleep)
    with RpcLink.open(server.address, throttle=bucket) as link, Client(link.endpoint) as client:
        client.ask(frames.GET_ALIGNMENT, bytes(4))
        before = clock.now
        client.tell(frames.SET_TENSOR, lab.set_tensor(bytes(2_000_000)))
        client.ask(frames.GET_TENSOR, lab.get_tensor(500_000))
        n_bytes = 9 + 305 + 2_000_000 + 9 + 312 + 8 + 500_000
        assert clock.now - before == pytest.approx(n_bytes / 1e6, abs=5e-4)


@pytest.mark.parametrize(
    ("text", "bytes_s", "latency_s"),
    [("100MB", 1e8, 0.0), ("1GB, 2ms", 1e9, 0.002), ("1000,0.5ms", 1000.0, 0.0005)],
)
def test_the_environment_names_a_link(
    text: str, bytes_s: float, latency_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEROUTE_RPC_THROTTLE", text)
    found = Bucket.from_environment()
    assert found is not None and (found.bytes_s, found.latency_s) == (bytes_s, latency_s)


@pytest.mark.parametrize("text", ["0", "fast", "-5", "1GB,x", "1GB,nanms", "1GB,-1ms"])
def test_what_names_no_link_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEROUTE_RPC_THROTTLE", text)
    with pytest.raises(UsageError):
        Bucket.from_environment()
