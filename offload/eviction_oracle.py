"""Belady's optimum: evict what is needed last. Needs the future, so only replay has it."""

import heapq
from collections.abc import Collection, Container, Iterable, Sequence

from edgeroute.offload.eviction import MAX_PAGES, PoolShape

_NEVER = 1 << 40
_SPARE = 1024


class Belady:
    """Furthest next use leaves first.

    With all pages of a request needed at once, any schedule that evicts another page can be
    changed into this one without a further miss, so no policy has more hits on the same
    trace and slots.

    Args:
        future: the distinct pages of every request to come, in order.

    Source: L. A. Belady 1966 (MIN).
    """

    name = "belady"

    def __init__(self, shape: PoolShape, future: Iterable[Sequence[int]]) -> None:
        self._uses: list[list[int]] = [[] for _ in range(shape.n_page_ids)]
        uses = self._uses
        for when, pages in enumerate(future):
            for page in pages:
                uses[page].append(when)
        for times in uses:
            times.append(_NEVER)
            times.reverse()  # the next use is then the last, and passing it is a pop
        self._members: set[int] = set()
        # A page and its next use in one number, the furthest first, ties by page.
        self._entries: list[int] = []

    def begin_step(self) -> None:
        """Positions in the future are the clock."""

    def used(self, layer: int, pages: Sequence[int]) -> None:
        uses, entries, push = self._uses, self._entries, heapq.heappush
        for page in pages:
            times = uses[page]
            if len(times) > 1:
                times.pop()
            push(entries, page - times[-1] * MAX_PAGES)
        if len(entries) > _SPARE + 4 * len(self._members):
            self._rebuild()

    def _rebuild(self) -> None:
        """Drop entries of uses that have passed."""
        uses = self._uses
        self._entries[:] = [page - uses[page][-1] * MAX_PAGES for page in self._members]
        heapq.heapify(self._entries)

    def add(self, page: int) -> None:
        self._members.add(page)
        self.used(-1, (page,))

    def remove(self, page: int) -> None:
        self._members.remove(page)

    def victim(self, pinned: Container[int]) -> int | None:
        entries, members, uses = self._entries, self._members, self._uses
        aside, found = [], None
        while entries:
            entry = entries[0]
            page = entry % MAX_PAGES
            if page not in members or page - uses[page][-1] * MAX_PAGES != entry:
                heapq.heappop(entries)
            elif page in pinned:
                aside.append(heapq.heappop(entries))
            else:
                found = page
                break
        for entry in aside:
            heapq.heappush(entries, entry)
        return found

    def members(self) -> Collection[int]:
        return self._members
