"""Replay: a live run and its recorded trace give equal counters, policy by policy."""

import random
from pathlib import Path

import pytest

from edgeroute.offload.eviction import PolicyParams, PoolShape
from edgeroute.offload.eviction_cliff import CycleShape, cyclic_trace
from edgeroute.offload.eviction_registry import POLICIES, make_policy
from edgeroute.offload.page_table import PageTable
from edgeroute.offload.replay import (
    choose_policy,
    count_uses,
    replay,
    shape_of,
)
from edgeroute.offload.trace import (
    Trace,
    TraceMeta,
    TraceRecorder,
    TraceWriter,
    make_step,
    pages_of,
    read_trace,
)
from edgeroute.runtime.errors import CapacityError, UsageError

META = TraceMeta(
    model="tiny", n_layer=6, n_expert=16, n_expert_used=3, page_bytes=100, layers=(1, 2, 3, 5)
)


def live_run(policy: str, n_slots: int, path: Path) -> PageTable:
    """Steps of one to three tokens and some prefill, recorded to a file as they happen."""
    rng = random.Random(9)
    pages = [il * META.n_expert + e for il in META.layers for e in range(META.n_expert)]
    shape = PoolShape(pages=pages, n_expert=META.n_expert, page_bytes=META.page_bytes)
    table = PageTable(n_slots, make_policy(policy, shape, n_slots), shape)
    with TraceWriter(path, META) as writer:
        recorder = TraceRecorder(META, writer=writer)
        for number in range(150):
            prefill = number % 40 == 0
            table.begin_step(prefill)
            recorder.begin_step(prefill)
            for il in META.layers:
                ids = [int(rng.triangular(0, 16, 0)) for _ in range(3 * rng.randint(1, 3))]
                recorder.record(il, ids)
                wanted = pages_of(il, ids, META.n_expert)
                for one in table.acquire(wanted)[1]:
                    table.loaded(one.page)
                table.release(wanted)
        recorder.end_step()
    return table


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("n_slots", [9, 20, 50, 64])
def test_replay_counts_what_the_live_run_counted(tmp_path: Path, policy: str, n_slots: int) -> None:
    table = live_run(policy, n_slots, tmp_path / "t")
    result = replay(read_trace(tmp_path / "t"), policy, n_slots)
    assert result.decode == table.decode.snapshot()
    assert result.prefill == table.prefill.snapshot()
    assert result.decode.total.hits > 0 < result.prefill.total.misses
    assert result.decode.total.demand_bytes == 100 * result.decode.total.misses


def test_pools_are_replayed_apart() -> None:
    """With slots for everything, two pools count together what one counts."""
    trace = cyclic_trace(CycleShape(n_layer=4, n_expert=8, n_expert_used=2), 30, 0.5)
    whole = replay(trace, "lru", 32).decode.total
    parts = [replay(trace, "lru", 16, layers=layers).decode for layers in ((0, 2), (1, 3))]
    assert sum(part.total.hits for part in parts) == whole.hits
    assert parts[0].layers[1].requests == 0 < parts[1].layers[1].requests
    with pytest.raises(UsageError, match="not all among the trace's"):
        replay(trace, "lru", 16, layers=(0, 7))
    assert shape_of(trace, (2,)).n_layer == 3


def test_the_policy_with_most_hits_is_chosen() -> None:
    shape = CycleShape(n_layer=8, n_expert=16, n_expert_used=2)
    trace = cyclic_trace(shape, 60, 0.7)
    choice = choose_policy(trace, 12)
    assert set(choice.hit_ratios) == {*POLICIES, "belady"}
    online = {name: ratio for name, ratio in choice.hit_ratios.items() if name != "belady"}
    assert online[choice.name] == max(online.values()) <= choice.hit_ratios["belady"]
    assert choice.hit_ratios["lru"] == 0 and choice.name != "lru"
    assert choose_policy(trace, 128).name == "lru"  # everything fits: the first of equals
    for name, ratio in choice.hit_ratios.items():
        assert replay(trace, name, 12).hit_ratio == ratio


def test_a_hot_set_from_a_trace_beats_one_from_few_tokens() -> None:
    rng = random.Random(2)
    steps = tuple(
        make_step(META, False, [(il, [int(rng.triangular(0, 16, 0))]) for il in META.layers])
        for _ in range(300)
    )
    trace = Trace(meta=META, steps=steps)
    uses = count_uses(trace)
    assert sum(uses.values()) == 300 * 4
    known = replay(trace, "static", 12, PolicyParams(hot_counts=uses)).hit_ratio
    assert known > replay(trace, "static", 12, PolicyParams(warmup_tokens=2)).hit_ratio


def test_what_cannot_be_replayed_is_refused() -> None:
    shape = CycleShape(n_layer=2, n_expert=8, n_expert_used=3)
    trace = cyclic_trace(shape, 3, 1.0)
    with pytest.raises(CapacityError, match="at least 3 slots"):
        replay(trace, "lru", 2)
    with pytest.raises(UsageError, match="no eviction policy"):
        replay(trace, "clock", 4)
    prefill = make_step(trace.meta, True, [(0, [1, 2, 3])])
    with pytest.raises(UsageError, match="has none"):
        choose_policy(Trace(meta=trace.meta, steps=(prefill,)), 4)
