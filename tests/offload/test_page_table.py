"""Leases, victims and prefetches of one pool, by cases and by millions of random operations."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeroute.offload.eviction import PoolShape
from edgeroute.offload.eviction_registry import make_policy
from edgeroute.offload.page_table import Missing, PageTable
from edgeroute.runtime.errors import CapacityError, UsageError
from tests.offload import page_table_driver as driver

N_EXPERT = 10
SHAPE = PoolShape(pages=range(40), n_expert=N_EXPERT, page_bytes=7)


def new_table(n_slots: int = 4, policy: str = "lru") -> PageTable:
    table = PageTable(n_slots, make_policy(policy, SHAPE, n_slots), SHAPE)
    table.begin_step()
    return table


def use(table: PageTable, *pages: int) -> list[int]:
    """Lease pages, let them come, release them; the slots they had."""
    slots, missing = table.acquire(pages)
    for one in missing:
        table.loaded(one.page)
    table.release(pages)
    table.check()
    return slots


def test_a_lease_gives_slots_in_order_and_hits_when_asked_again() -> None:
    table = new_table()
    slots, missing = table.acquire([5, 3])
    assert [one.page for one in missing] == [5, 3] and [one.slot for one in missing] == slots
    assert table.slot_of(5) is None and table.has(5)
    for one in missing:
        table.loaded(one.page)
    table.release([5, 3])
    assert table.acquire([3, 5]) == (slots[::-1], [])
    counted = table.decode.snapshot().total
    assert (counted.hits, counted.misses, counted.demand_bytes) == (2, 2, 14)
    assert table.acquire([]) == ([], [])


def test_the_least_recently_used_unpinned_page_leaves() -> None:
    table = new_table()
    for page in (1, 2, 3, 4):
        use(table, page)
    use(table, 1)
    table.acquire([2])
    use(table, 5)  # 2 is older, but pinned
    assert sorted(table.resident()) == [1, 2, 4, 5]
    assert table.decode.evictions[0] == 1


def test_a_request_beyond_the_slots_changes_nothing() -> None:
    table = new_table()
    use(table, 1, 2)
    table.acquire([1])
    before = (dict.fromkeys(table.resident()), table.decode.snapshot())
    with pytest.raises(CapacityError, match=r"5 pages, 4 of them absent.*4 slots.*least 6 slots"):
        table.acquire([2, 6, 7, 8, 9])
    assert (dict.fromkeys(table.resident()), table.decode.snapshot()) == before
    assert table.n_pinned == 1
    table.check()
    assert len(table.acquire([6, 7, 8])[1]) == 3


def test_pins_are_counted() -> None:
    table = new_table(1)
    use(table, 1)
    table.acquire([1])
    table.acquire([1])
    table.release([1])
    with pytest.raises(CapacityError):
        table.acquire([2])
    table.release([1])
    use(table, 2)
    with pytest.raises(KeyError):
        table.release([2])


def test_a_repeated_page_is_one_load() -> None:
    table = new_table()
    slots, missing = table.acquire([1, 1, 2])
    assert slots[0] == slots[1] and [one.page for one in missing] == [1, 2]
    table.loaded(1)
    table.loaded(2)
    table.release([1, 1, 2])
    assert table.n_pinned == 0
    table.check()


def test_pages_of_another_pool_are_refused() -> None:
    table = PageTable(2, make_policy("lru", SHAPE, 2), PoolShape(pages=[3, 4], n_expert=N_EXPERT))
    with pytest.raises(ValueError, match="page 5 is not of this pool of 2 pages"):
        table.acquire([3, 5])
    with pytest.raises(ValueError, match="page 9"):
        table.reserve_prefetch(9)
    assert table.n_pinned == 0
    table.check()


def test_a_failed_read_frees_its_slot_with_the_last_pin_and_may_be_tried_again() -> None:
    table = new_table(2)
    table.acquire([1])
    table.acquire([1])
    table.failed(1)
    with pytest.raises(KeyError):
        table.loaded(1)
    (slot,), (again,) = table.acquire([1])
    assert again == Missing(1, slot)  # read it again: nothing is under way
    table.failed(1)
    for _ in range(3):
        assert table.n_free == 1
        table.release([1])
        table.check()
    assert table.n_free == 2 and not table.has(1)
    with pytest.raises(KeyError):
        table.failed(1)


def test_an_abandoned_load_may_still_come_and_gives_way_first() -> None:
    table = new_table(2)
    use(table, 1)
    table.acquire([2])
    table.release([2])  # cancelled while its read runs
    table.check()
    table.loaded(2)
    use(table, 3)
    assert sorted(table.resident()) == [1, 3]


def test_a_prefetched_page_is_useful_late_or_wasted() -> None:
    table = new_table(8)
    for page in (10, 11, 12):
        assert table.reserve_prefetch(page) is not None
    assert table.reserve_prefetch(10) is None
    table.loaded(10)
    slots, missing = table.acquire([10, 11])
    assert missing == [Missing(11, slots[1], promote=True)]
    counted = table.decode.snapshot()
    assert (counted.total.hits, counted.total.late, counted.total.misses) == (1, 1, 0)
    assert (counted.total.prefetch_useful, counted.total.prefetch_wasted) == (2, 1)
    assert counted.layers[1].prefetch_issued == 3 and counted.total.prefetch_bytes == 21
    assert table.drop(12) and not table.drop(12) and not table.drop(10)
    table.check()


def test_a_prefetch_takes_nothing_used_within_the_last_token_cycle() -> None:
    table = new_table(3)
    use(table, 1)
    use(table, 11)
    use(table, 21)
    assert table.reserve_prefetch(30) is None  # all were used in this token
    table.begin_step()
    use(table, 2)  # takes the slot of page 1
    assert table.reserve_prefetch(12) is None  # layer 1's turn comes only now
    use(table, 2)
    table.acquire([2])
    table.release([2])
    table.begin_step()
    use(table, 2)
    assert table.reserve_prefetch(12) is not None  # page 11 missed its turn a token ago
    assert sorted(table.resident()) == [2, 21]
    assert table.reserve_prefetch(31) is not None  # so did 21
    assert table.reserve_prefetch(32) is None
    table.check()


def test_a_demand_load_takes_a_prefetchs_slot_when_no_other_is_left() -> None:
    table = new_table(3)
    use(table, 1)
    first, second = table.reserve_prefetch(10), table.reserve_prefetch(11)
    table.loaded(10)
    table.acquire([1])
    _, (one, two) = table.acquire([20, 21])
    assert (one.slot, one.cancels) == (first, None)  # what has come goes before what is coming
    assert (two.slot, two.cancels) == (second, 11)
    with pytest.raises(KeyError):
        table.loaded(11)
    assert table.decode.snapshot().total.prefetch_wasted == 2
    table.check()


def test_prefill_cycles_through_few_slots_and_spares_what_decode_uses() -> None:
    table = new_table(6)
    for _ in range(2):
        table.begin_step()
        use(table, 1, 2)
        use(table, 11, 12)
    table.begin_step(prefill=True)
    for layer in range(4):
        use(table, *[layer * N_EXPERT + expert for expert in (7, 8, 9)])
    decoded = [page for page in (1, 2, 11, 12) if table.slot_of(page) is not None]
    assert len(decoded) == 3  # four layers of three pages took one page, beside two free slots
    prefilled = table.prefill.snapshot().total
    assert (prefilled.misses, table.decode.snapshot().total.hits) == (12, 4)
    table.begin_step()
    use(table, 37, 38)  # what prefill left serves decode, and is then kept like its pages
    assert table.decode.snapshot().layers[3].hits == 2
    assert {37, 38} <= set(table.policy.members())


def test_shrinking_gives_up_the_least_valuable_and_growing_brings_slots_back() -> None:
    table = new_table(4)
    for page in (1, 2, 3):
        use(table, page)
    table.acquire([1])
    done = table.resize(1)
    assert done.evicted == [2, 3] and len(done.retired) == 3 and table.n_slots == 1
    table.check()
    table.acquire([1])
    assert table.resize(1) == ([], [], [])
    grown = table.resize(6)
    assert sorted(grown.gained) == sorted([*done.retired, 4, 5]) and table.n_slots == 6
    table.check()
    with pytest.raises(UsageError, match="at least 1 slot"):
        table.resize(0)


def test_shrinking_stops_at_what_is_pinned_or_on_its_way() -> None:
    table = new_table(3)
    table.acquire([1, 2])
    table.reserve_prefetch(12)
    assert table.resize(1) == ([], [], []) and table.n_slots == 3
    table.loaded(12)
    assert table.resize(1).evicted == [12] and table.n_slots == 2
    table.check()


def test_another_policy_takes_the_members_over() -> None:
    table = new_table(3)
    for page in (1, 2, 3):
        table.begin_step()
        use(table, page)
    table.set_policy(make_policy("mru", SHAPE, 3))
    use(table, 4)
    assert sorted(table.resident()) == [1, 2, 4]
    with pytest.raises(UsageError, match="already has members"):
        table.set_policy(table.policy)
    with pytest.raises(UsageError, match="already has members"):
        PageTable(3, table.policy, SHAPE)


@pytest.mark.parametrize(("pages", "n_expert"), [([], 4), ([-1], 4), ([1 << 30], 4), ([1], 0)])
def test_impossible_pools_are_refused(pages: list[int], n_expert: int) -> None:
    with pytest.raises(UsageError):
        PoolShape(pages=pages, n_expert=n_expert)


def test_a_pool_without_slots_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1 slot, got 0"):
        PageTable(0, make_policy("lru", SHAPE, 1), SHAPE)


def test_random_operations_keep_every_invariant() -> None:
    """The driver's main program does ten million of them."""
    seen = driver.drive(200_000, seed=11)
    assert min(seen.values()) >= seen["tables"] == 80, dict(seen)  # each kind of event was met


@given(seed=st.integers(0, 1 << 40))
@settings(max_examples=40, deadline=None)
def test_any_seed_keeps_every_invariant(seed: int) -> None:
    driver.Driver(seed).run(150)
