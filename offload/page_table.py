"""Which page is in which slot: leases, victims and prefetches of one pool. No bytes move here.

The three groups a page may be in are told in `slot_book`.
"""

from collections.abc import Sequence
from typing import NamedTuple

from edgeroute.offload.slot_book import Resized, SlotBook
from edgeroute.runtime.errors import CapacityError

__all__ = ["Missing", "PageTable", "Resized"]


class Missing(NamedTuple):
    """A leased page that is not resident yet.

    Where `promote`, its read is under way (as a prefetch, or for another request): wait for
    it, ahead of other prefetches. Else read it into `slot`. Where `cancels` is a page, that
    page's unfinished prefetch writes to this slot: stop it, or wait for it, before reading.
    """

    page: int
    slot: int
    promote: bool = False
    cancels: int | None = None


class PageTable(SlotBook):
    """Leases on the pages of one pool. Not thread-safe: the engine thread owns it.

    Requests are of one layer each, its pages distinct. `begin_step` tells it where tokens
    begin; the policy, the counters and the stay of prefetched pages depend on it.
    """

    # --- the hot path -------------------------------------------------------------------

    def begin_step(self, prefill: bool = False) -> None:
        """Begin a token of decode (or one for each of several sequences), or a ubatch of prefill.

        Prefill leaves the policy's memory as it is, so that its pages do not look popular.
        """
        self._is_prefill = prefill
        self._layer = -1
        if prefill:
            self.counters = self.prefill
        else:
            self.counters = self.decode
            self.step += 1
            self.policy.begin_step()

    def acquire(self, pages: Sequence[int]) -> tuple[list[int], list[Missing]]:
        """Lease the pages of one layer: pin them and give each a slot.

        Args:
            pages: distinct pages of one layer. A repeated page is pinned again and counts
                as a hit again, and must be released as often.

        Returns:
            Their slots, in the order of `pages`, and those that must come before use.

        Raises:
            CapacityError: more pages than slots that can be freed; nothing changed.

        Lifetime: until `release` of the same pages.
        """
        slots = self._slots
        if not pages:
            return [], []
        try:
            found = [slots[page] for page in pages]
        except KeyError:
            return self._acquire_missing(pages)
        pinned = self._pinned
        for page in pages:
            pinned[page] = pinned.get(page, 0) + 1
        layer = self._layer = pages[0] // self._n_expert
        self.counters.hits[layer] += len(pages)
        if self._unused or self._passing or self._is_prefill:
            self._touch(layer, pages, pages)
            return found, []
        step, last = self.step, self._last_step
        for page in pages:
            last[page] = step
        self.policy.used(layer, pages)
        return found, []

    def release(self, pages: Sequence[int]) -> None:
        """Unpin leased pages. One whose read failed gives up its slot with its last pin.

        Raises:
            KeyError: a page is not pinned, which is a bug of the caller's.
        """
        pinned = self._pinned
        for page in pages:
            count = pinned[page]
            if count == 1:
                del pinned[page]
            else:
                pinned[page] = count - 1
        if self._loading:
            self._settle(pages)

    # --- misses -------------------------------------------------------------------------

    def _acquire_missing(self, pages: Sequence[int]) -> tuple[list[int], list[Missing]]:
        slots, loading, pinned = self._slots, self._loading, self._pinned
        layer = pages[0] // self._n_expert
        hits = [page for page in pages if page in slots]
        coming = list(dict.fromkeys(page for page in pages if page in loading))
        absent = [p for p in dict.fromkeys(pages) if p not in slots and p not in loading]
        self._check_pages(absent)
        for page in pages:
            pinned[page] = pinned.get(page, 0) + 1
        if len(absent) > len(self._free):
            self._check_room(pages, len(absent))
        self._layer = layer
        self._touch(layer, hits + coming, pages)
        missing = [Missing(page, loading[page], page not in self._failed) for page in coming]
        self._failed.difference_update(coming)
        for page, (slot, cancels) in zip(absent, self._take_slots(len(absent)), strict=True):
            loading[page] = slot
            self._enter(page)
            missing.append(Missing(page, slot, cancels=cancels))
        counters = self.counters
        n_new = sum(not one.promote for one in missing)
        counters.hits[layer] += len(pages) - len(missing)
        counters.late[layer] += len(missing) - n_new
        counters.misses[layer] += n_new
        counters.demand_bytes[layer] += n_new * counters.page_bytes
        return [slots[page] if page in slots else loading[page] for page in pages], missing

    def _check_pages(self, pages: Sequence[int]) -> None:
        for page in pages:
            if page not in self._pages:
                raise ValueError(f"page {page} is not of this pool of {len(self._pages)} pages")

    def _check_room(self, pages: Sequence[int], n_absent: int) -> None:
        """Refuse a request that does not fit, its pins taken back."""
        n_held = len(self._slots) + len(self._loading)
        n_pinned = len(self._pinned) - n_absent
        if n_absent <= len(self._free) + n_held - n_pinned:
            return
        for page in pages:
            self._pinned[page] -= 1
            if not self._pinned[page]:
                del self._pinned[page]
        raise CapacityError(
            f"a request for {len(set(pages))} pages, {n_absent} of them absent, does not fit "
            f"{self.n_slots} slots of which {len(self._pinned)} are pinned; at least "
            f"{n_pinned + n_absent} slots would do: raise the memory budget or decode fewer "
            f"sequences at once"
        )

    def _touch(self, layer: int, hits: Sequence[int], wanted: Sequence[int]) -> None:
        """Enter uses of pages that have a slot; prefetches that this layer left out pass."""
        unused, passing = self._unused, self._passing
        known: list[int] = []
        new: list[int] = []
        for page in hits:
            if page in unused:
                del unused[page]
                self.counters.prefetch_useful[layer] += 1
                new.append(page)
            elif page in passing:
                del passing[page]
                new.append(page)
            elif page not in new:
                known.append(page)
        if unused:
            self._retire_prefetches(layer, wanted)
        if not self._is_prefill:
            for page in known:
                self._last_step[page] = self.step
            self.policy.used(layer, known)
        for page in new:
            self._enter(page)

    def _retire_prefetches(self, layer: int, wanted: Sequence[int]) -> None:
        """Let prefetched pages of this layer that it did not ask for pass."""
        n_expert = self._n_expert
        for page in [p for p in self._unused if p // n_expert == layer and p not in wanted]:
            self._forget_unused(page)
            self._passing[page] = None

    def _enter(self, page: int) -> None:
        """Put a page that is being asked for, and in no group, into the right one."""
        if self._is_prefill:
            self._passing[page] = None
        else:
            self._last_step[page] = self.step
            self.policy.add(page)

    def _take_slots(self, n: int) -> list[tuple[int, int | None]]:
        """Free n slots, which `_check_room` has found to exist; second, a read to cancel.

        Free ones go first, then passing pages, the policy's victims, unused prefetches, and
        last the slots of prefetches whose read is not done.
        """
        free = self._free
        taken: list[tuple[int, int | None]] = [(free.pop(), None) for _ in range(min(n, len(free)))]
        if len(taken) < n:
            for page in self._idle(self._passing, n - len(taken)):
                taken.append((self._evict(page), None))
        while len(taken) < n and (victim := self.policy.victim(self._pinned)) is not None:
            taken.append((self._evict(victim), None))
        if len(taken) < n:
            for page in self._idle(self._unused, n - len(taken)):
                taken.append((self._evict(page), None))
        if len(taken) < n:
            stoppable = [page for page in self._loading if page not in self._pinned]
            for page in stoppable[: -(n - len(taken)) - 1 : -1]:
                taken.append((self._evict(page), page))
        return taken

    # --- prefetch -----------------------------------------------------------------------

    def reserve_prefetch(self, page: int) -> int | None:
        """Give a predicted page a slot to be read into, if that costs nothing of value.

        Slots are taken that are free, of passing pages, or of the policy's next victim if
        that was not used within the last token cycle: a prediction is worth less than that.

        Returns:
            None where the page has a slot already, or no slot is to be had.
        """
        if page in self._slots or page in self._loading:
            return None
        self._check_pages((page,))
        if self._free:
            slot = self._free.pop()
        else:
            victim = next(iter(self._idle(self._passing, 1)), None)
            if victim is None:
                victim = self.policy.victim(self._pinned)
                if victim is None or self._is_recent(victim):
                    return None
            slot = self._evict(victim)
        self._loading[page] = slot
        self._unused[page] = None
        layer = page // self._n_expert
        self.counters.prefetch_issued[layer] += 1
        self.counters.prefetch_bytes[layer] += self.counters.page_bytes
        return slot

    def _is_recent(self, page: int) -> bool:
        """Whether a page was used since the layer at work was at work one token ago."""
        age = self.step - self._last_step[page]
        return age == 0 or (age == 1 and page // self._n_expert > self._layer)
