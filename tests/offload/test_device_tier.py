"""Parts of a device tier that need no device: counters, groups on their way, pages let go."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from edgeroute.offload.counters import LayerCounters
from edgeroute.offload.eviction import PoolShape
from edgeroute.offload.eviction_registry import POLICIES, make_policy
from edgeroute.offload.page_table import PageTable
from edgeroute.offload.tier_counts import TierCount, TierCounters, count_layer, sum_counts
from edgeroute.offload.tier_turns import Coming
from edgeroute.runtime.experts import Held

SHAPE = PoolShape(pages=range(24), n_expert=8)


class Below:
    """A tier that yields groups of given sizes; those `here` need no waiting."""

    def __init__(self, sizes: list[int], *, stops_at: int | None = None) -> None:
        self.sizes, self.stops_at, self.next_is_here = sizes, stops_at, False
        self.n_asked = 0

    def in_turn(self, il: int, counts: Mapping[int, int], most: int) -> Iterator[Held | None]:
        experts = list(counts)
        for number, size in enumerate(self.sizes):
            self.n_asked += 1
            if number == self.stops_at:
                yield None
                return
            group, experts = experts[:size], experts[size:]
            yield Held(group, [100 + expert for expert in group])


def coming(below: Below, n: int) -> Coming:
    tier: Any = below
    return Coming(tier, 0, dict.fromkeys(range(n), 1), 64)


def test_groups_are_cut_and_none_is_asked_for_before_the_last_is_used_up() -> None:
    below = Below([5, 2, 4])
    arriving = coming(below, 11)
    taken: list[int] = []
    for size, n_asked in ((2, 1), (2, 1), (2, 1), (3, 2), (3, 3), (3, 3)):
        found = arriving.take(size)
        assert below.n_asked == n_asked and 0 < len(found) <= size
        assert found == {expert: 100 + expert for expert in found}
        taken += found
    assert taken == list(range(11)) and arriving.n_left == 0
    assert not arriving.is_stopped


def test_the_rest_of_a_group_needs_no_waiting() -> None:
    below = Below([3, 3])
    arriving = coming(below, 6)
    assert not arriving.is_here
    arriving.take(2)
    assert arriving.is_here
    arriving.take(2)
    assert not arriving.is_here
    below.next_is_here = True
    assert arriving.is_here


def test_a_stop_below_is_passed_on() -> None:
    arriving = coming(Below([2, 2], stops_at=1), 4)
    assert arriving.take(8) == {0: 100, 1: 101}
    assert arriving.take(8) == {} and arriving.is_stopped and arriving.n_left == 2


def test_nothing_absent_asks_nobody() -> None:
    below = Below([1])
    arriving = coming(below, 0)
    assert arriving.n_left == 0 and below.n_asked == 0


def test_a_layers_counts_are_of_both_tiers() -> None:
    own, device, dram = TierCounters(3), LayerCounters(3), LayerCounters(3)
    device.hits[1], device.misses[1], device.evictions[1] = 7, 9, 4
    own.uploaded[1], own.away[1], own.n_bytes[1], own.upload_s[1] = 6, 3, 600, 0.5
    dram.hits[1], dram.late[1], dram.misses[1] = 5, 1, 3
    count = count_layer(1, own, device, dram)
    assert count == TierCount(
        hits=7, misses=9, uploaded=6, away=3, uploaded_bytes=600, upload_s=0.5, evictions=4,
        dram_hits=5, dram_late=1, disk_reads=3,
    )  # fmt: skip
    assert count.reconciles and count.hit_ratio == 7 / 16
    dram.misses[1] = 2
    assert not count_layer(1, own, device, dram).reconciles
    empty = count_layer(0, own, device, dram)
    assert empty == TierCount() and empty.hit_ratio == 0 and empty.reconciles
    total = sum_counts([count, count, empty])
    assert total.misses == 18 and total.upload_s == 1.0 and total.reconciles
    assert total.to_dict()["hit_ratio"] == count.hit_ratio


@pytest.mark.parametrize("policy", POLICIES)
def test_a_page_that_gives_way_leaves_first_unless_it_is_asked_for(policy: str) -> None:
    table = PageTable(6, make_policy(policy, SHAPE, 6), SHAPE)

    def ask(pages: list[int]) -> None:
        table.begin_step()
        for one in table.acquire(pages)[1]:
            table.loaded(one.page)
        table.release(pages)
        table.check()

    ask([0, 1, 2])
    ask([8, 9, 10])
    for page in (0, 1):
        table.give_way(page)
    table.give_way(1)  # again: nothing
    table.give_way(23)  # not here: nothing
    table.check()
    ask([1])  # it stays after all
    ask([16])
    assert 0 not in table.resident() and {1, 2, 8, 9, 10, 16} == set(table.resident())


def test_a_prefetched_page_that_gives_way_was_read_in_vain() -> None:
    table = PageTable(2, make_policy("lru", SHAPE, 2), SHAPE)
    table.begin_step()
    assert table.reserve_prefetch(3) is not None
    table.give_way(3)  # on its way: it has nothing to give yet
    table.check()
    table.loaded(3)
    table.give_way(3)
    table.check()
    assert table.decode.snapshot().total.prefetch_wasted == 1


def test_a_pinned_page_gives_way_only_when_it_is_let_go() -> None:
    table = PageTable(1, make_policy("lru", SHAPE, 1), SHAPE)
    table.begin_step()
    for one in table.acquire([4])[1]:
        table.loaded(one.page)
    table.give_way(4)
    table.check()
    assert table.reserve_prefetch(5) is None
    table.release([4])
    assert table.reserve_prefetch(5) == 0
