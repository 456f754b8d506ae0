"""A connection that carries frames: exact reads, sends that may wait, and a peer that may be gone.

A machine that vanished says nothing. An idle connection is probed by the system's keepalive; one
with bytes on their way is not, so what the system knows of them is asked now and then. A peer
that computes for long, and lets bytes wait meanwhile, is neither.
"""

import contextlib
import select
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Final

from edgeroute.runtime.closing import Closing
from edgeroute.runtime.rpc_throttle import Bucket

PIECE_BYTES: Final = 1 << 18
TICK_S: Final = 0.5
SPINS: Final = 16
SILENT_S: Final = 4
"""How long a machine may leave everything unanswered that its system should answer."""
_INFO_BYTES = 104  # Source: linux/tcp.h, struct tcp_info
_LAST_ACK_AT = 56  # tcpi_last_ack_recv, in milliseconds


class WireLostError(Exception):
    """The peer is gone, or this end was closed; the message is part of a sentence."""


class Wire(Closing):
    """One end of a TCP connection. One thread reads and sends; any may call `stop`.

    Attributes:
        n_in, n_out: bytes that came and went.
        patience_s: how long one read or send may go without a single byte; None is for ever.
    """

    def __init__(
        self, sock: socket.socket, patience_s: float | None = None, throttle: Bucket | None = None
    ) -> None:
        """Take a connected socket over.

        Args:
            patience_s: how long one read or send may go without a single byte; None is for ever.
            throttle: both directions go at its pace, each at all of it.
        """
        self.sock = sock
        self.n_in = self.n_out = 0
        self.patience_s = patience_s
        self._out, self._in = throttle, throttle and throttle.twin()
        self._buffer = memoryview(bytearray(PIECE_BYTES))
        self._start = self._end = 0
        self._stopped = threading.Event()
        sock.setblocking(False)
        self._readable, self._writable = Poll((sock,)), Poll((), (sock,))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _probe_when_idle(sock)

    @property
    def has_bytes(self) -> bool:
        """Whether bytes were received that nobody read."""
        return self._end > self._start

    def peek(self, n: int) -> memoryview:
        """Return the next n bytes, at most PIECE_BYTES, and leave them; valid until the next read.

        Raises:
            WireLostError: the peer is gone.
        """
        if self._start == self._end:
            self._start = self._end = 0
        if self._start + n > len(self._buffer):
            left = self._end - self._start
            self._buffer[:left] = bytes(self._buffer[self._start : self._end])
            self._start, self._end = 0, left
        while self._end - self._start < n:
            # A frame comes in two or three parts, a few microseconds after each other.
            spins = SPINS if self._end > self._start else 0
            self._end += self._receive(self._buffer[self._end :], spins)
        return self._buffer[self._start : self._start + n]

    def read(self, n: int) -> memoryview:
        """Return the next n bytes, as `peek`, and go past them."""
        found = self.peek(n)
        self._start += n
        return found

    def take(self, most: int) -> memoryview:
        """Return what comes next, between one byte and `most` of them; as `read`."""
        self.peek(1)
        found = self._buffer[self._start : min(self._end, self._start + most)]
        self._start += len(found)
        return found

    def read_into(self, into: memoryview) -> None:
        """Fill a buffer.

        Raises:
            WireLostError: the peer is gone.
        """
        at = min(len(into), self._end - self._start)
        into[:at] = self._buffer[self._start : self._start + at]
        self._start += at
        while at < len(into):
            at += self._receive(into[at:])

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of it.

        Raises:
            WireLostError: the peer is gone.
        """
        left = memoryview(data)
        if self._out is not None:
            self._out.wait(len(left))
        while left:
            try:
                n = self.sock.send(left)
            except BlockingIOError:
                self._wait(self._writable, "took no byte")
                continue
            except OSError as error:
                raise WireLostError(_reason(error)) from error
            self.n_out += n
            left = left[n:]

    def _receive(self, into: memoryview, spins: int = 0) -> int:
        """Receive at least one byte; ask so many times before sleeping."""
        while True:
            try:
                n = self.sock.recv_into(into)
            except BlockingIOError:
                if spins:
                    spins -= 1
                else:
                    self._wait(self._readable, "gave no answer")
                continue
            except OSError as error:
                raise WireLostError(_reason(error)) from error
            if not n:
                raise WireLostError("it was closed here" if self._stopped.is_set()
                                    else "it closed the connection")  # fmt: skip
            self.n_in += n
            if self._in is not None:
                self._in.wait(n)
            return n

    def _wait(self, poll: "Poll", what: str) -> None:
        """Wait until it can go on."""
        began = time.monotonic()
        while not poll.wait(TICK_S):
            self._check(began, what)

    def _check(self, began: float, what: str) -> None:
        """Decide whether to go on waiting."""
        if self._stopped.is_set():
            raise WireLostError("it was closed here")
        if (silent_s := silence_s(self.sock)) is not None and silent_s >= SILENT_S:
            raise WireLostError(f"its machine has not answered for {silent_s:.0f} s")
        if self.patience_s is not None and time.monotonic() - began >= self.patience_s:
            raise WireLostError(f"it {what} for {self.patience_s:g} s")

    def is_ended(self) -> bool:
        """Whether the peer is gone and left nothing to read; does not wait."""
        if self.has_bytes:
            return False
        try:
            return not self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:  # broken, or closed here
            return True

    def stop(self) -> None:
        """Make whoever reads or sends raise WireLostError soon; any thread may."""
        self._stopped.set()
        with contextlib.suppress(OSError):  # not connected any more
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; safe to call twice."""
        self.stop()
        self.sock.close()


def _reason(error: OSError) -> str:
    return f"the connection broke: {error.strerror or error}"


def _probe_when_idle(sock: socket.socket) -> None:
    """Let the system find out within SILENT_S that the peer's machine is gone."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # macOS calls the first of them otherwise; what a system lacks keeps its own, longer, times.
    for names, value in ((("TCP_KEEPIDLE", "TCP_KEEPALIVE"), 1), (("TCP_KEEPINTVL",), 1),
                         (("TCP_KEEPCNT",), SILENT_S - 1)):  # fmt: skip
        option = next((getattr(socket, name) for name in names if hasattr(socket, name)), None)
        if option is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, option, value)


def silence_s(sock: socket.socket) -> float | None:
    """Return for how long a peer's system has left repeated bytes unanswered.

    None: nothing was repeated, or this system does not tell.
    """
    if sys.platform != "linux":
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    except OSError:
        return None
    return parse_silence(info)


def parse_silence(info: bytes) -> float | None:
    """Read `silence_s` from a tcp_info: retransmits u8 and probes u8, then last_ack_recv u32."""
    if len(info) < _LAST_ACK_AT + 4 or max(info[2], info[3]) < 2:
        return None
    return int.from_bytes(info[_LAST_ACK_AT : _LAST_ACK_AT + 4], sys.byteorder) / 1000


class Poll:
    """Waits until one of some sockets can be read, or one of others be written to."""

    def __init__(
        self, readers: Sequence[socket.socket], writers: Sequence[socket.socket] = ()
    ) -> None:
        self._readers, self._writers = readers, writers
        self._poll = select.poll() if hasattr(select, "poll") else None  # Windows has none
        if self._poll is not None:  # select() fails on descriptors from 1024 on
            for socks, event in ((readers, select.POLLIN), (writers, select.POLLOUT)):
                for each in socks:
                    self._poll.register(each, event)

    def wait(self, timeout_s: float | None = None) -> list[socket.socket]:
        """Return those that can; none after the timeout."""
        if self._poll is None:
            readers, writers, _ = select.select(self._readers, self._writers, [], timeout_s)
            return [*readers, *writers]
        ready = {found for found, _ in self._poll.poll(timeout_s and 1000 * timeout_s)}
        return [each for each in (*self._readers, *self._writers) if each.fileno() in ready]


class Watch(Closing):
    """Waits until one of several sockets has something to read, or until `wake`."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        self._theirs.setblocking(False)
        self._socks: Sequence[socket.socket] = ()
        self._poll = Poll((self._ours,))

    def wait(self, socks: Sequence[socket.socket]) -> list[socket.socket]:
        """Return those that have; none after `wake`."""
        if socks != self._socks:
            self._socks, self._poll = socks, Poll((*socks, self._ours))
        found = self._poll.wait()
        return [] if self._ours in found else found

    def wake(self) -> None:
        """End this and every later `wait`; any thread may."""
        with contextlib.suppress(OSError):  # full, or closed: it is awake
            self._theirs.send(b"x")

    def close(self) -> None:
        """Free the sockets; safe to call twice."""
        self._ours.close()
        self._theirs.close()
