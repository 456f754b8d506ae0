"""The cache that knows the next m tokens, as an eviction policy of the live page table."""

import heapq
from collections.abc import Collection, Container, Sequence

from edgeroute.offload.eviction import PoolShape
from edgeroute.runtime.errors import UsageError


class SegmentOracle:
    """Fewest uses in the next m tokens leaves first, of equals the longest unused.

    The rule of SCH under a runtime's conditions: layer after layer, one pool for all of them,
    and pages at work stay. It needs the future, so only replay has it. Every page's layer comes
    up m times in the next m tokens, those of this token among them that are still to come.

    Args:
        steps: the distinct pages that each decode step's layers will ask for, in order.
        m: tokens, that is steps, known beforehand.

    Raises:
        UsageError: m below 1.

    Source: arXiv 2505.16056, section 3.
    """

    name = "sch"

    def __init__(self, shape: PoolShape, steps: Sequence[Sequence[Sequence[int]]], m: int) -> None:
        if m < 1:
            raise UsageError(f"a segment has at least 1 token, got {m}")
        self._requests = [pages for wanted in steps for pages in wanted]
        # The window of a request ends with the request at the same place m steps on.
        ends = [0]
        for wanted in steps:
            ends.append(ends[-1] + len(wanted))
        last = len(steps) - 1
        self._ends = [
            min(ends[at + m] + place + 1, ends[at + m + 1]) if at + m <= last else ends[-1]
            for at, wanted in enumerate(steps)
            for place in range(len(wanted))
        ]
        self._now = -1
        self._end = 0
        self._tick = 0
        self._coming = [0] * shape.n_page_ids
        self._last = [0] * shape.n_page_ids
        self._members: set[int] = set()
        self._entries: list[tuple[int, int, int]] = []

    def begin_step(self) -> None:
        """Requests are the clock."""

    def used(self, layer: int, pages: Sequence[int]) -> None:
        self._advance()
        for page in pages:
            self._use(page)

    def _advance(self) -> None:
        """Move the window on to what follows the request that is happening now."""
        self._now += 1
        coming, members = self._coming, self._members
        moved: list[int] = []
        while self._end < self._ends[self._now]:
            for page in self._requests[self._end]:
                coming[page] += 1
                moved.append(page)
            self._end += 1
        for page in self._requests[self._now]:
            coming[page] -= 1
            moved.append(page)
        for page in moved:
            if page in members:
                self._push(page)

    def _use(self, page: int) -> None:
        self._tick += 1
        self._last[page] = self._tick
        self._push(page)

    def _push(self, page: int) -> None:
        if len(self._entries) > 4 * len(self._members) + 1024:  # mostly outdated
            self._entries = [self._entry(member) for member in self._members]
            heapq.heapify(self._entries)
        heapq.heappush(self._entries, self._entry(page))

    def _entry(self, page: int) -> tuple[int, int, int]:
        return self._coming[page], self._last[page], page

    def add(self, page: int) -> None:
        self._members.add(page)
        self._use(page)

    def remove(self, page: int) -> None:
        self._members.remove(page)

    def victim(self, pinned: Container[int]) -> int | None:
        aside, found = [], None
        while self._entries:
            entry = self._entries[0]
            page = entry[2]
            if page not in self._members or entry != self._entry(page):
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
