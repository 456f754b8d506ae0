"""Between ggml's RPC client and a server: passes frames on, and answers for a server that is gone.

ggml ends the process when a server goes away, or answers with another size. So its client talks
to a loopback port of ours, where every answer has the right size and none is missing. Once the
server is lost, zeros stand in for what it would have said, and `lost` says that they are void.
"""

import contextlib
import socket
import threading
from dataclasses import dataclass
from typing import Final

from edgeroute.runtime import rpc_frames as frames
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import LibraryError
from edgeroute.runtime.rpc_frames import FrameError
from edgeroute.runtime.rpc_peer import is_strangers
from edgeroute.runtime.rpc_shelf import GraphShelf
from edgeroute.runtime.rpc_throttle import Bucket
from edgeroute.runtime.rpc_wire import PIECE_BYTES, Watch, Wire, WireLostError

MOST_KEPT_BYTES: Final = 1 << 24
"""A graph of more than this is sent whole every time."""
_ZEROS = bytes(PIECE_BYTES)
_HEAD_BYTES = frames.HEAD.size
_used_ports: set[int] = set()
_ports_lock = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkStats:
    """What went over a link. Bytes to and from the server; `n_requests` of all kinds.

    Of `n_graphs` computations, `n_repeated` were the last one again and `n_recalled` one before
    it: their graphs were not sent.
    """

    bytes_out: int
    bytes_in: int
    n_requests: int
    n_answers: int
    n_graphs: int
    n_repeated: int
    n_recalled: int


class Relay(Closing):
    """One server connection, served to ggml's client on a loopback port, by a thread of its own.

    Attributes:
        lost: why the server is gone; None while it answers.
        repeat: whether a graph that the server has is not sent again.
    """

    def __init__(
        self, server: Wire, n_devices: int, throttle: Bucket | None = None, keeps: bool = False
    ) -> None:
        """Take over a connection that has said HELLO to a server, which perhaps keeps graphs."""
        self.lost: str | None = None
        self.repeat = True
        self._server = server
        self._n_devices = n_devices
        self._throttle = throttle
        self._listener = _listen()
        self.endpoint = "{}:{}".format(*self._listener.getsockname())
        self._watch = Watch()
        self._closing = threading.Event()
        self._graphs: dict[int, bytearray] = {}  # what the server computed last, by device
        self._spare = bytearray()
        self._shelf = GraphShelf() if keeps else None
        self._n_requests = self._n_answers = self._n_graphs = self._n_repeated = 0
        self._n_recalled = 0
        self._thread = threading.Thread(target=self._run, name="rpc-relay", daemon=True)
        self._thread.start()

    def stats(self) -> LinkStats:
        """Return what went over it so far; any thread may ask."""
        return LinkStats(
            bytes_out=self._server.n_out, bytes_in=self._server.n_in,
            n_requests=self._n_requests, n_answers=self._n_answers,
            n_graphs=self._n_graphs, n_repeated=self._n_repeated,
            n_recalled=self._n_recalled,
        )  # fmt: skip

    def close(self) -> None:
        """Drop the server; safe to call twice.

        A client that ggml still holds is answered until it leaves: without an answer it would
        end the process.
        """
        if not self._closing.is_set():
            self._closing.set()
            self._server.stop()
            self._watch.wake()

    def _run(self) -> None:
        with self._listener, self._server, self._watch:
            while (sock := self._accept()) is not None:
                with Wire(sock) as client, contextlib.suppress(WireLostError, FrameError):
                    self._serve(client)  # ggml drops its connection with its last buffer

    def _accept(self) -> socket.socket | None:
        while found := self._watch.wait(self._watched(self._listener)):
            if self._server.sock in found:
                self._hear_server()
            elif self._listener in found:
                with contextlib.suppress(OSError):  # it left before we came
                    sock = self._listener.accept()[0]
                    if not is_strangers(sock):
                        return sock
                    sock.close()
        return None

    def _watched(self, sock: socket.socket) -> list[socket.socket]:
        return [sock] if self.lost is not None else [sock, self._server.sock]

    def _serve(self, client: Wire) -> None:
        while True:
            self._await(client)
            command, n_bytes = frames.parse_head(client.peek(_HEAD_BYTES))
            self._n_requests += 1
            if command == frames.GRAPH_COMPUTE and n_bytes <= MOST_KEPT_BYTES:
                self._graph(client, n_bytes)
            elif _HEAD_BYTES + n_bytes <= PIECE_BYTES:
                self._short(client, command, client.read(_HEAD_BYTES + n_bytes))
            else:
                self._long(client, _HEAD_BYTES + n_bytes)

    def _await(self, client: Wire) -> None:
        """Wait for the client's next request; a server that ends meanwhile is noticed at once."""
        if self._server.has_bytes:
            self._hear_server()
        while not client.has_bytes and not self._closing.is_set():
            found = self._watch.wait(self._watched(client.sock))
            if self._server.sock in found:
                self._hear_server()
            elif client.sock in found:
                break
        if self._closing.is_set():
            self._lose("it was closed here")

    def _hear_server(self) -> None:
        """Take what a server says that nobody asked: only that it is gone."""
        try:
            self._server.peek(1)
            self._lose("it answered what nobody asked")
        except WireLostError as error:
            self._lose(str(error))

    def _lose(self, reason: str) -> None:
        if self.lost is None:
            self.lost = reason
            self._graphs.clear()
            self._server.stop()

    def _up(self, data: bytes | bytearray | memoryview) -> None:
        """Send to the server, if there is one."""
        if self.lost is None:
            try:
                self._server.send(data)
            except WireLostError as error:
                self._lose(str(error))

    def _long(self, client: Wire, left: int) -> None:
        """Pass a SET_TENSOR on, piece by piece."""
        while left:
            piece = client.take(left)
            left -= len(piece)
            self._up(piece)

    def _graph(self, client: Wire, n_bytes: int) -> None:
        """Let a graph be computed, which a server that computed it just now has already.

        ggml sends it whole each time. The server keeps each device's last one until any buffer
        is freed.
        """
        frame = self._spare
        if len(frame) != _HEAD_BYTES + n_bytes:
            frame = bytearray(_HEAD_BYTES + n_bytes)
        client.read_into(memoryview(frame))
        (device,) = frames.U32.unpack_from(frame, _HEAD_BYTES)
        self._n_graphs += 1
        if self.repeat and self._graphs.get(device) == frame:
            self._n_repeated += 1
            self._spare = frame
            self._up(frames.request(frames.GRAPH_RECOMPUTE, frames.U32.pack(device)))
            return
        self._spare = self._graphs.pop(device, bytearray())
        self._up(self._named(frame))
        if self.lost is None and device < self._n_devices:
            self._graphs[device] = frame

    def _named(self, frame: bytearray) -> bytes | bytearray:
        """Name a graph that the server keeps, or send it to be kept, where it does that."""
        if self._shelf is None or not self.repeat:
            return frame
        graph = bytes(memoryview(frame)[_HEAD_BYTES:])
        if (slot := self._shelf.find(graph)) is not None:
            self._n_recalled += 1
            return frames.request(frames.USE_GRAPH, frames.U32.pack(slot))
        if (slot := self._shelf.put(graph)) is None:
            return frame
        return frames.request(frames.KEEP_GRAPH, frames.U32.pack(slot) + graph)

    def _short(self, client: Wire, command: int, frame: memoryview) -> None:
        payload = frame[_HEAD_BYTES:]
        if command == frames.HELLO:
            client.send(frames.hello_answer(frames.VERSION))
            return
        if command == frames.DEVICE_COUNT:
            client.send(frames.answer(frames.U32.pack(self._n_devices)))
            return
        if command == frames.FREE_BUFFER:
            self._graphs.clear()
        n_bytes = frames.answer_bytes(command, payload)
        self._up(frame)
        if n_bytes is None:
            return
        self._n_answers += 1
        if command == frames.GET_TENSOR:
            self._tensor(client, n_bytes)
        else:
            client.send(self._ask(command, payload, n_bytes))

    def _ask(self, command: int, payload: memoryview, n_bytes: int) -> bytes:
        """Return the server's answer, or what stands in for it."""
        if self.lost is None:
            try:
                self._expect(command, n_bytes)
                found = bytes(self._server.read(n_bytes))
                return frames.answer(frames.checked_answer(command, found, payload))
            except WireLostError as error:
                self._lose(str(error))
            except FrameError as error:
                self._lose(f"its answer is malformed: {error}")
        return frames.lost_answer(command)

    def _expect(self, command: int, n_bytes: int) -> None:
        """Read how long the answer is; it must be what was asked for."""
        (n_found,) = frames.SIZE.unpack(self._server.read(frames.SIZE.size))
        if self._throttle is not None:
            self._throttle.travel()
        if n_found != n_bytes:
            name = frames.COMMANDS[command].name
            raise FrameError(f"{name} answered with {n_found} bytes, not {n_bytes}")

    def _tensor(self, client: Wire, n_bytes: int) -> None:
        """Pass a tensor's bytes back, piece by piece; zeros in the place of those that are lost."""
        left = n_bytes
        try:
            if self.lost is None:
                self._expect(frames.GET_TENSOR, n_bytes)
        except WireLostError as error:
            self._lose(str(error))
        except FrameError as error:
            self._lose(f"its answer is malformed: {error}")
        client.send(frames.SIZE.pack(n_bytes))
        while left:
            piece: memoryview | bytes = _ZEROS[:left]
            if self.lost is None:
                try:
                    piece = self._server.take(left)
                except WireLostError as error:
                    self._lose(str(error))
            client.send(piece)
            left -= len(piece)


def _listen() -> socket.socket:
    """Listen on a loopback port that no link of this process had: ggml keeps endpoints for ever.

    Raises:
        LibraryError: there is none.
    """
    tried = []
    try:
        for _ in range(256):
            sock = socket.create_server(("127.0.0.1", 0), backlog=8)
            port = sock.getsockname()[1]
            with _ports_lock:
                if port not in _used_ports:
                    _used_ports.add(port)
                    return sock
            tried.append(sock)  # held, so that the system gives another one
    finally:
        for each in tried:
            each.close()
    raise LibraryError("no loopback port is left that this process has not used for a device of "
                       "another machine; restart it")  # fmt: skip
