"""An answer as it comes: for synchronous callers, and on an event loop."""

import functools
import queue
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Self

from edgeroute.mailbag import Inbox
from edgeroute.request import Outcome, Request
from edgeroute.runtime.closing import Closing
from edgeroute.stats import Chunk

if TYPE_CHECKING:
    import asyncio

    from edgeroute.engine_thread import EngineThread

Ask = Callable[[Callable[[Outcome], None]], Request]
"""Makes a request that tells its outcomes to somebody."""
Tap = Callable[[Chunk], bool]
"""Is shown a piece before anybody else, in the engine's thread, and says whether it keeps it. It is
quick, raises nothing and waits for nobody: a model stands still meanwhile."""


class Chunks(Closing):
    """Chunks of one answer, taken from where its engine puts them."""

    def __init__(self, inbox: "queue.SimpleQueue[Outcome]") -> None:
        self._inbox = inbox
        self._done = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        """Wait for the next chunk.

        Raises:
            EdgerouteError: the request failed; nothing more comes.
        """
        while not self._done:
            try:
                # A wait without limit could not be interrupted on Windows.
                outcome = self._inbox.get(timeout=0.5)
            except queue.Empty:
                continue
            if isinstance(outcome, BaseException):
                self._done = True
                raise outcome
            self._done = outcome.finish_reason is not None
            return outcome
        raise StopIteration


class Stream(Chunks):
    """Iterator over the chunks of one answer; the last has its whole Generation.

    `cancel` asks for the end: what was produced, with its statistics, still comes.
    `close`, leaving a `with` block, or dropping the object cancels and listens no longer.
    """

    def __init__(self, request: Request, inbox: "queue.SimpleQueue[Outcome]") -> None:
        super().__init__(inbox)
        self._request = request

    @property
    def id(self) -> str:
        """Id of the generation."""
        return self._request.id

    def cancel(self) -> None:
        """Ask the engine to end the answer, within one token or one operation of a prefill."""
        self._request.cancel()

    def close(self) -> None:
        """Cancel, and expect nothing more; safe to call twice."""
        self._request.cancel()
        self._done = True

    def __del__(self) -> None:
        # Not relied on for memory: it only spares the work for an answer nobody waits for.
        self._request.cancel()


async def hear(ask: Ask, engine: "EngineThread", tap: Tap | None = None) -> AsyncIterator[Chunk]:
    """Make a request in a thread, hand it over, and give its chunks on the running event loop.

    Leaving the iterator cancels the request. Pieces that `tap` keeps are not given here.

    Raises:
        EdgerouteError: it cannot be made, or it failed.
    """
    import asyncio  # 25 ms that synchronous callers need not pay

    loop = asyncio.get_running_loop()
    inbox = Inbox(loop)
    send = functools.partial(engine.mailbag.send, loop, inbox.put)
    emit = send if tap is None else functools.partial(_past, tap, send)

    engine.check_open()
    making = asyncio.ensure_future(asyncio.to_thread(ask, emit))
    try:
        request = await asyncio.shield(making)
    except asyncio.CancelledError:
        making.add_done_callback(_drop)  # the thread goes on, and nobody else frees what it made
        raise
    engine.submit(request)
    try:
        while True:
            outcome = await inbox.get()
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome
            if outcome.finish_reason is not None:
                return
    finally:
        request.cancel()


def _past(tap: Tap, send: Callable[[Outcome], None], outcome: Outcome) -> None:
    """Show a piece to a tap, and send on what it does not keep."""
    if isinstance(outcome, BaseException) or not tap(outcome):
        send(outcome)


def _drop(made: "asyncio.Future[Request]") -> None:
    """Free what a request holds whose listener left before it was made."""
    if not made.cancelled() and made.exception() is None:
        made.result().sampler.close()
