"""Hit curves: LRU at all sizes as by replay, and the optimum above every policy, always."""

import random
from dataclasses import replace

import numpy as np
import pytest

from edgeroute.offload.eviction import PoolShape
from edgeroute.offload.eviction_registry import POLICIES, make_policy
from edgeroute.offload.hit_curve import hit_curve, layer_hit_ratios, lru_curve
from edgeroute.offload.lru_order import settle
from edgeroute.offload.page_table import PageTable
from edgeroute.offload.replay import replay
from edgeroute.offload.segment_oracle import SegmentOracle
from edgeroute.offload.stack_distance import uses_of
from edgeroute.offload.trace import Trace, make_step
from edgeroute.runtime.errors import CapacityError, UsageError
from tests.offload.routing_lab import Draw, any_draw, drawn, meta_of, written


@pytest.mark.parametrize("seed", range(8))
def test_lru_at_all_sizes_is_what_replay_counts_at_each(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(6):
        trace = drawn(any_draw(rng), rng)
        curve = lru_curve(trace)
        n_page = len(trace.meta.layers) * trace.meta.n_expert
        assert curve.hits.shape == (n_page + 1,) and not curve.hits[: curve.min_slots].any()
        for n_slots in range(curve.min_slots, n_page + 2):
            total = replay(trace, "lru", n_slots).decode.total
            assert total.requests == curve.n_request
            assert total.hits == curve.hits[min(n_slots, n_page)], n_slots
            assert curve.hit_ratio(n_slots) == total.hit_ratio


def test_lru_of_some_layers_is_a_pool_of_theirs() -> None:
    rng = random.Random(5)
    trace = drawn(Draw(n_layer=4, n_expert=12, n_expert_used=3, n_step=80), rng)
    for layers in ([2], [0, 3]):
        curve = lru_curve(trace, layers)
        for n_slots in (3, 7, 11, 24):
            assert (
                curve.hit_ratio(n_slots) == replay(trace, "lru", n_slots, layers=layers).hit_ratio
            )
    assert layer_hit_ratios(trace, "lru", 6) == {
        il: lru_curve(trace, [il]).hit_ratio(6) for il in range(4)
    }


def test_lru_does_not_depend_on_how_many_uses_are_worked_off_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = random.Random(8)
    trace = drawn(Draw(n_layer=3, n_expert=40, n_expert_used=4, n_step=300, max_tokens=2), rng)
    hits = lru_curve(trace).hits
    monkeypatch.setattr("edgeroute.offload.lru_order._CHUNK_CELLS", 1)
    monkeypatch.setattr("edgeroute.offload.stack_distance._BLOCK", 7)
    assert np.array_equal(lru_curve(trace).hits, hits)
    for n_slots in (9, 30, 71):
        assert replay(trace, "lru", n_slots).decode.total.hits == hits[n_slots]


def test_the_order_inside_a_request_is_that_of_the_page_table() -> None:
    """With 3 slots, 3 hits in the second request and moves before 2 enters; so 2 stays longer."""
    trace = written(meta_of(1, 8, 2), [[[0, 3]], [[2, 3]], [[1, 6]], [[7, 2]]])
    assert lru_curve(trace).hits.tolist() == [0, 0, 1, 2, 2, 2, 2, 2, 2]


def test_a_use_may_hit_with_fewer_slots_and_miss_with_more() -> None:
    """Each use at each size, against the live page table."""
    tokens = [[[3, 5, 2]], [[1, 0, 4]], [[3, 5, 4]], [[0, 1, 2]], [[1, 5, 2]]]
    uses = uses_of(written(meta_of(1, 6, 3), tokens))
    fates = settle(uses)
    shape = PoolShape(pages=range(6), n_expert=6)
    hits = []
    for n_slots in range(3, 8):
        table = PageTable(n_slots, make_policy("lru", shape, n_slots), shape)
        for at, (pages,) in enumerate(tokens):
            table.begin_step()
            missing = [one.page for one in table.acquire(pages)[1]]
            for page in missing:
                table.loaded(page)
            table.release(pages)
            for use in range(3 * at, 3 * at + 3):
                extra = n_slots - 1 - int(fates.between[use])
                found = extra >= 0 and bool(fates.hits[use, min(extra, 2)])
                assert found == (uses.page[use] not in missing), (use, n_slots)
                hits.append((use, found))
    by_use = {use: [found for each, found in hits if each == use] for use in range(15)}
    assert any(sorted(found) != found for found in by_use.values())


@pytest.mark.parametrize("seed", range(6))
def test_no_policy_is_above_belady(seed: int) -> None:
    rng = random.Random(100 + seed)
    trace = drawn(any_draw(rng), rng)
    n_page = len(trace.meta.layers) * trace.meta.n_expert
    least = uses_of(trace).max_request
    sizes = sorted({least, *(rng.randint(least, n_page) for _ in range(4)), n_page})
    best = hit_curve(trace, "belady", sizes)
    for policy in (*POLICIES, "sch1", "sch4", "sch100"):
        for n_slots, most, ratio in zip(sizes, best, hit_curve(trace, policy, sizes), strict=True):
            assert ratio <= most, (policy, n_slots)


class SlowOracle:
    """The next m tokens counted anew for each victim; fed by the same page table."""

    name = "slow"

    def __init__(self, steps: list[list[list[int]]], m: int) -> None:
        self.steps, self.m = steps, m
        self.step, self.layer, self.tick = -1, -1, 0
        self.last: dict[int, int] = {}

    def begin_step(self) -> None:
        self.step, self.layer = self.step + 1, -1

    def used(self, layer: int, pages: list[int]) -> None:
        self.layer = layer
        for page in pages:
            self.add(page)

    def add(self, page: int) -> None:
        self.tick += 1
        self.last[page] = self.tick

    def remove(self, page: int) -> None:
        del self.last[page]

    def coming(self, page: int) -> int:
        """Uses after this request: layers still to come now count as their first of m turns."""
        n_expert = 6
        is_ahead = page // n_expert > self.layer
        first = self.step if is_ahead else self.step + 1
        steps = self.steps[first : first + self.m]
        return sum(page in pages for step in steps for pages in step)

    def victim(self, pinned: dict[int, int]) -> int | None:
        free = [page for page in self.last if page not in pinned]
        return min(free, key=lambda page: (self.coming(page), self.last[page]), default=None)

    def members(self) -> set[int]:
        return set(self.last)


@pytest.mark.parametrize("m", [1, 3, 50])
def test_the_segment_oracle_does_what_its_definition_says(m: int) -> None:
    rng = random.Random(m)
    draw = Draw(n_layer=3, n_expert=6, n_expert_used=2, n_step=60, max_tokens=2)
    trace = drawn(draw, rng)
    shape = PoolShape(pages=range(18), n_expert=6)
    steps = [
        [list(dict.fromkeys((il * 6 + ids.astype(int)).tolist())) for il, ids in step.parts()]
        for step in trace.steps
    ]
    for n_slots in (4, 7, 12):
        hits = []
        for policy in (SegmentOracle(shape, steps, m), SlowOracle(steps, m)):
            table = PageTable(n_slots, policy, shape)
            for wanted in steps:
                table.begin_step()
                for pages in wanted:
                    for one in table.acquire(pages)[1]:
                        table.loaded(one.page)
                    table.release(pages)
            hits.append(table.decode.snapshot().total.hits)
        assert hits[0] == hits[1] > 0
        ratio = hits[0] / lru_curve(trace).n_request
        assert hit_curve(trace, f"sch{m}", [n_slots]) == (ratio,)


def test_prefill_is_left_out() -> None:
    rng = random.Random(2)
    trace = drawn(Draw(n_layer=2, n_expert=8, n_expert_used=2, n_step=30), rng)
    prompt = make_step(trace.meta, True, [(0, list(range(8))), (1, [0, 1])])
    longer = replace(trace, steps=(prompt, *trace.steps[:9], prompt, *trace.steps[9:]))
    for policy in ("lru", "lfu", "belady", "sch4"):
        assert hit_curve(longer, policy, [5, 9]) == hit_curve(trace, policy, [5, 9])


def test_what_cannot_be_drawn_is_refused() -> None:
    rng = random.Random(2)
    trace = drawn(Draw(n_layer=2, n_expert=8, n_expert_used=2, n_step=3), rng)
    with pytest.raises(CapacityError):
        hit_curve(trace, "lfu", [1])
    for policy, sizes, layers, text in (
        ("lru", [1], None, "1 slots cannot serve"),
        ("sch0", [4], None, "at least 1 token"),
        ("sch", [4], None, "no eviction policy"),
        ("lru", [4], [5], "not all among"),
    ):
        with pytest.raises(UsageError, match=text):
            hit_curve(trace, policy, sizes, layers)
    none = Trace(meta=trace.meta, steps=(make_step(trace.meta, True, [(0, [1, 2])]),))
    for policy in ("lru", "belady"):
        with pytest.raises(UsageError, match="has none"):
            hit_curve(none, policy, [4])
