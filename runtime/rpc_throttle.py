"""A connection slowed down to another one: so many bytes a second, so long a way."""

import os
import time
from collections.abc import Callable
from typing import Final, Self

from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.units import parse_bytes

VARIABLE: Final = "EDGEROUTE_RPC_THROTTLE"
_SHORTEST_S: Final = 2e-4
"""A system sleeps no shorter with any precision: less is owed until there is more of it."""


class Bucket:
    """One direction of a link: what is sent is there when the bytes before it and itself are.

    It owes nothing after a pause and saves nothing up. Not thread-safe.

    Args:
        bytes_s: bytes a second.
        latency_s: how long a byte takes one way.
    """

    def __init__(
        self, bytes_s: float, latency_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        if not 0 < bytes_s < float("inf") or not 0 <= latency_s < 60:
            raise UsageError(f"no link has {bytes_s:g} bytes a second and {latency_s:g} s of "
                             "latency; give a positive rate and less than 60 s")  # fmt: skip
        self.bytes_s, self.latency_s = bytes_s, latency_s
        self._clock, self._sleep = clock, sleep
        self._free_at = 0.0

    @classmethod
    def from_environment(cls) -> Self | None:
        """Read EDGEROUTE_RPC_THROTTLE: bytes a second, and perhaps a latency: `100MB`, `1GB,2ms`.

        Raises:
            UsageError: it is neither.
        """
        text = os.environ.get(VARIABLE, "").strip()
        if not text:
            return None
        rate, _, latency = text.partition(",")
        try:
            latency_s = float(latency.strip().removesuffix("ms")) / 1000 if latency else 0.0
            return cls(parse_bytes(rate), latency_s)
        except ValueError as error:
            raise UsageError(f"cannot read {VARIABLE}={text!r}; write bytes a second, and "
                             "perhaps a latency: 100MB or 1GB,2ms") from error  # fmt: skip

    def twin(self) -> "Bucket":
        """Return another direction of the same link."""
        return Bucket(self.bytes_s, self.latency_s, self._clock, self._sleep)

    def wait(self, n_bytes: int) -> None:
        """Wait until so many more bytes would have been through."""
        now = self._clock()
        self._free_at = max(self._free_at, now) + n_bytes / self.bytes_s
        if (left := self._free_at - now) >= _SHORTEST_S:
            self._sleep(left)

    def travel(self) -> None:
        """Wait as long as a question and its answer are on their way."""
        if self.latency_s:
            self._sleep(2 * self.latency_s)
