"""Random orders of everything an adapter library is asked for, thousands of operations each."""

import random

import pytest

from edgeroute.offload.adapter_store import Lease
from edgeroute.runtime.errors import AdapterFileError, CapacityError
from tests.offload.adapter_store_lab import RANK, FakePair, FakeSource, Lab


class Storm:
    """Random operations; after each, no slot is lost or shared and no lease has lost its own."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.lab = Lab(self.rng.choice([2, 3, 5, 8]))
        self.store = self.lab.store
        self.leases: list[tuple[Lease, dict[str, float]]] = []
        self.marks: dict[str, float] = {}
        self.next_mark = 1
        self.n_served = self.n_failed = self.n_refused = 0

    def step(self) -> None:
        kind = self.rng.choices(
            ["lease", "release", "run", "ready", "add", "remove", "keep"], [8, 6, 5, 4, 2, 1, 0.5]
        )[0]
        getattr(self, kind)()
        self.lab.check()
        held = sum(page.n_blocks for page in self.store._placed)
        assert held + len(self.store._free) == self.lab.slots.n_slots
        for lease, _ in self.leases:
            for page in lease.pages:
                assert page.n_pins > 0 and (page.slots or page.failed is not None)

    def lease(self) -> None:
        names = self.rng.sample(self.store.names, min(len(self.marks), self.rng.choice([1, 1, 2])))
        try:
            lease = self.store.lease(dict.fromkeys(names, 1.0))
        except CapacityError:
            self.n_refused += 1
            return
        except AdapterFileError:
            self.n_failed += 1
            return
        if lease is not None:
            self.leases.append((lease, {name: self.marks[name] for name in names}))

    def release(self) -> None:
        if self.leases:
            lease, _ = self.leases.pop(self.rng.randrange(len(self.leases)))
            self.store.release(lease)

    def run(self) -> None:
        self.lab.loads.run(self.rng.choice([1, 2, None]))

    def ready(self) -> None:
        """What is ready is, in every slot, the version that was leased."""
        for lease, marks in list(self.leases):
            try:
                if not self.store.ready(lease):
                    continue
            except AdapterFileError:
                self.n_failed += 1
                self.leases.remove((lease, marks))
                self.store.release(lease)
                continue
            for page in lease.pages:
                assert {self.lab.slots.mark(slot) for slot in page.slots} == {marks[page.name]}
                self.n_served += 1

    def add(self) -> None:
        name = self.rng.choice("abcdefghij")
        mark = float(self.next_mark)
        self.next_mark = self.next_mark % 2000 + 1  # whole numbers that halves hold
        rank = RANK * self.rng.choice([1, 1, 1, 2])
        source = FakeSource(name, mark, [FakePair(rank=rank)])
        if self.rng.random() < 0.1:
            source.error = AdapterFileError(f"{name} cannot be read")
        self.store.add(source)
        self.marks[name] = mark

    def remove(self) -> None:
        if self.marks:
            name = self.rng.choice(sorted(self.marks))
            self.store.remove(name)
            del self.marks[name]

    def keep(self) -> None:
        self.store.keep(self.rng.sample("abcdefghijk", self.rng.choice([0, 1, 2, 4])))

    def end(self) -> None:
        self.lab.loads.run()
        for lease, _ in self.leases:
            self.store.release(lease)
        for name in self.store.names:
            self.store.remove(name)
        self.lab.loads.run()
        self.store.keep([])
        self.store._sweep()
        assert sorted(self.store._free) == list(range(1, self.lab.slots.n_slots + 1))
        assert not self.store._placed and not self.lab.loads.waiting


@pytest.mark.parametrize("seed", range(12))
def test_no_order_of_operations_loses_or_shares_a_slot(seed: int) -> None:
    storm = Storm(seed)
    for _ in range(2500):
        storm.step()
    assert storm.n_served > 100 and storm.n_failed > 2
    storm.end()
