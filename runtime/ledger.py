"""One account of bytes over weights, KV caches, compute buffers and, later, pages.

Nothing large is allocated without an entry, and the sum never exceeds the budget.
"""

import math
from dataclasses import dataclass

from edgeroute.runtime.errors import CapacityError, NeverFitsError
from edgeroute.runtime.units import format_bytes

COMPUTE_BUFFER = "compute buffer"
"""The owner of what graphs are computed in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Bytes that one owner holds."""

    owner: str
    n_bytes: int


class Ledger:
    """Entries under one byte budget. Not thread-safe: the engine thread owns it."""

    def __init__(self, budget_bytes: int, device: str | None = None) -> None:
        """Begin an account of this process's memory, or of the own memory of a named device."""
        self.budget_bytes = budget_bytes
        self.device = device
        self._entries: dict[str, int] = {}

    @property
    def used_bytes(self) -> int:
        """Sum over all entries; any thread may ask."""
        return sum(self._entries.copy().values())

    @property
    def free_bytes(self) -> int:
        """Budget less what is used."""
        return self.budget_bytes - self.used_bytes

    def entries(self) -> list[Entry]:
        """List the entries, largest first; any thread may ask."""
        pairs = sorted(self._entries.copy().items(), key=lambda pair: -pair[1])
        return [Entry(owner=owner, n_bytes=n_bytes) for owner, n_bytes in pairs]

    def reserve(self, wants: dict[str, int]) -> None:
        """Enter several owners at once, all or none.

        Raises:
            NeverFitsError: they do not fit; the message gives each part and the smallest
                budget that would do. Nothing was entered.
        """
        repeated = wants.keys() & self._entries.keys()
        if repeated:
            raise ValueError(f"ledger already has {sorted(repeated)}")
        need = self.used_bytes + sum(wants.values())
        if need > self.budget_bytes:
            parts = ", ".join(f"{owner} {format_bytes(n)}" for owner, n in wants.items())
            if self.device is not None:
                raise NeverFitsError(
                    f"on {self.device}, {parts} make {format_bytes(need)} in all, over the "
                    f"{format_bytes(self.budget_bytes)} that may be used of its memory; raise "
                    "device_memory where it has more, lower the context length, or name another "
                    "device beside it"
                )
            raise NeverFitsError(
                f"{parts} make {format_bytes(need)} in all, over the budget of "
                f"{format_bytes(self.budget_bytes)}; raise the memory budget to at least "
                f"{math.ceil(100 * need / 2**30) / 100:.2f} GiB, lower the context length, or take "
                "a smaller model"
            )
        self._entries.update(wants)

    def replace(self, owner: str, n_bytes: int) -> None:
        """Enter another number of bytes for an owner, who may have had none; 0 is no entry.

        Raises:
            NeverFitsError: it does not fit; the entry is as before.
        """
        before = self._entries.pop(owner, None)
        try:
            self.reserve({owner: n_bytes} if n_bytes else {})
        except CapacityError:
            if before is not None:
                self._entries[owner] = before
            raise

    def release(self, owner: str) -> None:
        """Remove an owner's entry.

        Raises:
            KeyError: there is none, which is a bug of the caller's.
        """
        del self._entries[owner]
