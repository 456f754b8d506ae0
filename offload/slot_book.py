"""What every slot of a pool holds, and in which state: the book under the page table.

Every page that has a slot is in exactly one of three groups:

- **members** of the eviction policy: asked for while decoding.
- **unused**: prefetched, and not asked for yet, whether on the way or here.
- **passing**: asked for in prefill only, prefetched in vain, or abandoned by its request
  before it came. They give way before any member does, the newest first, so that a long
  prompt cycles through few slots and the pages that decoding lives on stay.

Independently of that a page is resident or on its way (loading), and pinned or not.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from edgeroute.offload.counters import LayerCounters
from edgeroute.offload.eviction import EvictionPolicy, PoolShape, check_empty
from edgeroute.runtime.errors import UsageError


class Resized(NamedTuple):
    """What `resize` did: pages that lost their slot, slots given up, slots gained."""

    evicted: list[int]
    retired: list[int]
    gained: list[int]


class SlotBook:
    """Slots, groups and pins of one pool. Not thread-safe: the engine thread owns it."""

    def __init__(self, n_slots: int, policy: EvictionPolicy, shape: PoolShape) -> None:
        """Begin with empty slots 0 to n_slots - 1.

        Raises:
            UsageError: no slot, or a policy that already has members.
        """
        check_empty(n_slots, policy)
        self.shape = shape
        self.policy = policy
        self.decode = LayerCounters(shape.n_layer, shape.page_bytes)
        self.prefill = LayerCounters(shape.n_layer, shape.page_bytes)
        self.counters = self.decode  # those of the step at work
        self.n_slots = n_slots
        self.step = 0
        self._n_expert = shape.n_expert
        self._pages = shape.pages if isinstance(shape.pages, range) else frozenset(shape.pages)
        self._is_prefill = False
        self._layer = -1
        self._slots: dict[int, int] = {}
        self._loading: dict[int, int] = {}
        self._failed: set[int] = set()
        self._pinned: dict[int, int] = {}
        self._unused: dict[int, None] = {}
        self._passing: dict[int, None] = {}
        self._last_step = [-2] * shape.n_page_ids
        self._free = list(range(n_slots - 1, -1, -1))
        self._retired: list[int] = []
        self._n_slot_ids = n_slots

    # --- what the reader of bytes reports -----------------------------------------------

    def loaded(self, page: int) -> None:
        """A page's bytes are in its slot.

        Raises:
            KeyError: it was not on its way (any more: a request may have cancelled it), or
                its read was reported as failed.
        """
        if page in self._failed:
            raise KeyError(page)
        self._slots[page] = self._loading.pop(page)

    def failed(self, page: int) -> None:
        """A page's read failed. Unpinned, its slot is free at once; else with the last pin.

        Asked for again while pinned, it comes back from `acquire` as missing, not to promote.

        Raises:
            KeyError: it was not on its way.
        """
        if page not in self._loading:
            raise KeyError(page)
        if page in self._pinned:
            self._failed.add(page)
        else:
            self._free.append(self._forget(page))

    def _settle(self, pages: Sequence[int]) -> None:
        """After a release: unpinned pages that never came pass, or go if their read failed."""
        for page in pages:
            if page not in self._loading or page in self._pinned:
                continue
            if page in self._failed:
                self._free.append(self._forget(page))
            elif page not in self._passing:
                self.policy.remove(page)
                self._passing[page] = None

    # --- leaving ------------------------------------------------------------------------

    def drop(self, page: int) -> bool:
        """Free the slot of a prefetch that turned out wrong, or of any unpinned page.

        Call it for a page on its way only once its read has been stopped.

        Returns:
            False where the page has no slot or is pinned; nothing changed.
        """
        if page in self._pinned or (page not in self._slots and page not in self._loading):
            return False
        self._free.append(self._forget(page))
        return True

    def give_way(self, page: int) -> None:
        """Let a resident page pass: it leaves before any member does, unless asked for before."""
        if page in self._slots and page not in self._passing:
            if page in self._unused:
                self._forget_unused(page)
            else:
                self.policy.remove(page)
            self._passing[page] = None

    def _idle(self, group: dict[int, None], n: int) -> list[int]:
        """Up to n resident unpinned pages of a group, the newest first."""
        found: list[int] = []
        for page in reversed(group):
            if len(found) == n:
                break
            if page in self._slots and page not in self._pinned:
                found.append(page)
        return found

    def _evict(self, page: int) -> int:
        """Take an unpinned page's slot away."""
        self.counters.evictions[page // self._n_expert] += 1
        return self._forget(page)

    def _forget(self, page: int) -> int:
        """Remove a page from its group and from its slot."""
        if page in self._unused:
            self._forget_unused(page)
        elif page in self._passing:
            del self._passing[page]
        else:
            self.policy.remove(page)
        self._failed.discard(page)
        return self._slots.pop(page) if page in self._slots else self._loading.pop(page)

    def _forget_unused(self, page: int) -> None:
        del self._unused[page]
        self.counters.prefetch_wasted[page // self._n_expert] += 1

    # --- size and policy ----------------------------------------------------------------

    def resize(self, n_slots: int) -> Resized:
        """Give slots up, or take some, towards `n_slots` usable ones.

        Free slots go first, then passing pages, unused prefetches and the policy's victims.
        Pinned pages and unfinished reads stay, so fewer may go than asked: see `n_slots`.
        Growing brings back slots given up, then new numbers from the largest so far.

        Raises:
            UsageError: less than one slot; nothing changed.
        """
        if n_slots < 1:
            raise UsageError(f"a pool needs at least 1 slot, got {n_slots}")
        done = Resized([], [], [])
        while self.n_slots > n_slots and self._give_up_slot(done):
            self.n_slots -= 1
        while self.n_slots < n_slots:
            slot = self._retired.pop() if self._retired else self._n_slot_ids
            self._n_slot_ids = max(self._n_slot_ids, slot + 1)
            self._free.append(slot)
            done.gained.append(slot)
            self.n_slots += 1
        return done

    def _give_up_slot(self, done: Resized) -> bool:
        if self._free:
            slot = self._free.pop()
        else:
            idle = self._idle(self._passing, 1) or self._idle(self._unused, 1)
            victim = idle[0] if idle else self.policy.victim(self._pinned)
            if victim is None:
                return False
            slot = self._evict(victim)
            done.evicted.append(victim)
        self._retired.append(slot)
        done.retired.append(slot)
        return True

    def set_policy(self, policy: EvictionPolicy) -> None:
        """Let another policy, which has no members yet, take over; oldest members first.

        Raises:
            UsageError: it has members.
        """
        if policy.members():
            raise UsageError(f"policy {policy.name} already has members; make one per table")
        members = sorted(self.policy.members(), key=lambda page: (self._last_step[page], page))
        for page in members:
            policy.add(page)
        self.policy = policy

    # --- questions ----------------------------------------------------------------------

    def slot_of(self, page: int) -> int | None:
        """The slot of a resident page; None while it is on its way or absent."""
        return self._slots.get(page)

    def has(self, page: int) -> bool:
        """Whether a page is resident or on its way."""
        return page in self._slots or page in self._loading

    def resident(self) -> Collection[int]:
        """The pages that can be used now: a copy, so that any thread may ask."""
        return self._slots.copy().keys()

    @property
    def n_free(self) -> int:
        """Slots that hold no page."""
        return len(self._free)

    @property
    def n_pinned(self) -> int:
        """Pages that may not be evicted."""
        return len(self._pinned)

    @property
    def n_loading(self) -> int:
        """Pages on their way."""
        return len(self._loading)

    def check(self) -> None:
        """Verify every invariant; for tests.

        Raises:
            AssertionError: one is broken.
        """
        held = {**self._slots, **self._loading}
        assert len(held) == len(self._slots) + len(self._loading), "resident and on its way"
        everywhere = [*held.values(), *self._free, *self._retired]
        assert sorted(everywhere) == list(range(self._n_slot_ids)), "a slot lost or shared"
        assert self.n_slots == len(held) + len(self._free), "slots miscounted"
        members, unused, passing = set(self.policy.members()), set(self._unused), set(self._passing)
        assert len(members) + len(unused) + len(passing) == len(held), "page in two groups"
        assert members | unused | passing == held.keys(), "page in no group"
        assert self._pinned.keys() <= held.keys(), "pinned page without a slot"
        assert min(self._pinned.values(), default=1) >= 1, "page pinned less than once"
        assert not unused & self._pinned.keys(), "pinned page counts as unused"
        assert self._failed <= self._loading.keys() & self._pinned.keys(), "failed page stays"
        assert not members & self._loading.keys() - self._pinned.keys(), "member may not come"
        counts = [self.decode.snapshot().total, self.prefill.snapshot().total]
        issued = sum(count.prefetch_issued for count in counts)
        useful = sum(count.prefetch_useful + count.prefetch_wasted for count in counts)
        assert issued == useful + len(unused), "prefetches miscounted"
