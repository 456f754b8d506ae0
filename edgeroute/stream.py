"""An answer as it comes, for synchronous callers."""

import queue
from typing import Self

from edgeroute.request import Outcome, Request
from edgeroute.runtime.closing import Closing
from edgeroute.stats import Chunk


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
