"""Belady's optimum: evict what is needed last. Needs the future, so only replay has it."""

import heapq
from collections.abc import Collection, Container, Iterable, Sequence

from edgeroute.offload.eviction import PoolShape

_NEVER = 1 << 62


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
        for when, pages in enumerate(future):
            for page in pages:
                self._uses[page].append(when)
        for uses in self._uses:
            uses.reverse()  # the next use is then popped from the end
        self._members: set[int] = set()
        self._entries: list[tuple[int, int]] = []

    def begin_step(self) -> None:
        """Positions in the future are the clock."""

    def used(self, layer: int, pages: Sequence[int]) -> None:
        for page in pages:
            self._advance(page)

    def _advance(self, page: int) -> None:
        """Pass the use that is happening now."""
        uses = self._uses[page]
        if uses:
            uses.pop()
        heapq.heappush(self._entries, (-self._next(page), page))

    def _next(self, page: int) -> int:
        uses = self._uses[page]
        return uses[-1] if uses else _NEVER

    def add(self, page: int) -> None:
        self._members.add(page)
        self._advance(page)

    def remove(self, page: int) -> None:
        self._members.remove(page)

    def victim(self, pinned: Container[int]) -> int | None:
        aside, found = [], None
        while self._entries:
            when, page = self._entries[0]
            if page not in self._members or -when != self._next(page):
                heapq.heappop(self._entries)
            elif page in pinned:
                aside.append(heapq.heappop(self._entries))
            else:
                found = page
                break
        for entry in aside:
            heapq.heappush(self._entries, entry)
        return found

    def members(self) -> Collection[int]:
        return self._members
