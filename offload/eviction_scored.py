"""Eviction policies that keep a score per page: frequency, hot sets, HOBBIT's sum."""

import heapq
from collections import OrderedDict
from collections.abc import Callable, Collection, Container, Sequence

from edgeroute.offload.eviction import PolicyParams, PoolShape


class LazyHeap:
    """Members by a key that only grows, smallest first; growing a key costs nothing.

    An entry holds the key as it was when pushed, a lower bound; `peek` pushes it again until
    the smallest entry is true. So a use is O(1) and a victim O(log n), amortised.
    """

    __slots__ = ("_entries", "_key", "_members")

    def __init__(self, key: Callable[[int], tuple[float, int]]) -> None:
        self._key = key
        self._entries: list[tuple[tuple[float, int], int]] = []
        self._members: set[int] = set()

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, page: int) -> bool:
        return page in self._members

    def floor(self) -> float | None:
        """A lower bound of the smallest key's first part; None when there is no entry."""
        return self._entries[0][0][0] if self._entries else None

    def members(self) -> Collection[int]:
        """The pages inside."""
        return self._members

    def add(self, page: int) -> None:
        """Enter a page. One that left and comes back may have two entries; either is true."""
        self._members.add(page)
        heapq.heappush(self._entries, (self._key(page), page))
        if len(self._entries) > 64 + 4 * len(self._members):
            self.rebuild()

    def remove(self, page: int) -> None:
        """Take a page out; its entry goes when it comes to the top."""
        self._members.remove(page)

    def rebuild(self) -> None:
        """Sort anew, after keys were scaled down."""
        self._entries = [(self._key(page), page) for page in self._members]
        heapq.heapify(self._entries)

    def peek(self, pinned: Container[int]) -> int | None:
        """Name the member with the smallest key that is not pinned."""
        entries, members, key = self._entries, self._members, self._key
        aside: list[tuple[tuple[float, int], int]] = []
        found = None
        while entries:
            entry = entries[0]
            page = entry[1]
            if page not in members:
                heapq.heappop(entries)
            elif entry[0] != (now := key(page)):
                heapq.heapreplace(entries, (now, page))
            elif page in pinned:
                aside.append(heapq.heappop(entries))
            else:
                found = page
                break
        for entry in aside:
            heapq.heappush(entries, entry)
        return found


class Lfu:
    """Least frequently used, old uses fading by `decay` a token; ties by oldest use.

    Counts cover pages that left as well. They are kept as sum(decay**-t) over uses at tokens
    t, which orders pages as sum(decay**(now - t)) does and needs no work as time passes.
    Source: D. Lee et al. 2001, LRFU (the combined recency and frequency value).
    """

    name = "lfu"
    _LARGEST = 1e100

    def __init__(self, shape: PoolShape, n_slots: int, params: PolicyParams) -> None:
        self._growth = 1.0 / params.decay
        self._weight = 1.0
        self._frequency = [0.0] * shape.n_page_ids
        self._last = [0] * shape.n_page_ids
        self._tick = 0
        self._heap = LazyHeap(lambda page: (self._frequency[page], self._last[page]))

    def begin_step(self) -> None:
        self._weight *= self._growth
        if self._weight > self._LARGEST:
            self._frequency = [value / self._weight for value in self._frequency]
            self._weight = 1.0
            self._heap.rebuild()

    def used(self, layer: int, pages: Sequence[int]) -> None:
        frequency, last, weight, tick = self._frequency, self._last, self._weight, self._tick
        for page in pages:
            tick += 1
            frequency[page] += weight
            last[page] = tick
        self._tick = tick

    def add(self, page: int) -> None:
        self.count(page)
        self._heap.add(page)

    def count(self, page: int) -> None:
        """Enter one use of a page."""
        self._tick += 1
        self._frequency[page] += self._weight
        self._last[page] = self._tick

    def remove(self, page: int) -> None:
        self._heap.remove(page)

    def victim(self, pinned: Container[int]) -> int | None:
        return self._heap.peek(pinned)

    def members(self) -> Collection[int]:
        return self._heap.members()


class Lfru(Lfu):
    """A privileged part by recency, the rest by fading frequency.

    A page enters privileged, and becomes so again when used again; the least recently used
    privileged one steps down when that part exceeds `protected_ratio` of the slots. Victims
    are the least frequent of the unprivileged, then the oldest of the privileged.
    Source: M. Bilal, S.-G. Kang 2017, LFRU for cache networks; the fading is `lfu`'s.
    """

    name = "lfru"

    def __init__(self, shape: PoolShape, n_slots: int, params: PolicyParams) -> None:
        super().__init__(shape, n_slots, params)
        self._n_privileged = max(1, int(n_slots * params.protected_ratio))
        self._privileged: OrderedDict[int, None] = OrderedDict()

    def used(self, layer: int, pages: Sequence[int]) -> None:
        super().used(layer, pages)
        privileged = self._privileged
        for page in pages:
            if page in privileged:
                privileged.move_to_end(page)
            else:
                self._heap.remove(page)
                self._promote(page)

    def add(self, page: int) -> None:
        self.count(page)
        self._promote(page)

    def _promote(self, page: int) -> None:
        self._privileged[page] = None
        if len(self._privileged) > self._n_privileged:
            self._heap.add(self._privileged.popitem(last=False)[0])

    def remove(self, page: int) -> None:
        if page in self._privileged:
            del self._privileged[page]
        else:
            self._heap.remove(page)

    def victim(self, pinned: Container[int]) -> int | None:
        found = self._heap.peek(pinned)
        if found is not None:
            return found
        return next((page for page in self._privileged if page not in pinned), None)

    def members(self) -> Collection[int]:
        return self._heap.members() | self._privileged.keys()


class Static:
    """A fixed hot set: the most used pages of a trace, or of the first tokens, stay.

    Cold pages leave first, oldest first; then the least used of the hot. With as many slots
    as hot pages, the least used one is given up to make room for the cold.
    """

    name = "static"

    def __init__(self, shape: PoolShape, n_slots: int, params: PolicyParams) -> None:
        self._n_slots = n_slots
        self._counts = [0] * shape.n_page_ids
        self._warmup = 0 if params.hot_counts else params.warmup_tokens + 1
        self._rank = [0] * shape.n_page_ids
        self._hot: set[int] = set()
        self._cold: OrderedDict[int, None] = OrderedDict()
        self._heap = LazyHeap(lambda page: (-self._rank[page], page))
        for page, count in params.hot_counts.items():
            if 0 <= page < shape.n_page_ids:
                self._counts[page] = count
        if params.hot_counts:
            self._freeze()

    def _freeze(self) -> None:
        """Fix the hot set from the counts; ties go to the smaller page number."""
        seen = [page for page, count in enumerate(self._counts) if count > 0]
        seen.sort(key=lambda page: (-self._counts[page], page))
        for rank, page in enumerate(seen[: self._n_slots]):
            self._rank[page] = rank
            self._hot.add(page)
        for page in [page for page in self._cold if page in self._hot]:
            del self._cold[page]
            self._heap.add(page)

    def begin_step(self) -> None:
        if self._warmup:
            self._warmup -= 1
            if not self._warmup:
                self._freeze()

    def used(self, layer: int, pages: Sequence[int]) -> None:
        hot, move = self._hot, self._cold.move_to_end
        for page in pages:
            if page not in hot:
                move(page)
        if self._warmup:
            self._count(pages)

    def add(self, page: int) -> None:
        if page in self._hot:
            self._heap.add(page)
        else:
            self._cold[page] = None
        if self._warmup:
            self._count((page,))

    def _count(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._counts[page] += 1

    def remove(self, page: int) -> None:
        if page in self._hot:
            self._heap.remove(page)
        else:
            del self._cold[page]

    def victim(self, pinned: Container[int]) -> int | None:
        for page in self._cold:
            if page not in pinned:
                return page
        return self._heap.peek(pinned)

    def members(self) -> Collection[int]:
        return self._heap.members() | self._cold.keys()


class Hobbit:
    """The weighted sum of recency, frequency and layer distance; the smallest leaves.

    score = w_r * R / T + w_f * F / T + w_d * (1 - ((layer of the page - layer at work) mod L) / L)
    with R the token of the last use, F the number of uses, T the tokens so far. Ties go to
    the older use. Experts have one precision here, so the paper's fourth term, uses in high
    precision, is the second. The paper starts anew with each sequence; sequences share
    batches here, so the past is halved every `window` tokens instead, which also keeps a
    difference in R worth something.
    Source: HOBBIT 2024, section on the multidimensional cache.
    """

    name = "hobbit"

    def __init__(self, shape: PoolShape, n_slots: int, params: PolicyParams) -> None:
        total = sum(params.weights)
        self._by_recency, self._by_frequency, self._by_distance = (
            weight / total for weight in params.weights
        )
        self._window = params.window
        self._n_expert, self._n_layer = shape.n_expert, shape.n_layer
        self._layer, self._token, self._tick = 0, 1, 0
        self._recency = [0.0] * shape.n_page_ids
        self._frequency = [0.0] * shape.n_page_ids
        self._last = [0] * shape.n_page_ids
        self._base = [0.0] * shape.n_page_ids
        self._heaps = [LazyHeap(self._key) for _ in range(shape.n_layer)]

    def _key(self, page: int) -> tuple[float, int]:
        return self._base[page], self._last[page]

    def begin_step(self) -> None:
        self._token += 1
        if self._token == 2 * self._window:
            self._halve()

    def _halve(self) -> None:
        self._token = self._window
        self._recency = [max(0.0, token - self._window) for token in self._recency]
        self._frequency = [count / 2 for count in self._frequency]
        self._base = [
            self._by_recency * token + self._by_frequency * count
            for token, count in zip(self._recency, self._frequency, strict=True)
        ]
        for heap in self._heaps:
            heap.rebuild()

    def used(self, layer: int, pages: Sequence[int]) -> None:
        self._layer = layer
        for page in pages:
            self._count(page)

    def _count(self, page: int) -> None:
        self._tick += 1
        self._last[page] = self._tick
        self._recency[page] = self._token
        self._frequency[page] += 1
        self._base[page] = (
            self._by_recency * self._token + self._by_frequency * self._frequency[page]
        )

    def add(self, page: int) -> None:
        self._count(page)
        self._heaps[page // self._n_expert].add(page)

    def remove(self, page: int) -> None:
        self._heaps[page // self._n_expert].remove(page)

    def victim(self, pinned: Container[int]) -> int | None:
        best: tuple[float, int, int] | None = None
        n_layer, by_distance, token = self._n_layer, self._by_distance, self._token
        for distance in range(n_layer - 1, -1, -1):
            heap = self._heaps[(self._layer + distance) % n_layer]
            floor = heap.floor()
            near = by_distance * (1 - distance / n_layer)
            if floor is None or (best is not None and floor / token + near > best[0]):
                continue
            page = heap.peek(pinned)
            if page is not None:
                score = (self._base[page] / token + near, self._last[page], page)
                best = score if best is None else min(best, score)
        return None if best is None else best[2]

    def members(self) -> Collection[int]:
        return {page for heap in self._heaps for page in heap.members()}
