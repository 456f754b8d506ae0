"""The page table as a replay needs it: pages come at once and are let go at once.

No slots are numbered, no reads are under way, nothing is prefetched or stays pinned, so a
request is a few set operations. Counts are those of `PageTable`, bit for bit; tests compare.
"""

from collections.abc import Sequence, Set

from edgeroute.offload.counters import LayerCounters
from edgeroute.offload.eviction import EvictionPolicy, PoolShape, check_empty
from edgeroute.runtime.errors import CapacityError


class ReplayTable:
    """Which pages of a pool are resident, request after request.

    Pages of prefill pass: they give way before the policy's own, the newest first, as in
    `SlotBook`.
    """

    def __init__(self, n_slots: int, policy: EvictionPolicy, shape: PoolShape) -> None:
        """Begin with empty slots.

        Raises:
            UsageError: no slot, or a policy that already has members.
        """
        check_empty(n_slots, policy)
        self.policy = policy
        self.n_slots = n_slots
        self.decode = LayerCounters(shape.n_layer, shape.page_bytes)
        self.prefill = LayerCounters(shape.n_layer, shape.page_bytes)
        self._n_expert, self._page_bytes = shape.n_expert, shape.page_bytes
        self._here: set[int] = set()
        self._passing: dict[int, None] = {}

    def run_step(self, prefill: bool, wanted: Sequence[Sequence[int]]) -> None:
        """Ask for the distinct pages of layer after layer.

        Raises:
            CapacityError: a layer asks for more pages than there are slots.
        """
        counters = self.prefill if prefill else self.decode
        if not prefill:
            self.policy.begin_step()
        has_all, used, n_expert = self._here.issuperset, self.policy.used, self._n_expert
        hits, passing = counters.hits, self._passing
        for pages in wanted:
            if not pages:
                continue
            if prefill or passing:
                self._ask_passing(pages, counters, prefill=prefill)
            elif has_all(pages):
                layer = pages[0] // n_expert
                hits[layer] += len(pages)
                used(layer, pages)
            else:
                self._ask(pages, counters)

    def _ask(self, pages: Sequence[int], counters: LayerCounters) -> None:
        """Decode with no page passing: some pages are absent."""
        here, policy = self._here, self.policy
        layer = pages[0] // self._n_expert
        found = [page for page in pages if page in here]
        absent = [page for page in pages if page not in here]
        self._check_room(len(pages), len(absent))
        policy.used(layer, found)
        self._make_room(len(absent), pages, counters)
        add = policy.add
        for page in absent:
            add(page)
        here.update(absent)
        self._count(layer, len(found), len(absent), counters)

    def _ask_passing(self, pages: Sequence[int], counters: LayerCounters, *, prefill: bool) -> None:
        """Prefill, or decode while pages of prefill are there."""
        here, passing, policy = self._here, self._passing, self.policy
        layer = pages[0] // self._n_expert
        found = [page for page in pages if page in here]
        absent = [page for page in pages if page not in here]
        self._check_room(len(pages), len(absent))
        known = [page for page in found if page not in passing]
        new = [page for page in found if page in passing]
        for page in new:
            del passing[page]
        if not prefill:
            policy.used(layer, known)
        self._enter(new, prefill=prefill)
        self._make_room(len(absent), pages, counters)
        self._enter(absent, prefill=prefill)
        here.update(absent)
        self._count(layer, len(found), len(absent), counters)

    def _check_room(self, n: int, n_absent: int) -> None:
        if n > self.n_slots:
            raise CapacityError(
                f"a request for {n} pages, {n_absent} of them absent, does not fit {self.n_slots} "
                f"slots; at least {n} slots would do: raise the memory budget or decode fewer "
                f"sequences at once"
            )

    def _enter(self, pages: Sequence[int], *, prefill: bool) -> None:
        if prefill:
            self._passing.update(dict.fromkeys(pages))
        else:
            for page in pages:
                self.policy.add(page)

    def _make_room(self, n: int, pages: Sequence[int], counters: LayerCounters) -> None:
        """Have n pages leave beyond what is free, none of those asked for."""
        here, policy, evictions = self._here, self.policy, counters.evictions
        n -= self.n_slots - len(here)
        if n <= 0:
            return
        pinned: Set[int] = frozenset(pages)
        if self._passing:
            for page in [page for page in reversed(self._passing) if page not in pinned][:n]:
                del self._passing[page]
                here.remove(page)
                evictions[page // self._n_expert] += 1
                n -= 1
        for _ in range(n):
            victim = policy.victim(pinned)
            assert victim is not None  # the request fits, and all else is a member
            policy.remove(victim)
            here.remove(victim)
            evictions[victim // self._n_expert] += 1

    def _count(self, layer: int, n_found: int, n_absent: int, counters: LayerCounters) -> None:
        counters.hits[layer] += n_found
        counters.misses[layer] += n_absent
        counters.demand_bytes[layer] += n_absent * self._page_bytes
