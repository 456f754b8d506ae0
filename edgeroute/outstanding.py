"""What callers wait for: each is told its end once, by the engine thread or whoever is first."""

import threading
from collections.abc import Callable
from typing import TypeVar

from edgeroute.request import Outcome

T = TypeVar("T")


class Wait:
    """One caller's wait. `fail` is how it is told an error that ends it."""

    __slots__ = ("_all", "ended", "fail")

    def __init__(self, waits: "Outstanding", fail: Callable[[BaseException], None]) -> None:
        self._all = waits
        self.fail = fail
        self.ended = False

    def tell(self, say: Callable[[T], None], what: T, *, last: bool) -> None:
        """Say something, unless the wait is over; the last thing said ends it."""
        with self._all.lock:
            if self.ended:
                return
            if last:
                self.ended = True
                self._all.waits.discard(self)
            say(what)


class Outstanding:
    """All waits on one engine. Any thread may use it.

    Under one lock a wait is told things and ended, so that nothing is said after its end.
    What is said must be quick and wait for nothing: an entry in a queue.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.waits: set[Wait] = set()

    def add(self, fail: Callable[[BaseException], None]) -> Wait:
        """Note that somebody waits."""
        wait = Wait(self, fail)
        with self.lock:
            self.waits.add(wait)
        return wait

    def listen(self, emit: Callable[[Outcome], None]) -> Callable[[Outcome], None]:
        """Note who listens to an answer; return what the engine tells it through."""
        wait = self.add(emit)

        def tell(outcome: Outcome) -> None:
            last = isinstance(outcome, BaseException) or outcome.finish_reason is not None
            wait.tell(emit, outcome, last=last)

        return tell

    def fail_all(self, error: BaseException) -> int:
        """End every wait with an error; return how many there were."""
        with self.lock:
            waits = list(self.waits)
            self.waits.clear()
            for wait in waits:
                wait.ended = True
                wait.fail(error)
        return len(waits)
