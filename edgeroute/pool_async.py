"""A pool on an event loop: answers are made in threads of their own, and whoever leaves is heard.

A pool waits for room, opens models and puts an answer to several of them: all of that blocks. The
loop's own few threads are for short work; these may wait as long as an answer takes.
"""

import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    pass

Told = TypeVar("Told")


class Cancels(Protocol):
    """An answer that may be ended early."""

    def cancel(self) -> None:
        """Ask for its end."""


class Leaver:
    """Somebody who may leave before the answer is there. Thread-safe.

    Args:
        wake: has those who wait for room look whether they still have to.

    Attributes:
        left: set once nobody waits any more.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self.left = threading.Event()
        self._wake = wake
        self._lock = threading.Lock()
        self._answer: Cancels | None = None

    def follow(self, answer: Cancels) -> None:
        """Note what is to be cancelled on leaving; at once if that was before."""
        with self._lock:
            self._answer = answer
            left = self.left.is_set()
        if left:
            answer.cancel()

    def leave(self) -> None:
        """Wait no longer: for room, or for the answer; safe to call twice."""
        with self._lock:
            self.left.set()
            answer = self._answer
        if answer is not None:
            answer.cancel()
        self._wake()


class _End(NamedTuple):
    """The thread is done; with an error, if it failed."""

    error: BaseException | None


async def hear_thread(
    work: Callable[[Callable[[Told], None]], None], leaver: Leaver
) -> AsyncIterator[Told]:
    """Run work in a thread of its own, and give what it tells on the running event loop.

    Leaving the iterator calls `leaver.leave`; the thread then ends by itself.

    Args:
        work: is called with what it tells its results to.
        leaver: ends it early.

    Raises:
        BaseException: what the work raised.
    """
    import asyncio  # 25 ms that synchronous callers need not pay

    loop = asyncio.get_running_loop()
    inbox: asyncio.Queue[Told | _End] = asyncio.Queue()

    def tell(found: Told | _End) -> None:
        # A loop that closed meanwhile has nobody left to tell.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(inbox.put_nowait, found)

    def run() -> None:
        error: BaseException | None = None
        try:
            work(tell)
        except BaseException as failure:  # the listener's, who is told
            error = failure
        tell(_End(error))

    threading.Thread(target=run, name="edgeroute-pool-async", daemon=True).start()
    try:
        while not isinstance(found := await inbox.get(), _End):
            yield found
        if found.error is not None:
            raise found.error
    finally:
        leaver.leave()
