"""Adapters of the small model of a pair: held for an answer from before its first token to its end.

They are the small model's own library, in slots of its own. What the large model uses is held by
the Scheduler, as without a small one.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeroute.request import Request

if TYPE_CHECKING:
    from edgeroute.adapters import Adapters
    from edgeroute.offload.adapter_store import Lease
    from edgeroute.runtime.lora import LoraRow


@dataclass(slots=True, kw_only=True, eq=False)
class SmallHeld:
    """What is held for one request, and how long that took to arrive."""

    lease: "Lease"
    since: float
    wait_s: float = 0.0

    @property
    def row(self) -> "LoraRow | None":
        """What it adds to a pass of the small model."""
        return self.lease.row

    @property
    def key(self) -> str | None:
        """What the small model's keys and values depend on by it."""
        return self.lease.key


class SmallAdapters:
    """Holds adapters of the small model for requests. The engine thread owns it.

    Args:
        adapters: the small model's library; None where it has none.
    """

    def __init__(self, adapters: "Adapters | None") -> None:
        self._adapters = adapters

    def hold(self, request: Request) -> bool:
        """Lease what a request asks for and begin to load it; False while there is no room.

        Raises:
            CapacityError: it can never fit.
            AdapterFileError: one of them could not be read just now.
        """
        if self._adapters is None or not request.small_adapter or request.small_held is not None:
            return True
        lease = self._adapters.store.lease(request.small_adapter)
        if lease is not None:
            request.small_held = SmallHeld(lease=lease, since=time.monotonic())
        return lease is not None

    def has_arrived(self, request: Request) -> bool:
        """Whether all that a request holds is in its slots.

        Raises:
            AdapterFileError: an adapter cannot be read.
        """
        held = request.small_held
        if self._adapters is None or held is None:
            return True
        if not self._adapters.store.ready(held.lease):
            return False
        if not held.wait_s:  # asked again where there are no cells yet
            held.wait_s = time.monotonic() - held.since
        return True

    def release(self, request: Request) -> None:
        """Give back what a request holds; safe to call twice."""
        if self._adapters is not None and request.small_held is not None:
            self._adapters.store.release(request.small_held.lease)

    def stats(self) -> dict[str, object]:
        """Return the library's names and what is where, as plain JSON types; empty without one."""
        if self._adapters is None:
            return {}
        store = self._adapters.store
        return {"adapters": {"names": store.names} | store.stats()}
