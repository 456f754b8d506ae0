"""Which resident page leaves when another needs its slot: plug-ins behind one protocol.

The page table tells a policy what enters, is used and leaves, and asks for one victim at a
time. Every policy is deterministic (`random` from its seed), so a replayed trace gives the
counters of the live run. Here are the protocol and the policies by order of use; those that
keep a score are in `eviction_scored`, the optimum, which needs the future, in
`eviction_oracle`, and all names in `eviction_registry`.
"""

import random
from collections import OrderedDict
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from edgeroute.runtime.errors import UsageError

MAX_PAGES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolShape:
    """The pages that share one pool of slots.

    `pages` are `layer * n_expert + expert`; every page of the pool has `page_bytes` bytes.

    Raises:
        UsageError: no page, a negative one, or one beyond any model's.
    """

    pages: Collection[int]
    n_expert: int
    page_bytes: int = 0

    def __post_init__(self) -> None:
        if self.n_expert < 1 or self.page_bytes < 0:
            raise UsageError(
                f"a pool needs n_expert >= 1 and page_bytes >= 0, got {self.n_expert} and "
                f"{self.page_bytes}"
            )
        if not self.pages or min(self.pages) < 0 or max(self.pages) >= MAX_PAGES:
            raise UsageError(
                f"a pool's pages must be numbers from 0 to {MAX_PAGES - 1}, at least one; "
                f"got {len(self.pages)} pages"
            )

    @property
    def n_page_ids(self) -> int:
        """One more than the largest page: the length of a list indexed by page."""
        return max(self.pages) + 1

    @property
    def n_layer(self) -> int:
        """One more than the last layer that has a page here."""
        return max(self.pages) // self.n_expert + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyParams:
    """What the policies can be tuned by; each reads only its own.

    `decay` multiplies every use count once a token (lfu, lfru). `protected_ratio` is lfru's
    privileged share of the slots. `weights` are hobbit's for recency, frequency and layer
    distance, and `window` the tokens after which it halves its past. `hot_counts` are uses
    per page from a trace for static; without them it counts `warmup_tokens` tokens itself.

    Raises:
        UsageError: a value outside its range.
    """

    seed: int = 0
    decay: float = 0.98
    protected_ratio: float = 0.5
    weights: tuple[float, float, float] = (0.6, 0.2, 0.2)
    window: int = 256
    hot_counts: Mapping[int, int] = field(default_factory=dict)
    warmup_tokens: int = 32

    def __post_init__(self) -> None:
        _check("decay", self.decay, 0.01 <= self.decay <= 1, "0.01 to 1")
        _check(
            "protected_ratio", self.protected_ratio, 0 <= self.protected_ratio < 1, "0 to below 1"
        )
        good = min(self.weights) >= 0 and sum(self.weights) > 0
        _check("weights", self.weights, good, "none negative, not all zero")
        _check("window", self.window, self.window >= 2, "2 or more")
        _check("warmup_tokens", self.warmup_tokens, self.warmup_tokens >= 1, "1 or more")


def _check(name: str, value: object, good: bool, expected: str) -> None:
    if not good:
        raise UsageError(f"eviction parameter {name} is {value!r}; expected {expected}")


class EvictionPolicy(Protocol):
    """Orders the pages that the table has told it of (its members)."""

    name: str

    def begin_step(self) -> None:
        """A token of decode begins."""

    def used(self, layer: int, pages: Sequence[int]) -> None:
        """Layer `layer` is at work and found these members; called even when it found none."""

    def add(self, page: int) -> None:
        """A page was loaded because the layer at work asked for it."""

    def remove(self, page: int) -> None:
        """A member left."""

    def victim(self, pinned: Container[int]) -> int | None:
        """Name the member to evict next, none of `pinned`; it stays a member until removed."""

    def members(self) -> Collection[int]:
        """All pages added and not removed."""


class Lru:
    """Least recently used. Source: L. A. Belady 1966 and folklore; the baseline of all."""

    name = "lru"

    def __init__(self, shape: PoolShape, n_slots: int, params: PolicyParams) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def begin_step(self) -> None:
        """Recency needs no clock."""

    def used(self, layer: int, pages: Sequence[int]) -> None:
        move = self._order.move_to_end
        for page in pages:
            move(page)

    def add(self, page: int) -> None:
        self._order[page] = None

    def remove(self, page: int) -> None:
        del self._order[page]

    def victim(self, pinned: Container[int]) -> int | None:
        for page in self._order:
            if page not in pinned:
                return page
        return None

    def members(self) -> Collection[int]:
        return self._order.keys()


class Mru(Lru):
    """Most recently used: keeps an unchanging part of a cycle that is longer than the slots."""

    name = "mru"

    def victim(self, pinned: Container[int]) -> int | None:
        for page in reversed(self._order):
            if page not in pinned:
                return page
        return None


class LeastStale(Lru):
    """Pages passed over in the last token cycle first, then the farthest from its next turn.

    A page is stale when its layer came, at this token or an earlier one, and did not ask for
    it. Stale pages leave oldest first, as in LRU. When none is left, the slots are fewer than
    one cycle, and LRU would evict what is needed next; here the most recently used page
    leaves, whose layer is the last to come round. So a short cache keeps part of a cycle.
    Source: SpecMD 2026 (Least-Stale), in this reading: layers run in ascending order, which
    makes the stale pages a prefix of the order of use, and both choices O(1).
    """

    name = "least-stale"

    def __init__(self, shape: PoolShape, n_slots: int, params: PolicyParams) -> None:
        super().__init__(shape, n_slots, params)
        self._n_expert = shape.n_expert
        self._step = 0
        self._layer = -1
        self._last = [0] * shape.n_page_ids

    def begin_step(self) -> None:
        self._step += 1
        self._layer = -1

    def used(self, layer: int, pages: Sequence[int]) -> None:
        self._layer = layer
        step, last, move = self._step, self._last, self._order.move_to_end
        for page in pages:
            last[page] = step
            move(page)

    def add(self, page: int) -> None:
        self._order[page] = None
        self._last[page] = self._step

    def victim(self, pinned: Container[int]) -> int | None:
        oldest = super().victim(pinned)
        if oldest is None or self._is_stale(oldest):
            return oldest
        return next(page for page in reversed(self._order) if page not in pinned)

    def _is_stale(self, page: int) -> bool:
        age = self._step - self._last[page]
        return age > 1 or (age == 1 and page // self._n_expert <= self._layer)


class Random:
    """A seeded choice: the control that any other policy must beat."""

    name = "random"
    _TRIES = 32

    def __init__(self, shape: PoolShape, n_slots: int, params: PolicyParams) -> None:
        self._random = random.Random(params.seed)
        self._pages: list[int] = []
        self._where: dict[int, int] = {}

    def begin_step(self) -> None:
        """Chance needs no clock."""

    def used(self, layer: int, pages: Sequence[int]) -> None:
        """Chance remembers nothing."""

    def add(self, page: int) -> None:
        self._where[page] = len(self._pages)
        self._pages.append(page)

    def remove(self, page: int) -> None:
        hole, last = self._where.pop(page), self._pages.pop()
        if last != page:
            self._pages[hole] = last
            self._where[last] = hole

    def victim(self, pinned: Container[int]) -> int | None:
        n = len(self._pages)
        for _ in range(min(n, self._TRIES)):
            page = self._pages[int(self._random.random() * n)]
            if page not in pinned:
                return page
        free = [page for page in self._pages if page not in pinned]
        return self._random.choice(free) if free else None

    def members(self) -> Collection[int]:
        return self._where.keys()


def check_empty(n_slots: int, policy: EvictionPolicy) -> None:
    """Refuse to begin a table of pages that has no slot, or whose policy knows other pages.

    Raises:
        UsageError: no slot, or a policy that already has members.
    """
    if n_slots < 1:
        raise UsageError(f"a pool needs at least 1 slot, got {n_slots}")
    if policy.members():
        raise UsageError(f"policy {policy.name} already has members; make one per table")
