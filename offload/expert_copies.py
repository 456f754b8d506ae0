"""Copies of experts in fewer bits: slots of their own, filled for misses of little weight.

Answers `models.copies.CopyPager`. Pages and slots are those of experts, only their types are
others; reads go through the experts' own I/O threads.
"""

import time
from collections.abc import Sequence
from typing import Final

from edgeroute.offload import expert_stats
from edgeroute.offload.expert_pool import ExpertPool, PoolPlan, share_slots
from edgeroute.offload.expert_tier import DEFAULT_POLICY
from edgeroute.offload.slotted_weights import SlottedWeights
from edgeroute.offload.transfer import Ticket, Transfer
from edgeroute.runtime.device import Device
from edgeroute.runtime.weights import Weights

COPIES_FILE: Final = 1
"""Number of the file that has the copies among those that a Transfer reads."""


class ExpertCopies(SlottedWeights):
    """Copies of one model's experts. Not thread-safe: the engine thread owns it.

    Lifetime: owns its slots; `base` and `transfer` must outlive it.
    """

    def __init__(
        self, base: Weights, device: Device, plans: Sequence[PoolPlan], transfer: Transfer,
        slots_bytes: int,
    ) -> None:  # fmt: skip
        """Reserve the slots; nothing is read yet.

        Args:
            base: answers what is no expert.
            device: where to.
            plans: the experts as the copies' file has them.
            transfer: reads that file as number COPIES_FILE.
            slots_bytes: for slots, of which every pool gets one at least.

        Raises:
            CapacityError: the budget or the device holds too little.
        """
        super().__init__(base, device, plans, share_slots(plans, slots_bytes, 1), DEFAULT_POLICY)
        self._transfer = transfer
        self._held: tuple[ExpertPool, list[int], list[int]] | None = None
        self._ticket: Ticket | None = None

    def begin(self) -> None:
        """Begin a pass over the model."""
        for pool in self.pools:
            pool.table.begin_step()

    def max_at_once(self, il: int) -> int:
        """Return how many copies of a layer's experts can be held at the same time."""
        return self._pool_of[il].table.n_slots

    def lease(self, il: int, experts: Sequence[int]) -> None:
        """Begin to hold distinct experts' copies."""
        self.end()
        pool = self._pool_of[il]
        pages = [il * self._n_expert + expert for expert in experts]
        slots, missing = pool.table.acquire(pages)
        self._held = pool, pages, slots
        jobs = [pool.job(one.page, one.slot) for one in missing]
        if not jobs:
            return
        try:
            self._ticket = self._transfer.load(jobs)
        except BaseException:
            for job in jobs:
                pool.table.failed(job.id)
            raise

    def arrive(self) -> list[int]:
        """Wait for the copies of the latest lease."""
        assert self._held is not None, "nothing was leased"
        pool, pages, slots = self._held
        if self._ticket is not None:
            began = time.perf_counter()
            try:
                self._transfer.wait(self._ticket)
            finally:
                waited_s = time.perf_counter() - began
                pool.table.counters.stalled(pages[0] // self._n_expert, waited_s)
                self._book(pool)
        return slots

    def end(self) -> None:
        """Let go of everything held, whatever has happened."""
        if self._held is None:
            return
        pool, pages, _ = self._held
        self._book(pool)
        self._held = None
        pool.table.release(pages)

    def _book(self, pool: ExpertPool) -> None:
        """Enter how the reads ended, once all of them have."""
        ticket, self._ticket = self._ticket, None
        if ticket is None:
            return
        if not ticket.done:
            self._transfer.cancel(ticket)
            with ticket.finished:
                pass
        for result in ticket.results:
            (pool.table.loaded if result.outcome == "ok" else pool.table.failed)(result.id)

    def stats(self) -> dict[str, object]:
        """Return what they cost so far, as plain JSON types."""
        spent = expert_stats.spent(self.pools)
        return {
            "n_slots": sum(pool.table.n_slots for pool in self.pools),
            "slots_bytes": self.slots_bytes,
            **spent.to_dict(),
        }

    def close(self) -> None:
        """Free the slots; safe to call twice."""
        self._close_pools()
        self.pools.clear()
