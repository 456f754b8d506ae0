"""Openings of models: who waits for each, its signs of life, and a thread of its own."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from edgeroute.pulse import OpeningPulse
from edgeroute.runtime.errors import EdgerouteError
from edgeroute.shelf_place import Lease

MAX_HUNG: Final = 3
"""Openings of one model, and engines, that may hang at once; each keeps a thread."""

T = TypeVar("T")


class HungOpening(EdgerouteError):
    """Opening a model made no progress for too long and was given up."""


class Opening:
    """The opening of one model, and how many wait for it. The event loop owns it.

    Attributes:
        done: whether it has ended, by whichever of `lease` and `error` there is then.
        left: set once nobody waits for it.
        pulse: its signs of life.
        began: when, in `time.monotonic`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.done: asyncio.Future[None] = loop.create_future()
        self.left = threading.Event()
        self.lease: Lease | None = None
        self.error: Exception | None = None
        self.n_waiting = 0
        self.began = time.monotonic()
        self.pulse = OpeningPulse()

    def leave(self) -> bool:
        """Wait no more; tell whether nobody does, so that its turn may be given up."""
        self.n_waiting -= 1
        if self.n_waiting:
            return False
        if self.lease is not None:
            self.lease.close()
        self.left.set()
        return not self.done.done()

    async def run(self, lease: Callable[[], Lease]) -> None:
        """Have a lease taken in a thread, and tell all who wait; raises nothing.

        Args:
            lease: waits for room and opens the model.
        """

        def opened() -> Lease:
            with self.pulse.here():
                found = lease()
                try:
                    _ = found.runtime  # which another may be opening
                except BaseException:
                    found.close()
                    raise
                return found

        taking = in_thread(opened, "edgeroute-opening")
        ends: list[asyncio.Future[Any]] = [taking, self.done]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not taking.done():  # given up: what comes of it is freed where it is made
                taking.cancel()
        error = None if taking.cancelled() else taking.exception()
        if self.done.done():
            return
        if error is None:
            self.lease = taking.result()
            if not self.n_waiting:
                self.lease.close()
        else:
            self.error = error if isinstance(error, Exception) else RuntimeError(repr(error))
        self.done.set_result(None)

    def give_up(self, error: HungOpening) -> None:
        """End the wait of all; its thread stays behind."""
        if not self.done.done():
            self.error = error
            self.done.set_result(None)


def in_thread(work: Callable[[], T], name: str) -> "asyncio.Future[T]":
    """Do some work in a thread of its own, which keeps neither a pool nor the process waiting."""
    done: Future[T] = Future()
    done.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # for whoever waits
            done.set_exception(error)
        else:
            done.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return asyncio.wrap_future(done)
