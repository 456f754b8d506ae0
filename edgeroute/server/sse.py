"""Server-sent events to one reader, who may stop to read.

Source: the WHATWG HTML standard, section "Server-sent events".
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final

import msgspec
from starlette.types import Send

from edgeroute.server.errors import ApiError
from edgeroute.server.short_way import Lane, ShortWay

DONE: Final = b"data: [DONE]\n\n"
COMMENT: Final = b": still there\n\n"
"""A line that readers skip: it keeps proxies from taking silence for death."""
HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
)


def event(data: object) -> bytes:
    """Return one event; its data is a JSON object on one line."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


class EventWriter:
    """Sends events; the response begins with the first one.

    Args:
        send: of the request.
        stall_s: longest time that the reader may take nothing.
        beat_s: silence after which a comment is sent.
        direct: writes at once, or says that it cannot.

    Attributes:
        lane: on which another thread may write while nothing is written here; None where there is
            no such way.
    """

    def __init__(
        self, send: Send, *, stall_s: float, beat_s: float,
        direct: ShortWay | None = None,
    ) -> None:  # fmt: skip
        self._send, self._direct = send, direct
        self.lane = None if direct is None else Lane(direct)
        self._stall_s, self._beat_s = stall_s, beat_s
        self._one = asyncio.Lock()
        self._since: float | None = None  # when the write that is under way began
        self._last = time.monotonic()
        self.started = False
        self.may_beat = False
        """Whether comments may be sent: a response that has begun can be no error any more."""

    def write_now(self, data: bytes) -> bool:
        """Send events if that needs no waiting; else return False: `write` then sends them."""
        if self._direct is None or not self.started or self._one.locked():
            return False
        self._take_back()
        if not self._direct(data):
            return False
        self._last = time.monotonic()
        return True

    async def write(self, data: bytes) -> None:
        """Send events; waits while the reader does not read, see `mind`."""
        async with self._one:
            self._since = time.monotonic()
            self._take_back()
            if not self.started:
                self.started = True
                await self._send({"type": "http.response.start", "status": 200,
                                  "headers": list(HEADERS)})  # fmt: skip
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
            self._since, self._last = None, time.monotonic()

    async def end(self) -> None:
        """End the response."""
        self._take_back()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def close(self) -> None:
        """Let nobody else write any more."""
        if self.lane is not None:
            self.lane.close()

    async def mind(self, look: Callable[[], None]) -> None:
        """Fill silence with comments, until the reader takes nothing any more.

        One look now and then is cheaper than a time limit on every write; `look` is called then.

        Raises:
            ApiError: 499, he took nothing for `stall_s`; the response cannot be ended properly.
        """
        tick_s = max(0.01, min(self._stall_s, self._beat_s, 2.0) / 4)
        while True:
            await asyncio.sleep(tick_s)
            look()
            now = time.monotonic()
            last = self._last
            if self.lane is not None:
                self.lane.go_on()
                last = max(last, self.lane.last)
            if self._since is not None:
                if now - self._since >= self._stall_s:
                    raise self._stalled()
            elif self.may_beat and now - last >= self._beat_s:
                try:
                    async with asyncio.timeout(self._stall_s):
                        await self.write(COMMENT)
                except TimeoutError:
                    raise self._stalled() from None

    def _take_back(self) -> None:
        if self.lane is not None:
            self.lane.take_back()

    def _stalled(self) -> ApiError:
        return ApiError(499, f"the reader of a stream took nothing for {self._stall_s:g} s")
