"""One connection: uvicorn's protocol, with limits to how long it waits for its client.

Without limits, clients that send a byte now and then, or nothing, or read nothing of their answer,
would hold connections for ever.
"""

import asyncio
from collections.abc import Callable
from typing import Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from edgeroute.server.short_way import DIRECT, ShortWay

HEAD_S: Final = 20.0
"""Longest time from a connection, or the first byte of a request, to the end of its head."""
STUCK_S: Final = 60.0
"""Longest time that a client may read nothing of what waits to be sent to it."""


class Connection(H11Protocol):
    """Closes itself where a head takes too long, and where an answer is not read."""

    _head_timer: asyncio.TimerHandle | None = None
    _stuck_timer: asyncio.TimerHandle | None = None
    _n_left: int | None = None
    """Bytes that were not sent at the last look; None where the connection was not closing."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a first head."""
        super().connection_made(transport)
        self._wait_for_head()
        self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._stop_waiting()
        if self._stuck_timer is not None:
            self._stuck_timer.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Take what has come; wait for the rest of a head of which only a part did."""
        super().handle_events()
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and DIRECT not in cycle.scope["state"]:  # its task has not begun
            cycle.scope["state"][DIRECT] = ShortWay(self, cycle)
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._head_timer is None and self.conn.trailing_data[0]:
            self._wait_for_head()

    def _wait_for_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_S, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing() and self.conn.their_state is h11.IDLE:
            self.transport.close()

    # answers that are not read

    def pause_writing(self) -> None:
        """Note that the client reads too slowly; give it up where it does not go on to read."""
        super().pause_writing()
        self._look_later(self.transport.abort)

    def resume_writing(self) -> None:
        """Go on: it has read."""
        super().resume_writing()
        self._look_later()

    def _look_later(self, then: Callable[[], None] | None = None) -> None:
        if self._stuck_timer is not None:
            self._stuck_timer.cancel()
        self._stuck_timer = self.loop.call_later(STUCK_S, then or self._look)

    def _look(self) -> None:
        """Give a connection up that was closed long ago and yet has all that is to be sent."""
        closing = self.transport.is_closing()
        n_left = self.transport.get_write_buffer_size() if closing else None
        if n_left is not None and self._n_left is not None and n_left >= self._n_left:
            self.transport.abort()
            return
        self._n_left = n_left
        self._look_later()
