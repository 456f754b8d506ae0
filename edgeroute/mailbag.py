"""What an engine thread says to listeners on event loops: gathered, and handed over at once.

To wake a loop costs more than to tell it something: sequences that share a pass share its wake.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgeroute.request import Outcome

if TYPE_CHECKING:
    import asyncio

Hear = Callable[[Outcome], None]
"""Takes an outcome in; called on its event loop."""
Letters = list[tuple[Hear, Outcome]]


class Mailbag:
    """Outcomes on their way, in order for each listener. Any thread may send, its owner empties it.

    What other threads send leaves at once: they speak where the owner does so no more.
    """

    def __init__(self) -> None:
        self._owner: int | None = None
        self._bags: dict[asyncio.AbstractEventLoop, Letters] = {}

    def own(self) -> None:
        """Gather what the calling thread sends from now on; it calls `empty` before it waits."""
        self._owner = threading.get_ident()

    def send(self, loop: "asyncio.AbstractEventLoop", hear: Hear, outcome: Outcome) -> None:
        """Have a loop hear of an outcome; one that closed meanwhile has nobody left to tell."""
        if threading.get_ident() == self._owner:
            self._bags.setdefault(loop, []).append((hear, outcome))
        else:
            _hand_over(loop, [(hear, outcome)])

    def empty(self) -> None:
        """Hand over what was gathered: one wake for each loop. The owner calls it."""
        if not self._bags:
            return
        bags, self._bags = self._bags, {}
        for loop, letters in bags.items():
            _hand_over(loop, letters)


class Inbox:
    """Outcomes that one task of an event loop waits for; of that loop's thread only.

    Less than an asyncio.Queue, for what is done for every token.
    """

    def __init__(self, loop: "asyncio.AbstractEventLoop") -> None:
        self._loop = loop
        self._here: deque[Outcome] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, outcome: Outcome) -> None:
        """Take an outcome in."""
        self._here.append(outcome)
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def get(self) -> Outcome:
        """Wait for the next one."""
        while not self._here:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._here.popleft()


def _hand_over(loop: "asyncio.AbstractEventLoop", letters: Letters) -> None:
    with contextlib.suppress(RuntimeError):  # it is closed
        loop.call_soon_threadsafe(_read, letters)


def _read(letters: Letters) -> None:
    for hear, outcome in letters:
        hear(outcome)
