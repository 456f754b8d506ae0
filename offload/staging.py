"""Memory that reads land in before a sink takes them: aligned, reused, bounded."""

import mmap
from typing import Final

_STEP_BYTES: Final = 64 << 10
"""Sizes are rounded up to this, so that slices of nearly one size share buffers."""


class StagingPool:
    """Buffers that begin at a memory page, `max_bytes` of them at most. Not thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0
        """Bytes of all buffers, in use and idle."""
        self._idle: dict[int, list[mmap.mmap]] = {}

    def fits(self, nbytes: int) -> bool:
        """Tell whether `take` could ever succeed."""
        return _rounded(nbytes) <= self.max_bytes

    def take(self, nbytes: int) -> mmap.mmap | None:
        """Return a buffer of at least `nbytes`; None while others hold too much."""
        size = _rounded(nbytes)
        if idle := self._idle.get(size):
            return idle.pop()
        if self.held_bytes + size > self.max_bytes:
            self._drop_idle(self.held_bytes + size - self.max_bytes)
            if self.held_bytes + size > self.max_bytes:
                return None
        memory = mmap.mmap(-1, size)
        self.held_bytes += size
        return memory

    def give(self, memory: mmap.mmap) -> None:
        """Take a buffer back for the next reader."""
        self._idle.setdefault(len(memory), []).append(memory)

    def clear(self) -> None:
        """Free what is idle."""
        self._drop_idle(self.held_bytes)

    def _drop_idle(self, nbytes: int) -> None:
        for size, idle in self._idle.items():
            while idle and nbytes > 0:
                # Dropped, not closed: a view may be out, and the last one frees the memory.
                idle.pop()
                self.held_bytes -= size
                nbytes -= size


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _STEP_BYTES) * _STEP_BYTES
