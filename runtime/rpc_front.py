"""What a network may reach of ggml's RPC server: one client at a time, in frames that were checked.

ggml's own server listens on loopback only, in a child process; see `rpc_engine`. The front keeps
the count of what a client holds, so that a limit is exact, and ends with the client whatever the
child still computes for it.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from edgeroute.runtime import rpc_frames as frames
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import LibraryError
from edgeroute.runtime.rpc_engine import RpcEngine
from edgeroute.runtime.rpc_frames import FrameError
from edgeroute.runtime.rpc_wire import PIECE_BYTES, Watch, Wire, WireLostError
from edgeroute.runtime.units import format_bytes

GREET_S: Final = 5.0
"""How long a client may take to say HELLO; nobody else is served meanwhile."""
FRAME_S: Final = 120.0
"""How long a client may stop within one frame."""
GRACE_S: Final = 0.2
"""How long a second client waits in case that the first is just leaving."""
LEAVE_S: Final = 5.0
"""How long a client waits while what the one before it held is freed."""
MOST_BUFFERS: Final = 1 << 16
_HEAD_BYTES = frames.HEAD.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Lent:
    """What clients may have: bytes of memory, None is all that the device has."""

    memory_bytes: int | None = None


class Held:
    """What one client holds, in bytes, by the pointers that it was given."""

    def __init__(self, limit_bytes: int | None) -> None:
        self.limit_bytes = limit_bytes
        self.n_bytes = self.peak_bytes = self.largest_bytes = 0
        self._sizes: dict[int, int] = {}

    def fits(self, n_bytes: int) -> bool:
        """Whether one more buffer of this size is within the limit."""
        within = self.limit_bytes is None or self.n_bytes + n_bytes <= self.limit_bytes
        return within and n_bytes <= frames.MOST_BYTES and len(self._sizes) < MOST_BUFFERS

    def add(self, pointer: int, n_bytes: int) -> None:
        """Count a buffer."""
        self._sizes[pointer] = n_bytes
        self.n_bytes += n_bytes
        self.peak_bytes = max(self.peak_bytes, self.n_bytes)
        self.largest_bytes = max(self.largest_bytes, n_bytes)

    def remove(self, pointer: int) -> None:
        """Count a buffer no more.

        Raises:
            FrameError: the client does not hold it.
        """
        if pointer not in self._sizes:
            raise FrameError("FREE_BUFFER of what it does not hold")
        self.n_bytes -= self._sizes.pop(pointer)
        self.largest_bytes = max(self._sizes.values(), default=0)

    def memory(self) -> bytes | None:
        """Answer GET_DEVICE_MEMORY: free, and in all; None is what the device says."""
        if self.limit_bytes is None:
            return None
        return frames.PAIR.pack(max(0, self.limit_bytes - self.n_bytes), self.limit_bytes)


class _Session(Closing):
    """One client, served by a thread of its own."""

    def __init__(self, sock: socket.socket, name: str, front: "RpcFront") -> None:
        self.name = name
        self.client = Wire(sock, GREET_S)
        self.held = Held(front.lent.memory_bytes)
        self.leaving = threading.Event()
        """Its client is gone; the child's memory is not free yet."""
        self._front = front
        self._watch = Watch()
        self._greeted = False
        self._kept: dict[int, bytes] = {}  # GRAPH_COMPUTEs as they go to ggml, by slot
        self.thread = threading.Thread(target=self._run, name="rpc-client", daemon=True)

    def _run(self) -> None:
        front, reason = self._front, "it left"
        try:
            engine = front.connection()
        except LibraryError as error:
            self.client.close()
            self._watch.close()
            front.fail(error)
            return
        try:
            with self.client, self._watch:
                try:
                    self._serve(engine)
                except WireLostError as error:
                    reason = str(error)
                except FrameError as error:
                    reason = f"refused: {error}"
                self.leaving.set()
        finally:
            engine.close()
            if self._greeted:
                front.report(
                    f"client {self.name} is gone: {reason}; it sent "
                    f"{format_bytes(self.client.n_in)}, took {format_bytes(self.client.n_out)} "
                    f"and held {format_bytes(self.held.peak_bytes)} at most"
                )
            front.renew()

    def _serve(self, engine: Wire) -> None:
        greet(self.client)
        self.client.patience_s = FRAME_S
        self._greeted = True
        self._front.report(f"client {self.name} is served")
        while self._await(engine):
            command, n_bytes = frames.parse_head(self.client.peek(_HEAD_BYTES), ours=True)
            if _HEAD_BYTES + n_bytes <= PIECE_BYTES:
                frame = self.client.read(_HEAD_BYTES + n_bytes)
                self._check_graph(command, frame[_HEAD_BYTES:], n_bytes)
                self._short(engine, command, frame)
            else:
                self._long(engine, command, n_bytes)

    def _await(self, engine: Wire) -> bool:
        """Wait for the next frame.

        Returns:
            False when the front closes.

        Raises:
            WireLostError: ggml ended, or closed the connection because of a request.
        """
        while not self.client.has_bytes:
            found = self._watch.wait([self.client.sock, engine.sock])
            if engine.sock in found:
                raise WireLostError(self._front.why_ended())
            if not found:
                return False
            if self.client.sock in found:
                break
        return True

    def _check_graph(self, command: int, start: memoryview, n_bytes: int) -> None:
        """Refuse a graph whose counts do not add up to its size."""
        if command == frames.GRAPH_COMPUTE:
            frames.check_graph(start, n_bytes)

    def _long(self, engine: Wire, command: int, n_bytes: int) -> None:
        """Pass a large frame on, piece by piece."""
        if command == frames.SET_TENSOR:
            self._check_size(command, n_bytes - frames.SET_HEAD_BYTES)
        self._check_graph(command, self.client.peek(_HEAD_BYTES + 8)[_HEAD_BYTES:], n_bytes)
        left = _HEAD_BYTES + n_bytes
        while left:
            piece = self.client.take(left)
            left -= len(piece)
            self._to_engine(engine, piece)

    def _check_size(self, command: int, n_bytes: int) -> None:
        if n_bytes > self.held.largest_bytes:
            raise FrameError(f"{frames.COMMANDS[command].name} of {n_bytes} bytes; its largest "
                             f"buffer has {self.held.largest_bytes}")  # fmt: skip

    def _short(self, engine: Wire, command: int, frame: memoryview) -> None:
        payload = frame[_HEAD_BYTES:]
        if command == frames.HELLO:
            raise FrameError("a second HELLO")
        if command == frames.SET_TENSOR:
            self._check_size(command, len(payload) - frames.SET_HEAD_BYTES)
        elif command == frames.FREE_BUFFER:
            self.held.remove(frames.SIZE.unpack(payload)[0])
        elif command == frames.ALLOC_BUFFER and not self.held.fits(frames.ALLOC.unpack(payload)[1]):
            self.client.send(frames.answer(frames.PAIR.pack(0, 0)))
            return
        elif command in (frames.KEEP_GRAPH, frames.USE_GRAPH):
            self._to_engine(engine, self._kept_graph(command, payload))
            return
        n_bytes = frames.answer_bytes(command, payload)
        if command == frames.GET_TENSOR:
            self._check_size(command, n_bytes or 0)
        self._to_engine(engine, frame)
        if n_bytes is not None:
            self._answer(engine, command, payload, n_bytes)

    def _kept_graph(self, command: int, payload: memoryview) -> bytes:
        """Return what ggml is told in the place of our own commands."""
        (slot,) = frames.U32.unpack_from(payload)
        if slot >= frames.N_KEPT:
            raise FrameError(f"slot {slot}; there are {frames.N_KEPT}")
        if command == frames.KEEP_GRAPH:
            frames.check_graph(payload[4:], len(payload) - 4)
            self._kept[slot] = frames.request(frames.GRAPH_COMPUTE, bytes(payload[4:]))
        if slot not in self._kept:
            raise FrameError(f"USE_GRAPH of slot {slot}, which has none")
        return self._kept[slot]

    def _to_engine(self, engine: Wire, data: bytes | memoryview) -> None:
        try:
            engine.send(data)
        except WireLostError as error:
            raise WireLostError(self._front.why_ended()) from error

    def _answer(self, engine: Wire, command: int, payload: memoryview, n_bytes: int) -> None:
        self._await_engine(engine)
        try:
            (n_found,) = frames.SIZE.unpack(engine.read(frames.SIZE.size))
            if n_found != n_bytes:  # ours, or a version that was not read
                raise FrameError(f"ggml answered with {n_found} bytes, not {n_bytes}")
            if command == frames.GET_TENSOR:
                self.client.send(frames.SIZE.pack(n_bytes))
                left = n_bytes
                while left:
                    piece = engine.take(left)
                    left -= len(piece)
                    self.client.send(piece)
                return
            found = bytes(engine.read(n_bytes))
        except WireLostError as error:
            raise WireLostError(self._front.why_ended()) from error
        if command == frames.ALLOC_BUFFER:
            pointer, size = frames.PAIR.unpack(found)
            if pointer:
                self.held.add(pointer, size)
        elif command == frames.GET_DEVICE_MEMORY:
            found = self.held.memory() or found
        self.client.send(frames.answer(found))

    def _await_engine(self, engine: Wire) -> None:
        """Wait for an answer; a client that leaves meanwhile is noticed."""
        watched = [engine.sock, self.client.sock]
        while True:
            found = self._watch.wait(watched)
            if not found:
                raise WireLostError("it was closed here")
            if engine.sock in found:
                return
            if self.client.is_ended():
                raise WireLostError("it left before its answer")
            watched = [engine.sock]  # it asks on; where it ends comes after that

    def close(self) -> None:
        """End it now; safe to call twice, from any thread."""
        self._watch.wake()
        self.client.stop()
        self.thread.join(LEAVE_S)


class RpcFront(Closing):
    """Lends a device on an address until it is closed. `report` gets a line of each event."""

    def __init__(
        self, listener: socket.socket, engine: RpcEngine, lent: Lent,
        report: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.lent = lent
        self.report = report
        self._listener = listener
        self._engine = engine
        self._next: Wire | None = engine.connect()  # held, so that nobody else has it
        self._failed: LibraryError | None = None
        self._session: _Session | None = None
        self._watch = Watch()
        self._serving = threading.Lock()
        self._closing = False

    def memory_bytes(self) -> int:
        """What clients may have: the limit, else what the device has free.

        Raises:
            LibraryError: ggml does not say.
        """
        if self.lent.memory_bytes is not None:
            return self.lent.memory_bytes
        assert self._next is not None
        try:
            self._next.send(frames.request(frames.GET_DEVICE_MEMORY, bytes(4)))
            answer = bytes(self._next.read(frames.SIZE.size + frames.PAIR.size))
        except WireLostError as error:
            raise LibraryError(f"the device does not tell its memory: {error}") from error
        return int(frames.PAIR.unpack(answer[frames.SIZE.size :])[0])

    def serve(self) -> None:
        """Serve clients until `stop`.

        Raises:
            LibraryError: ggml's server could not be begun again.
        """
        with self._serving:
            while self._watch.wait([self._listener]):
                try:
                    sock, address = self._listener.accept()
                except OSError:  # it left before we came
                    continue
                self._take(sock, f"{address[0]}:{address[1]}")
        if self._failed is not None:
            raise self._failed

    def _take(self, sock: socket.socket, name: str) -> None:
        session = self._session
        if session is not None and session.leaving.wait(GRACE_S):
            session.thread.join(LEAVE_S)
        if session is not None and session.thread.is_alive():
            threading.Thread(target=self._refuse, args=(sock, name), daemon=True).start()
            return
        self._session = _Session(sock, name, self)
        self._session.thread.start()

    def _refuse(self, sock: socket.socket, name: str) -> None:
        with Wire(sock, GREET_S) as wire, contextlib.suppress(WireLostError, FrameError):
            greet(wire, busy=True)
            self.report(f"client {name} was refused: one at a time")

    def connection(self) -> Wire:
        """Return the connection to ggml that waits for a client."""
        wire, self._next = self._next, None
        if wire is None or wire.is_ended():  # ggml ended while it waited
            wire = self._engine.connect()
        return wire

    def renew(self) -> None:
        """Prepare for the next client: what the last one held is free when this returns."""
        if self._closing:
            return
        began = time.monotonic()
        try:
            self._next = self._engine.connect()
        except LibraryError as error:
            self.fail(error)
            return
        if (took_s := time.monotonic() - began) > LEAVE_S:
            self.report(f"ggml took {took_s:.0f} s to be ready again")

    def fail(self, error: LibraryError) -> None:
        """Let `serve` end with an error: nobody can be served any more."""
        self._failed = error
        self._watch.wake()

    def why_ended(self) -> str:
        """Say why ggml closed a connection."""
        return self._engine.why_ended()

    def stop(self) -> None:
        """Let `serve` return; any thread may."""
        self._watch.wake()

    def close(self) -> None:
        """End the client that is served, and stop listening; safe to call twice."""
        self._closing = True
        self.stop()
        with self._serving:
            self._listener.close()
            self._watch.close()
        self._engine.close()  # first: it may compute for a client that waits
        if self._session is not None:
            self._session.close()
        if self._next is not None:
            self._next.close()


def greet(client: Wire, busy: bool = False) -> None:
    """Answer a client's HELLO.

    Raises:
        FrameError: it said something else.
        WireLostError: it is gone, or said nothing.
    """
    command, n_bytes = frames.parse_head(client.peek(_HEAD_BYTES))
    if command != frames.HELLO:
        raise FrameError(f"{frames.COMMANDS[command].name} before HELLO")
    client.read(_HEAD_BYTES + n_bytes)
    client.send(frames.hello_answer((0, 0, 0), frames.BUSY) if busy
                else frames.hello_answer(frames.VERSION, keeps=True))  # fmt: skip
