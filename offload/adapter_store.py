"""Adapters as pages: a library on disk, slots for a few, loads by a thread of their own.

A request leases the adapters it uses; a leased adapter stays. What is not leased leaves when
its slots are needed, least recently used first, what the cache controller wants kept last.
"""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from edgeroute.offload.adapter_load import (
    AdapterSource,
    Loaded,
    factors_of,
    load_into,
    n_blocks,
)
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import (
    CapacityError,
    ClosedError,
    EdgerouteError,
    NeverFitsError,
    UsageError,
)
from edgeroute.runtime.lora import NO_ADAPTER, LoraRow, LoraSlots

MAX_SLOTS_PER_TOKEN = 16
"""Bounds what one mixture may cost."""


@dataclass(slots=True, eq=False)
class Page:
    """One version of an adapter. `slots` is empty while it is only on disk."""

    source: AdapterSource
    version: int
    n_blocks: int
    factor: float
    """On all its products; see `Factors.row`."""
    slots: tuple[int, ...] = ()
    loading: Future[Loaded] | None = None
    failed: BaseException | None = None
    n_pins: int = 0
    last_used: int = 0
    retired: bool = False
    """Whether it was replaced or removed: it goes when its last lease ends."""

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.source.name

    @property
    def resident(self) -> bool:
        """Whether its numbers are in its slots."""
        return bool(self.slots) and self.loading is None


@dataclass(slots=True, eq=False)
class Lease:
    """The adapters of one request, held in their slots until `release`.

    `hit` tells whether all were there when it was taken; `row` what they add to a graph.
    """

    pages: tuple[Page, ...]
    weights: tuple[float, ...]
    hit: bool
    released: bool = False

    @property
    def key(self) -> str | None:
        """What the numbers computed with it depend on; None without any adapter."""
        pairs = zip(self.pages, self.weights, strict=True)
        found = [f"{page.name}#{page.version}*{weight!r}" for page, weight in pairs]
        return "+".join(found) or None

    @property
    def row(self) -> LoraRow | None:
        """The slots of all its adapters, with a factor on each; None without any."""
        slots: list[int] = []
        weights: list[float] = []
        for page, weight in zip(self.pages, self.weights, strict=True):
            slots += page.slots
            weights += [weight * page.factor] * len(page.slots)
        return LoraRow(tuple(slots), tuple(weights)) if slots else None


@dataclass(slots=True)
class Counts:
    """What happened so far."""

    hits: int = 0
    misses: int = 0
    loads: int = 0
    evictions: int = 0
    loaded_bytes: int = 0
    load_s: float = 0.0
    errors: int = 0


@dataclass(slots=True)
class AdapterStore(Closing):
    """The library and its slots. The engine thread owns it; loads run on a thread of its own.

    Attributes:
        slots: the slot tensors, which the caller closes after the store.
        wake: called from the loading thread whenever a load has ended.
    """

    slots: LoraSlots
    wake: Callable[[], None]
    counts: Counts = field(default_factory=Counts)
    _pages: dict[str, Page] = field(default_factory=dict)
    _placed: list[Page] = field(default_factory=list)  # those with slots, retired ones too
    _free: list[int] = field(init=False)
    _keep: frozenset[str] = frozenset()
    _clock: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))
    _versions: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))
    _loader: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        self._free = list(range(self.slots.n_slots, NO_ADAPTER, -1))
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="edgeroute-adapters")

    # the library

    @property
    def names(self) -> list[str]:
        """All adapters, sorted."""
        return sorted(self._pages)

    @property
    def sources(self) -> list[AdapterSource]:
        """The files of all adapters, by name."""
        return [self._pages[name].source for name in self.names]

    def knows(self, name: str) -> bool:
        """Whether there is an adapter of that name; any thread may ask."""
        return name in self._pages

    @property
    def resident(self) -> list[str]:
        """Adapters whose numbers are in slots, sorted; any thread may ask."""
        return sorted(name for name, page in self._pages.copy().items() if page.resident)

    @property
    def placed(self) -> frozenset[str]:
        """Adapters that are in slots or on their way there."""
        return frozenset(page.name for page in self._placed if not page.retired)

    def add(self, source: AdapterSource) -> None:
        """Put an adapter into the library; one of the same name is replaced.

        Requests that run with the old one keep it to their end. The slots must have all
        weights that the adapter changes.

        Raises:
            NeverFitsError: it takes more slots than there are.
        """
        blocks = self.check_size(source)
        if source.name in self._pages:
            self.remove(source.name)
        factor = factors_of(source).row
        self._pages[source.name] = Page(source, next(self._versions), blocks, factor)

    def check_size(self, source: AdapterSource) -> int:
        """Count the slots that an adapter takes, and check that it can be resident at all.

        Raises:
            NeverFitsError: it takes more slots than there are.
        """
        blocks = n_blocks(source, self.slots.rank)
        if blocks > min(self.slots.n_slots, MAX_SLOTS_PER_TOKEN):
            raise NeverFitsError(
                f"adapter {source.name!r} takes {blocks} slots of rank {self.slots.rank}, and "
                f"there are {self.slots.n_slots}, of which a request may use "
                f"{MAX_SLOTS_PER_TOKEN}; raise adapter_slots or leave it out"
            )
        return blocks

    def remove(self, name: str) -> None:
        """Take an adapter out of the library; requests that use it keep it to their end.

        Raises:
            UsageError: there is none of that name.
        """
        page = self._page(name)
        del self._pages[name]
        page.retired = True
        self._sweep()

    # leases

    def lease(self, mixture: Mapping[str, float]) -> Lease | None:
        """Hold adapters in slots and start to load those that are not there.

        Args:
            mixture: adapters with a factor each; those of 0 are left out.

        Returns:
            A lease, perhaps not `ready` yet; None while leased adapters take the room.

        Raises:
            UsageError: an adapter is unknown.
            NeverFitsError: together they take more slots than there are.
            AdapterFileError: one of them could not be read just now; those who wait for that
                load shall hear of it first. Later it is tried again.
        """
        chosen = {name: weight for name, weight in sorted(mixture.items()) if weight}
        pages = tuple(self._page(name) for name in chosen)
        need = sum(page.n_blocks for page in pages)
        if need > min(self.slots.n_slots, MAX_SLOTS_PER_TOKEN):
            raise NeverFitsError(
                f"the adapters {', '.join(chosen)} take {need} slots together, and there are "
                f"{self.slots.n_slots}, of which a request may use {MAX_SLOTS_PER_TOKEN}; mix "
                "fewer, or raise adapter_slots"
            )
        self._sweep()
        for page in pages:
            if page.failed is not None and page.n_pins:
                raise page.failed
        for page in pages:
            page.n_pins += 1
        if not all(page.slots or self._place(page, pages) for page in pages):
            self._unpin(pages)
            return None
        lease = Lease(pages, tuple(chosen.values()), all(page.resident for page in pages))
        if pages:
            self.counts.hits += lease.hit
            self.counts.misses += not lease.hit
        return lease

    def ready(self, lease: Lease) -> bool:
        """Whether all of a lease's adapters are in their slots.

        Raises:
            AdapterFileError: one of them cannot be read.
        """
        self._sweep()
        for page in lease.pages:
            if page.failed is not None:
                raise page.failed
        return all(page.resident for page in lease.pages)

    def release(self, lease: Lease) -> None:
        """Give a lease back; safe to call twice."""
        if not lease.released:
            lease.released = True
            self._unpin(lease.pages)
            self._sweep()

    def keep(self, names: Collection[str]) -> None:
        """Say which adapters should be resident; missing ones load where there is room.

        Others are evicted before these, whoever was used last, and these not for each other.
        """
        self._sweep()
        self._keep = frozenset(names)
        for name in sorted(self._keep & self._pages.keys()):
            page = self._pages[name]
            room = len(self._free) + sum(each.n_blocks for each in self._idle(kept=False))
            if not page.slots and not page.n_pins and room >= page.n_blocks:
                self._place(page, ())

    def n_together(self, names: Collection[str]) -> int:
        """Return how many of these adapters fit the slots together, at least 1."""
        blocks = max((self._page(name).n_blocks for name in names), default=1)
        return max(1, min(self.slots.n_slots, MAX_SLOTS_PER_TOKEN) // blocks)

    def stats(self) -> dict[str, object]:
        """Return what is where, and what was counted, as plain JSON types."""
        counts = self.counts
        asked = counts.hits + counts.misses
        return {
            "known": len(self._pages),
            "resident": self.resident,
            "slots": self.slots.n_slots,
            "free_slots": len(self._free),
            "hits": counts.hits,
            "misses": counts.misses,
            "hit_ratio": round(counts.hits / asked, 4) if asked else 0.0,
            "loads": counts.loads,
            "evictions": counts.evictions,
            "loaded_bytes": counts.loaded_bytes,
            "load_s": round(counts.load_s, 6),
            "errors": counts.errors,
        }

    def close(self) -> None:
        """Let a running load end and drop those that wait; safe to call twice."""
        self._loader.shutdown(wait=True, cancel_futures=True)

    # slots

    def _page(self, name: str) -> Page:
        page = self._pages.get(name)
        if page is None:
            known = ", ".join(self.names[:8]) + (", ..." if len(self._pages) > 8 else "")
            raise UsageError(f"there is no adapter {name!r}; known are: {known or 'none'}")
        return page

    def _place(self, page: Page, beside: Collection[Page]) -> bool:
        """Find slots for a page and start its load; False where there are none now.

        Pages `beside` it are held by the same lease: their slots will not come back.
        """
        while len(self._free) < page.n_blocks:
            victim = self._victim(page, beside)
            if victim is None:
                return False
            self._evict(victim)
        page.slots = tuple(self._free.pop() for _ in range(page.n_blocks))
        page.failed = None
        self._placed.append(page)
        page.loading = self._loader.submit(load_into, self.slots, page.source, page.slots)
        page.loading.add_done_callback(lambda _: self.wake())
        return True

    def _idle(self, *, kept: bool) -> list[Page]:
        """List the pages that could leave now: those to be kept, or the others."""
        idle = [each for each in self._placed if each.resident and not each.n_pins]
        return [each for each in idle if (each.name in self._keep) == kept]

    def _victim(self, page: Page, beside: Collection[Page]) -> Page | None:
        """Choose a page to evict for another; None while room is only leased."""
        spare = self._idle(kept=False)
        if not spare and page.name not in self._keep:
            passing = [each for each in self._placed
                       if each.name not in self._keep and each not in beside]  # fmt: skip
            if sum(each.n_blocks for each in passing) + len(self._free) >= page.n_blocks:
                return None  # what is leased now is enough room, once it is given back
        return min(spare or self._idle(kept=True), key=lambda each: each.last_used, default=None)

    def _evict(self, page: Page) -> None:
        self.counts.evictions += 1
        self._drop(page)

    def _drop(self, page: Page) -> None:
        self._free += page.slots
        page.slots = ()
        self._placed.remove(page)

    def _unpin(self, pages: Sequence[Page]) -> None:
        for page in pages:
            page.n_pins -= 1
            page.last_used = next(self._clock)

    def _sweep(self) -> None:
        """Take note of loads that have ended, and free retired pages that nobody holds."""
        for page in list(self._placed):
            if page.loading is not None and page.loading.done():
                self._land(page, page.loading)
            if page.retired and page.resident and not page.n_pins:
                self._drop(page)

    def _land(self, page: Page, loading: Future[Loaded]) -> None:
        page.loading = None
        if loading.cancelled():
            page.failed = ClosedError(f"the adapters were closed before {page.name!r} was read")
        else:
            page.failed = _told(page.name, loading.exception())
        if page.failed is not None:
            self.counts.errors += 1
            self._drop(page)
            return
        loaded = loading.result()
        self.counts.loads += 1
        self.counts.loaded_bytes += loaded.n_bytes
        self.counts.load_s += loaded.seconds


def _told(name: str, error: BaseException | None) -> BaseException | None:
    """Make an error of a request's own out of one that nobody expected."""
    if error is None or isinstance(error, EdgerouteError):
        return error
    told = CapacityError(f"adapter {name!r} could not be loaded: {error!r}")
    told.__cause__ = error
    return told
