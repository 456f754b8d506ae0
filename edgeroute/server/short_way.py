"""Short ways of a token to its client, past all that the usual way asks about each piece.

An event loop that wakes between two passes of a model finds cold caches, and takes a core from
them. So there are two: one for the loop, past uvicorn, and one past the loop altogether. The loop
lends that one while it has nothing to write, and takes it back before it writes anything. There the
engine's thread makes a token's bytes, and a thread that does nothing else sends them while the next
token is computed: a client that the system wakes in the sender's place would stop the engine else.
"""

import functools
import queue
import socket
import sys
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Final

import h11

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import RequestResponseCycle

    from edgeroute.server.connection import Connection

DIRECT: Final = "write_now"
"""Where in a request's state stands what writes pieces of its answer: see `ShortWay`."""


class ShortWay:
    """Writes pieces of one request's answer; of the event loop's thread.

    It keeps neither connection nor request alive: they would wait for a collection otherwise.
    """

    def __init__(self, connection: "Connection", cycle: "RequestResponseCycle") -> None:
        self._connection, self._cycle = weakref.ref(connection), weakref.ref(cycle)
        self._chunked = cycle.scope["http_version"] == "1.1"

    def __call__(self, data: bytes) -> bool:
        """Write a piece of an answer whose head was sent, and gave no length.

        Returns:
            False where nothing was written: the client has left, or reads too slowly, or knows no
            chunks. The usual way then does what is to be done.
        """
        connection = self._open()
        if connection is None or connection.flow.write_paused or not data:
            return False
        connection.transport.write(chunk(data))
        return True

    def write_rest(self, data: bytes) -> None:
        """Write what is left of a chunk; nobody misses it where the client has left."""
        connection = self._open()
        if connection is not None:
            connection.transport.write(data)

    def own_socket(self) -> socket.socket | None:
        """Return the client's socket anew, to be closed by who takes it.

        None where what is sent is not what was written (TLS), and on Windows, whose event loop
        may have a write of its own under way.
        """
        connection = self._open()
        if connection is None or sys.platform == "win32":
            return None
        theirs = connection.transport.get_extra_info("socket")
        if theirs is None or connection.transport.get_extra_info("sslcontext"):
            return None
        try:
            found: socket.socket = theirs.dup()
        except OSError:  # as many files are open as may be
            return None
        found.setblocking(False)
        return found

    @property
    def idle(self) -> bool:
        """Whether nothing waits to be sent, and more may be."""
        connection = self._open()
        return (
            connection is not None
            and not connection.flow.write_paused
            and not connection.transport.get_write_buffer_size()
        )

    def _open(self) -> "Connection | None":
        """Return the connection, if it takes chunks of this answer."""
        connection, cycle = self._connection(), self._cycle()
        if connection is None or cycle is None or connection.cycle is not cycle:
            return None
        if connection.transport.is_closing() or cycle.disconnected or not self._chunked:
            return None
        return connection if connection.conn.our_state is h11.SEND_BODY else None


class Lane:
    """The way past the event loop. Pieces keep their order over both ways.

    The thread that makes pieces writes them while the lane is lent to it, and leaves all others to
    the loop; the loop lends it when it has written all that was left to it. A third one sends.

    Attributes:
        last: when a piece was last written here, by `time.monotonic`.
    """

    def __init__(self, way: ShortWay) -> None:
        self.last = 0.0
        self._way = way
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._lent = False
        self._n_left = 0  # pieces on their way to the loop
        self._unsent: list[bytes] = []  # chunks on their way to the socket
        self._rest = b""  # of those, what the client's system did not take

    # the thread that makes pieces

    @property
    def lent(self) -> bool:
        """Whether it is worth while to prepare a piece for `write`."""
        return self._lent

    def leave(self) -> None:
        """Leave a piece to the loop, and all that follow until the loop has written it."""
        with self._lock:
            self._n_left += 1
            self._lent = False

    def write(self, data: bytes) -> bool:
        """Write a piece; False where it is left to the loop instead."""
        with self._lock:
            if not self._lent:
                self._n_left += 1
                return False
            self._unsent.append(chunk(data))
            self.last = time.monotonic()
        _sender().put(self)
        return True

    # the thread that sends

    def flush(self) -> None:
        """Send what was written, as far as a socket takes it; keep the rest for the loop."""
        with self._lock:
            if not self._unsent or self._socket is None:
                return
            data = b"".join(self._unsent)
            self._unsent.clear()
            try:
                n_sent = self._socket.send(data)
            except OSError:  # it takes nothing now, or the client has left: the loop finds that out
                n_sent = 0
            self._rest = data[n_sent:]
            self._lent = self._lent and not self._rest

    # the event loop

    def came(self) -> None:
        """Note that one of the pieces that were left to the loop has come."""
        with self._lock:
            self._n_left -= 1

    def lend(self) -> None:
        """Let the other thread write, if nothing is left to be written here."""
        if self._lent or self._n_left or not self._way.idle:
            return
        if self._socket is None:
            self._socket = self._way.own_socket()
        with self._lock:
            self._lent = self._socket is not None and not self._n_left and not self._rest

    def take_back(self) -> None:
        """End the loan; what follows is written by the loop, after what the client did not take."""
        with self._lock:
            self._lent = False
            rest = b"".join((self._rest, *self._unsent))
            self._rest = b""
            self._unsent.clear()
        if rest:
            self._way.write_rest(rest)

    def go_on(self) -> None:
        """See to it that a rest is written, however long the next piece takes."""
        if self._rest:
            self.take_back()

    def close(self) -> None:
        """Let go of the socket: a connection ends only when nobody holds it."""
        self.take_back()
        with self._lock:
            held, self._socket = self._socket, None
        if held is not None:
            held.close()


class Sender:
    """A thread that flushes lanes. Any thread may put one in.

    It is woken once for all that come before it runs: pieces of one pass share the price.
    """

    def __init__(self) -> None:
        self._lanes: deque[Lane] = deque()
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._rung = False
        threading.Thread(target=self._run, name="edgeroute-sender", daemon=True).start()

    def put(self, lane: Lane) -> None:
        """Have a lane flushed."""
        self._lanes.append(lane)
        if not self._rung:
            self._rung = True
            self._bell.put(None)

    def _run(self) -> None:
        while True:
            self._bell.get()
            self._rung = False  # before it looks: who comes later rings again
            while self._lanes:
                self._lanes.popleft().flush()


@functools.cache
def _sender() -> Sender:
    """Start the one of this process."""
    return Sender()


def chunk(data: bytes) -> bytes:
    """Return a piece of a body as a chunk. Source: RFC 9112, section 7.1."""
    return b"%x\r\n%b\r\n" % (len(data), data)
