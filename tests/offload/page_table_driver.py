"""Random operations on a page table and the ledger that pays for its slots, checked by a model.

Run by hand for long: python tests/offload/page_table_driver.py --ops 10000000 --seed 1
"""

import argparse
import random
import time
from collections import Counter

from edgeroute.offload.eviction import PolicyParams, PoolShape
from edgeroute.offload.eviction_registry import POLICIES, make_policy
from edgeroute.offload.page_table import PageTable
from edgeroute.runtime.errors import CapacityError
from edgeroute.runtime.ledger import Ledger

PAGE_BYTES = 1000
OPS_PER_TABLE = 2500
CHECK_EVERY = 25


class Driver:
    """One table of random size and policy, driven by one seed.

    `held` is the model: which slot the table has promised to which page, from its answers
    alone. `leases` are (pages, slots) not yet released; `coming` pages whose read is under
    way.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        rng = self.rng
        self.n_layer, self.n_expert = rng.randint(1, 6), rng.randint(1, 12)
        self.n_used = rng.randint(1, self.n_expert)
        n_pages = self.n_layer * self.n_expert
        n_slots = rng.randint(1, max(1, int(n_pages * 1.1)))
        self.shape = PoolShape(pages=range(n_pages), n_expert=self.n_expert, page_bytes=PAGE_BYTES)
        self.table = PageTable(n_slots, self.new_policy(n_slots), self.shape)
        self.ledger = Ledger((n_pages * 2 + 20) * PAGE_BYTES)
        self.ledger.reserve({"slots": n_slots * PAGE_BYTES})
        self.n_kv = 0
        self.layer = 0
        self.leases: list[tuple[list[int], dict[int, int]]] = []
        self.coming: set[int] = set()
        self.broken: set[int] = set()
        self.requested = 0
        self.refused = 0
        table = self.table
        table.begin_step()
        self.ops = (
            [self.acquire] * 8
            + [self.release] * 7
            + [self.arrive] * 5
            + [self.next_layer] * 6
            + [self.prefetch] * 4
            + [self.drop, self.fail, self.resize, self.kv, self.kv]
        )

    def new_policy(self, n_slots: int):  # type: ignore[no-untyped-def]
        params = PolicyParams(
            seed=self.rng.getrandbits(30),
            decay=self.rng.choice([1.0, 0.9, 0.01]),
            protected_ratio=self.rng.choice([0.0, 0.5, 0.9]),
            window=self.rng.choice([2, 64]),
            warmup_tokens=self.rng.choice([1, 20]),
        )
        return make_policy(self.rng.choice(list(POLICIES)), self.shape, n_slots, params)

    def run(self, n_ops: int) -> None:
        """Do operations; the table verifies itself now and then, and at the end when idle."""
        choice, ops = self.rng.choice, self.ops
        for number in range(n_ops):
            choice(ops)()
            if number % CHECK_EVERY == 0:
                self.check()
        self.finish()

    def check(self) -> None:
        self.table.check()
        assert self.ledger.used_bytes <= self.ledger.budget_bytes
        slots = {entry.owner: entry.n_bytes for entry in self.ledger.entries()}
        assert slots["slots"] == self.table.n_slots * PAGE_BYTES
        for _, promised in self.leases:
            for page, slot in promised.items():
                assert self.table.has(page), "a pinned page lost its slot"
                if page not in self.coming and page not in self.broken:
                    assert self.table.slot_of(page) == slot, "a pinned page moved"

    def finish(self) -> None:
        while self.leases:
            self.release()
        for page in sorted(self.coming):
            self.table.loaded(page)
        self.coming.clear()
        self.table.check()
        assert self.table.n_pinned == self.table.n_loading == 0
        asked = [self.table.decode.snapshot().total, self.table.prefill.snapshot().total]
        assert sum(count.requests for count in asked) == self.requested

    def acquire(self) -> None:
        rng, table = self.rng, self.table
        experts = rng.sample(range(self.n_expert), rng.randint(0, self.n_used))
        pages = [self.layer * self.n_expert + expert for expert in experts]
        absent = {page for page in pages if not table.has(page)}
        pinned = {page for held, _ in self.leases for page in held}
        n_kept = len(pinned | set(pages)) - len(absent)
        try:
            slots, missing = table.acquire(pages)
        except CapacityError:
            self.refused += 1
            assert n_kept + len(absent) > table.n_slots, "refused what fits"
            return
        assert n_kept + len(absent) <= table.n_slots
        assert len(set(slots)) == len(slots) == len(pages)
        promised = dict(zip(pages, slots, strict=True))
        self.requested += len(pages)
        for held, before in self.leases:
            for page in held:
                assert promised.get(page, before[page]) == before[page]
                assert page in promised or before[page] not in slots, "a leased slot given away"
        assert {one.page for one in missing if not one.promote} == absent | (
            self.broken & set(pages)
        )
        for one in missing:
            assert promised[one.page] == one.slot
            if one.promote:
                assert one.page in self.coming
            if one.cancels is not None:
                self.coming.remove(one.cancels)
            self.broken.discard(one.page)
            self.coming.add(one.page)
        for page in pages:
            assert page in self.coming or table.slot_of(page) == promised[page]
        self.leases.append((pages, promised))

    def release(self) -> None:
        if self.leases:
            pages, _ = self.leases.pop(self.rng.randrange(len(self.leases)))
            self.table.release(pages)
            still = {page for held, _ in self.leases for page in held}
            self.broken = {page for page in self.broken if page in still}

    def arrive(self) -> None:
        if self.coming:
            page = self.rng.choice(sorted(self.coming))
            self.coming.remove(page)
            self.table.loaded(page)
            assert self.table.slot_of(page) is not None

    def fail(self) -> None:
        if self.coming:
            page = self.rng.choice(sorted(self.coming))
            self.coming.remove(page)
            self.table.failed(page)
            if any(page in held for held, _ in self.leases):
                self.broken.add(page)
            else:
                assert not self.table.has(page)

    def next_layer(self) -> None:
        self.layer += 1
        if self.layer >= self.n_layer:
            self.layer = 0
            self.table.begin_step(prefill=self.rng.random() < 0.1)

    def prefetch(self) -> None:
        layer = (self.layer + 1) % self.n_layer
        page = layer * self.n_expert + self.rng.randrange(self.n_expert)
        had = self.table.has(page)
        if self.table.reserve_prefetch(page) is not None:
            assert not had
            self.coming.add(page)

    def drop(self) -> None:
        page = self.rng.randrange(self.n_layer * self.n_expert)
        if self.table.drop(page):
            self.coming.discard(page)

    def resize(self) -> None:
        rng, table = self.rng, self.table
        before = table.n_slots
        wish = rng.randint(1, self.n_layer * self.n_expert + 4)
        extra = max(0, wish - before) * PAGE_BYTES
        if extra > self.ledger.free_bytes:
            return
        done = table.resize(wish)
        assert table.n_slots == before - len(done.retired) + len(done.gained)
        assert wish <= table.n_slots <= max(before, wish)
        assert not any(table.has(page) for page in done.evicted)
        self.ledger.release("slots")
        self.ledger.reserve({"slots": table.n_slots * PAGE_BYTES})
        if rng.random() < 0.2:
            table.set_policy(self.new_policy(table.n_slots))

    def kv(self) -> None:
        """Sequences come and go beside the slots; what does not fit changes nothing."""
        if self.n_kv and self.rng.random() < 0.5:
            self.n_kv -= 1
            self.ledger.release(f"kv{self.n_kv}")
            return
        used = self.ledger.used_bytes
        want = self.rng.randint(0, 8 * PAGE_BYTES)
        try:
            self.ledger.reserve({f"kv{self.n_kv}": want})
            self.n_kv += 1
        except CapacityError:
            assert used + want > self.ledger.budget_bytes and self.ledger.used_bytes == used


def drive(n_ops: int, seed: int) -> Counter[str]:
    """Run operations on as many tables as it takes; count what they saw."""
    seen: Counter[str] = Counter()
    for number in range(-(-n_ops // OPS_PER_TABLE)):
        driver = Driver(seed * 1_000_003 + number)
        driver.run(min(OPS_PER_TABLE, n_ops - number * OPS_PER_TABLE))
        table = driver.table
        for counters in (table.decode, table.prefill):
            total = counters.snapshot().total
            for name in ("hits", "late", "misses", "evictions", "prefetch_useful"):
                seen[name] += getattr(total, name)
            seen["prefetch_wasted"] += total.prefetch_wasted
        seen["refused"] += driver.refused
        seen["tables"] += 1
    return seen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    begin = time.perf_counter()
    counted = drive(asked.ops, asked.seed)
    print(f"{asked.ops} operations in {time.perf_counter() - begin:.0f} s: {dict(counted)}")
