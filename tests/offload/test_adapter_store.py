"""The adapter library: leases, loads, eviction, what is kept, replaced, broken or closed."""

import threading
import time
from typing import Any

import numpy as np
import pytest

from edgeroute.offload.adapter_load import factors_of, load_into, n_blocks, targets_of
from edgeroute.offload.adapter_store import MAX_SLOTS_PER_TOKEN, AdapterStore
from edgeroute.runtime.errors import AdapterFileError, CapacityError, UsageError
from tests.offload.adapter_store_lab import RANK, FakePair, FakeSlots, FakeSource, Lab

# leases and eviction


def test_a_lease_loads_what_is_missing_and_finds_it_there_next_time() -> None:
    lab = Lab(2, "ab")
    lease = lab.store.lease({"a": 1.0})
    assert lease is not None and not lease.hit and not lab.store.ready(lease)
    assert lab.store.resident == [] and lab.n_wakes == 0
    lab.loads.run()
    assert lab.n_wakes == 1 and lab.store.ready(lease) and lab.store.resident == ["a"]
    assert lease.row is not None and lease.row.weights == (1.0,)
    assert lab.slots.mark(lease.row.slots[0]) == 1.0
    lab.store.release(lease)
    assert lab.use("a") and not lab.use("b") and lab.use("b")
    figures = lab.store.stats()
    assert (figures["hits"], figures["misses"], figures["loads"]) == (2, 2, 2)
    assert figures["loaded_bytes"] == 200 and figures["evictions"] == 0
    lab.check()


def test_two_leases_share_one_load() -> None:
    lab = Lab(2, "a")
    first, second = lab.store.lease({"a": 1.0}), lab.store.lease({"a": 0.5})
    assert first is not None and second is not None and len(lab.loads.waiting) == 1
    lab.loads.run()
    assert lab.store.ready(first) and lab.store.ready(second)
    assert first.row is not None and second.row is not None
    assert first.row.slots == second.row.slots and first.key != second.key
    assert lab.store.stats()["misses"] == 2 and lab.store.stats()["loads"] == 1
    lab.check()


def test_the_least_recently_used_leaves() -> None:
    lab = Lab(2, "abc")
    for name in "aba":
        lab.use(name)
    lab.use("c")
    assert lab.store.resident == ["a", "c"]
    lab.use("b")
    assert lab.store.resident == ["b", "c"] and lab.store.stats()["evictions"] == 2
    lab.check()


def test_a_leased_adapter_stays_and_who_has_no_room_waits() -> None:
    lab = Lab(2, "abc")
    a, b = lab.take("a"), lab.take("b")
    assert lab.store.lease({"c": 1.0}) is None
    lab.store.release(a)
    lab.store.release(a)  # twice is once
    assert lab.store._pages["a"].n_pins == 0
    c = lab.store.lease({"c": 1.0})
    assert c is not None and lab.store.resident == ["b"]
    lab.loads.run()
    assert lab.store.ready(c) and lab.store.resident == ["b", "c"]
    lab.store.release(b)
    lab.store.release(c)
    lab.check()


def test_a_refused_lease_holds_nothing() -> None:
    lab = Lab(2, "abc")
    held = lab.take("c")
    assert lab.store.lease({"a": 0.5, "b": 0.5}) is None
    lab.loads.run()
    lab.store.release(held)
    assert [page.n_pins for page in lab.store._pages.values()] == [0, 0, 0]
    lab.take("a", "b")
    lab.check()


def test_a_mixture_gives_every_block_its_factor() -> None:
    wide = FakeSource("w", tensors=[FakePair(rank=2 * RANK + 1, scale=3.0)])
    lab = Lab(4, "a", wide=wide)
    lease = lab.store.lease({"w": 0.5, "a": -2.0, "gone": 0.0})  # 0 is not even looked up
    assert lease is not None
    lab.loads.run()
    row = lease.row
    assert row is not None and row.weights == (-2.0, 1.5, 1.5, 1.5)
    assert len(set(row.slots)) == 4
    assert lab.slots.held[row.slots[3], "w"] is not None
    a, b = lab.slots.held[row.slots[3], "w"]  # type: ignore[misc]
    assert a[0].any() and not a[1].any() and b[:, 0].any() and not b[:, 1].any()
    lab.check()


def test_factors_of_zero_only_are_the_base_model() -> None:
    lab = Lab(1, "a")
    lease = lab.store.lease({"a": 0.0})
    assert lease is not None and lease.row is None and lease.key is None and lab.store.ready(lease)
    assert lab.store.stats()["hits"] == lab.store.stats()["misses"] == 0
    lab.store.release(lease)
    lab.check()


def test_keys_tell_versions_and_factors_apart() -> None:
    lab = Lab(2, "ab")
    keys = set()
    for mixture in ({"a": 1.0}, {"b": 1.0}, {"a": 0.5}, {"a": 0.5, "b": 0.5}, {"a": 0.1 + 0.2}):
        lease = lab.store.lease(mixture)
        assert lease is not None
        keys.add(lease.key)
        lab.store.release(lease)
        lab.loads.run()
    lab.store.add(FakeSource("a"))
    lease = lab.store.lease({"a": 1.0})
    assert lease is not None
    keys.add(lease.key)
    assert len(keys) == 6
    reverse = lab.store.lease({"b": 0.5, "a": 0.5})
    assert reverse is not None and reverse.key == reverse.key


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    lab = Lab(2, "abc")
    with pytest.raises(CapacityError, match="a, b, c take 3 slots together, and there are 2"):
        lab.store.lease(dict.fromkeys("abc", 1.0))
    big = FakeSource("big", tensors=[FakePair(rank=3 * RANK)])
    with pytest.raises(CapacityError, match="takes 3 slots of rank 2, and there are 2"):
        lab.store.add(big)
    assert not lab.store.knows("big")
    many = Lab(MAX_SLOTS_PER_TOKEN + 4)
    with pytest.raises(CapacityError, match=f"a request may use {MAX_SLOTS_PER_TOKEN}"):
        many.store.add(FakeSource("big", tensors=[FakePair(rank=RANK * (MAX_SLOTS_PER_TOKEN + 1))]))
    lab.check()


def test_an_unknown_adapter_is_named_and_holds_nothing() -> None:
    lab = Lab(2, "ab")
    with pytest.raises(UsageError, match="there is no adapter 'x'; known are: a, b"):
        lab.store.lease({"a": 1.0, "x": 1.0})
    with pytest.raises(UsageError, match="'x'"):
        lab.store.remove("x")
    with pytest.raises(UsageError, match="known are: none"):
        Lab(1).store.lease({"a": 1.0})
    assert lab.store._pages["a"].n_pins == 0
    lab.check()


# what the controller keeps


def test_what_is_kept_is_evicted_last_whoever_was_used_last() -> None:
    lab = Lab(3, "abcd")
    lab.store.keep(["a", "b"])
    lab.loads.run()
    assert lab.store.resident == []  # nobody has looked yet
    for name in "cdcdcd":
        lab.use(name)
    assert lab.store.resident == ["a", "b", "d"]
    assert lab.use("a") and lab.use("b")
    lab.check()


def test_a_miss_waits_for_the_transient_room_rather_than_evict_what_is_kept() -> None:
    lab = Lab(2, "abc")
    lab.store.keep(["a"])
    lab.loads.run()
    b = lab.take("b")
    assert lab.store.lease({"c": 1.0}) is None  # b's slot comes back; a stays
    assert lab.store.resident == ["a", "b"]
    lab.store.release(b)
    lab.take("c")
    assert lab.store.resident == ["a", "c"]
    lab.check()


def test_without_transient_room_even_what_is_kept_must_leave() -> None:
    lab = Lab(2, "abc")
    lab.store.keep(["a", "b"])
    lab.loads.run()
    lab.use("a")
    lab.use("c")
    assert lab.store.resident == ["a", "c"]
    lab.check()


def test_a_mixture_never_waits_for_the_slots_that_it_holds_itself() -> None:
    """Its first adapter took the transient slot; for its second, something kept must leave."""
    lab = Lab(3, "abcd")
    lab.store.keep(["c", "d"])
    lab.loads.run()
    lease = lab.store.lease({"a": 0.5, "b": 0.5})
    for _ in range(3):
        if lease is None:
            lab.loads.run()
            lease = lab.store.lease({"a": 0.5, "b": 0.5})
    assert lease is not None
    lab.check()


def test_keeping_more_than_fits_changes_nothing_that_is_kept_already() -> None:
    lab = Lab(2, "abc")
    for _ in range(3):
        lab.store.keep("abc")
        lab.loads.run()
        lab.store.stats()
    lab.store.ready(lab.take("a"))
    assert lab.store.resident == ["a", "b"] and lab.store.stats()["loads"] == 2
    lab.check()


def test_keeping_does_not_evict_what_is_leased() -> None:
    lab = Lab(1, "ab")
    lease = lab.take("a")
    lab.store.keep(["b"])
    assert lab.store.resident == ["a"] and not lab.loads.waiting
    lab.store.release(lease)
    lab.store.keep(["b", "never-added"])
    lab.loads.run()
    lab.store.release(lab.take("b"))
    assert lab.store.resident == ["b"]
    lab.check()


# replacing and removing


def test_a_replaced_adapter_serves_its_leases_to_their_end_and_nobody_else() -> None:
    lab = Lab(2, "a")
    old = lab.take("a")
    lab.store.add(FakeSource("a", mark=9.0))
    new = lab.take("a")
    assert old.row is not None and new.row is not None and old.key != new.key
    assert lab.slots.mark(old.row.slots[0]) == 1.0 and lab.slots.mark(new.row.slots[0]) == 9.0
    lab.check()
    lab.store.release(old)
    assert len(lab.store._free) == 1
    assert lab.use("a")
    lab.check()


def test_a_removed_adapter_gives_its_slots_back_at_once_or_after_its_last_lease() -> None:
    lab = Lab(2, "ab")
    lab.use("a")
    lab.store.remove("a")
    assert len(lab.store._free) == 2 and lab.store.names == ["b"]
    lease = lab.take("b")
    lab.store.remove("b")
    assert len(lab.store._free) == 1 and lab.store.ready(lease) and lease.row is not None
    lab.store.release(lease)
    assert len(lab.store._free) == 2
    lab.check()


@pytest.mark.parametrize("released", ["before", "after"])
@pytest.mark.parametrize("replaced", [False, True])
def test_removal_during_a_load(released: str, replaced: bool) -> None:
    lab = Lab(2, "a")
    lease = lab.store.lease({"a": 1.0})
    assert lease is not None
    if replaced:
        lab.store.add(FakeSource("a", mark=5.0))
    else:
        lab.store.remove("a")
    if released == "before":
        lab.store.release(lease)
        assert len(lab.store._free) == 1  # the thread still writes there
        lab.check()
    lab.loads.run()
    if released == "after":
        assert lab.store.ready(lease) and lease.row is not None
        assert lab.slots.mark(lease.row.slots[0]) == 1.0
        lab.store.release(lease)
    if replaced:
        fresh = lab.take("a")
        assert fresh.row is not None and lab.slots.mark(fresh.row.slots[0]) == 5.0
        lab.store.release(fresh)
        lab.store.remove("a")
    lab.store.release(lease)
    lab.store.keep([])
    lab.store.ready(lease) if released == "before" else None
    assert len(lab.store._free) == 2
    lab.check()


# failures


def broken(name: str = "x", **how: Any) -> Any:
    return FakeSource(name, error=AdapterFileError(f"{name} is truncated"), **how)


def test_a_failed_load_is_told_to_everyone_who_waits_and_tried_again_later() -> None:
    source = broken(mark=4.0)
    lab = Lab(2, "a", x=source)
    first, second = lab.store.lease({"x": 1.0}), lab.store.lease({"x": 0.5, "a": 0.5})
    assert first is not None and second is not None
    lab.loads.run()
    for lease in (first, second):
        with pytest.raises(AdapterFileError, match="x is truncated"):
            lab.store.ready(lease)
    assert lab.store.resident == ["a"] and len(lab.store._free) == 1
    lab.store.release(first)
    lab.store.release(second)
    source.error = None
    third = lab.take("x")
    assert third.row is not None and lab.slots.mark(third.row.slots[0]) == 4.0
    assert lab.store.stats()["errors"] == 1
    lab.check()


def test_who_comes_while_others_have_not_heard_of_a_failure_hears_of_it_too() -> None:
    """A retry for the newcomer would put the others' answer off, again and again."""
    lab = Lab(2, x=broken())
    early = lab.store.lease({"x": 1.0})
    assert early is not None
    lab.loads.run()
    with pytest.raises(AdapterFileError):
        lab.store.lease({"x": 1.0})
    lab.store.keep(["x"])  # nor does the controller start it again now
    with pytest.raises(AdapterFileError):
        lab.store.ready(early)
    lab.store.release(early)
    assert lab.store.lease({"x": 1.0}) is not None and len(lab.loads.waiting) == 1
    lab.check()


def test_a_failure_of_a_removed_adapter_leaves_nothing_behind() -> None:
    lab = Lab(1, "a", x=broken())
    lease = lab.store.lease({"x": 1.0})
    assert lease is not None
    lab.store.remove("x")
    lab.loads.run()
    with pytest.raises(AdapterFileError):
        lab.store.ready(lease)
    lab.store.release(lease)
    assert lab.store._free == [1] and not lab.store._placed
    lab.take("a")
    lab.check()


def test_a_slot_that_a_failed_load_touched_holds_only_the_next_adapter() -> None:
    """The failed read wrote one weight of two; the next adapter changes only the other."""
    slots = FakeSlots(1, names=("w", "v"))
    half = broken(tensors=[FakePair("v"), FakePair("w")], mark=7.0)
    with pytest.raises(AdapterFileError):
        load_into(slots, half, (1,))  # type: ignore[arg-type]
    assert slots.held[1, "v"] is not None
    load_into(slots, FakeSource("a", mark=2.0), (1,))  # type: ignore[arg-type]
    assert slots.held[1, "v"] is None and slots.mark(1) == 2.0


# the thread of its own


def on_thread(n_slots: int, *sources: Any) -> tuple[AdapterStore, threading.Event]:
    woken = threading.Event()
    store = AdapterStore(FakeSlots(n_slots), woken.set)  # type: ignore[arg-type]
    for source in sources:
        store.add(source)
    return store, woken


def test_a_load_runs_elsewhere_and_wakes_the_engine() -> None:
    gate = threading.Event()
    store, woken = on_thread(1, FakeSource("a", gate=gate))
    with store:
        lease = store.lease({"a": 1.0})
        assert lease is not None and not store.ready(lease) and not woken.is_set()
        gate.set()
        assert woken.wait(20)
        while not store.ready(lease):
            time.sleep(0.001)
        assert store.stats()["load_s"] > 0  # type: ignore[operator]


def test_closing_lets_a_running_load_end_and_drops_those_that_wait() -> None:
    gate = threading.Event()
    sources = [FakeSource(name, gate=gate) for name in "abc"]
    store, _ = on_thread(3, *sources)
    leases = [store.lease({name: 1.0}) for name in "abc"]
    closer = threading.Thread(target=store.close)
    deadline = time.monotonic() + 20
    while not sources[0].n_reads and time.monotonic() < deadline:
        time.sleep(0.001)
    closer.start()
    gate.set()
    closer.join(20)
    assert not closer.is_alive()
    assert sources[0].n_reads == 1 and sources[2].n_reads == 0
    for lease in leases:
        assert lease is not None
        store.release(lease)
    store.close()
    assert not any(t.name.startswith("edgeroute-adapters") for t in threading.enumerate())


def test_statistics_may_be_read_while_the_library_changes() -> None:
    """Any thread may ask for them; the engine adds and removes meanwhile."""
    lab = Lab(2)
    errors: list[BaseException] = []
    stop = threading.Event()

    def read() -> None:
        try:
            while not stop.is_set():
                assert "known" in lab.store.stats() and lab.store.names is not None
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(20_000):
        lab.store.add(FakeSource(f"n{i % 700}"))
        if i % 3 == 0:
            lab.store.remove(f"n{i % 700}")
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors


# how scales are applied


@pytest.mark.parametrize(
    ("scales", "row", "fold"),
    [([2.0, 2.0], 1.0, True), ([0.25], 1.0, True), ([-4.0], 1.0, True), ([0.0], 1.0, True),
     ([1.0], 1.0, True), ([3.0, 3.0], 3.0, False), ([2.0, 3.0], 1.0, True)],
)  # fmt: skip
def test_where_a_scale_goes(scales: list[float], row: float, fold: bool) -> None:
    pairs = [FakePair(f"w{i}", scale=scale) for i, scale in enumerate(scales)]
    source = FakeSource("a", tensors=pairs)
    assert factors_of(source) == (row, fold)
    assert [target.name for target in targets_of(source)] == [pair.name for pair in pairs]
    slots = FakeSlots(1, names=tuple(pair.name for pair in pairs))
    load_into(slots, source, (1,))  # type: ignore[arg-type]
    for pair in pairs:
        held = slots.held[1, pair.name]
        assert held is not None and (held[0] == 1).all()
        assert (held[1].astype(np.float64) * row == pair.scale).all()


def test_a_scale_beyond_halves_is_an_error_that_names_it() -> None:
    source = FakeSource("hot", tensors=[FakePair("w", scale=1024.0)], mark=100.0)
    with pytest.raises(CapacityError, match=r"'hot' scales w by 1024.*lower its alpha"):
        load_into(FakeSlots(1), source, (1,))  # type: ignore[arg-type]


def test_ranks_are_cut_into_blocks_with_zeros_at_the_end() -> None:
    pairs = [FakePair("w", rank=5), FakePair("v", rank=1)]
    assert n_blocks(FakeSource("a", tensors=pairs), 2) == 3
    slots = FakeSlots(3, names=("w", "v", "u"))
    load_into(slots, FakeSource("a", tensors=pairs), (3, 1, 2))  # type: ignore[arg-type]
    used = {name: [0 if slots.held[slot, name] is None else  # type: ignore[index]
                   int(slots.held[slot, name][0].any(axis=1).sum()) for slot in (3, 1, 2)]
            for name in ("w", "v", "u")}  # fmt: skip
    assert used == {"w": [2, 2, 1], "v": [1, 0, 0], "u": [0, 0, 0]}
