"""Adapters without files, slots without ggml, and loads that run when a test says so."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeroute.offload.adapter_store import AdapterStore, Lease

RANK, N_IN, N_OUT = 2, 4, 3
Halves = npt.NDArray[np.float16]


@dataclass
class FakePair:
    name: str = "w"
    rank: int = RANK
    scale: float = 1.0
    n_in: int = N_IN
    n_out: int = N_OUT


@dataclass
class FakeSource:
    """An adapter whose numbers are all `mark`; `error` is raised halfway through its read."""

    name: str
    mark: float = 1.0
    tensors: list[FakePair] = field(default_factory=lambda: [FakePair()])
    error: BaseException | None = None
    gate: threading.Event | None = None
    n_reads: int = 0
    n_bytes: int = 100

    def read(self) -> Iterator[tuple[FakePair, Halves, Halves]]:
        self.n_reads += 1
        if self.gate is not None:
            assert self.gate.wait(20)
        for pair in self.tensors:
            a = np.full((pair.rank, pair.n_in), self.mark, np.float16)
            yield pair, a, np.full((pair.n_out, pair.rank), self.mark, np.float16)
            if self.error is not None:
                raise self.error


class FakeSlots:
    """Remembers what lies in each slot instead of handing it to ggml; None where nothing."""

    def __init__(self, n_slots: int, rank: int = RANK, names: tuple[str, ...] = ("w",)) -> None:
        self.n_slots, self.rank = n_slots, rank
        self.names = frozenset(names)
        self.held: dict[tuple[int, str], tuple[Halves, Halves] | None] = {}

    def write(self, slot: int, name: str, a: Halves, b: Halves) -> None:
        assert 1 <= slot <= self.n_slots
        assert a.shape == (self.rank, N_IN) and b.shape == (N_OUT, self.rank)
        self.held[slot, name] = a.copy(), b.copy()

    def clear(self, slot: int, names: Any) -> None:
        assert 1 <= slot <= self.n_slots
        for name in names:
            self.held[slot, name] = None

    def mark(self, slot: int) -> float | None:
        found = self.held.get((slot, "w"))
        return None if found is None else float(found[0][0, 0])


class ByHand(Executor):
    """Runs loads when the test says so, in order, on the test's own thread."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        self.waiting.append((future, lambda: fn(*args, **kwargs)))
        return future

    def run(self, n: int | None = None) -> None:
        for _ in range(len(self.waiting) if n is None else min(n, len(self.waiting))):
            future, work = self.waiting.pop(0)
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        for future, _ in self.waiting if cancel_futures else []:
            future.cancel()
            future.set_running_or_notify_cancel()


class Lab:
    """A store over fake slots whose loads end by `run`; adapters a, b, c, ... of one block."""

    def __init__(self, n_slots: int, names: str = "", **sources: FakeSource) -> None:
        self.slots = FakeSlots(n_slots)
        self.n_wakes = 0
        self.store = AdapterStore(self.slots, self._wake)  # type: ignore[arg-type]
        self.store._loader.shutdown()
        self.loads = ByHand()
        self.store._loader = self.loads  # type: ignore[assignment]
        for i, name in enumerate(names):
            self.store.add(FakeSource(name, mark=i + 1.0))
        for source in sources.values():
            self.store.add(source)

    def _wake(self) -> None:
        self.n_wakes += 1

    def take(self, *names: str) -> Lease:
        """Lease and load."""
        lease = self.store.lease(dict.fromkeys(names, 1.0))
        assert lease is not None
        self.loads.run()
        assert self.store.ready(lease)
        return lease

    def use(self, *names: str) -> bool:
        """Lease, load and release; whether it was a hit."""
        lease = self.take(*names)
        self.store.release(lease)
        return lease.hit

    def check(self) -> None:
        """Every slot is free or some page's, once; what leases count is what pages count."""
        store = self.store
        used = [slot for page in store._placed for slot in page.slots]
        assert sorted(used + store._free) == list(range(1, self.slots.n_slots + 1))
        assert len({id(page) for page in store._placed}) == len(store._placed)
        assert all(len(page.slots) == page.n_blocks for page in store._placed)
        for page in store._pages.values():
            assert bool(page.slots) == (page in store._placed) and not page.retired
        assert all(page.n_pins >= 0 for page in [*store._placed, *store._pages.values()])
