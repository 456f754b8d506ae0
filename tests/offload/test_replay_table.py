"""The quick replay counts what the live page table counts, for every policy, bit for bit."""

from collections.abc import Callable, Container, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeroute.offload.eviction import EvictionPolicy, PolicyParams, PoolShape
from edgeroute.offload.eviction_oracle import Belady
from edgeroute.offload.eviction_registry import POLICIES, make_policy
from edgeroute.offload.page_table import PageTable
from edgeroute.offload.replay import run_steps
from edgeroute.offload.replay_table import ReplayTable
from edgeroute.runtime.errors import CapacityError, UsageError
from tests.offload import replay_oracle as oracle

N_EXPERT, N_LAYER, MAX_PAGES = 7, 3, 5
SHAPE = PoolShape(pages=range(N_EXPERT * N_LAYER), n_expert=N_EXPERT, page_bytes=10)
PARAMS = PolicyParams(window=4, warmup_tokens=3, decay=0.5)

_layer = st.lists(st.integers(0, N_EXPERT - 1), max_size=MAX_PAGES, unique=True)
_step = st.tuples(st.integers(0, 4).map(lambda n: n == 0), st.tuples(*[_layer] * N_LAYER))
_Steps = list[tuple[bool, list[list[int]]]]
STEPS = st.lists(_step, max_size=40).map(
    lambda steps: [
        (prefill, [[il * N_EXPERT + e for e in experts] for il, experts in enumerate(wanted)])
        for prefill, wanted in steps
    ]
)


def maker(name: str, n_slots: int, steps: _Steps) -> Callable[[], EvictionPolicy]:
    if name == "belady":
        future = [pages for prefill, wanted in steps if not prefill for pages in wanted if pages]
        return lambda: Belady(SHAPE, future)
    return lambda: make_policy(name, SHAPE, n_slots, PARAMS)


@pytest.mark.parametrize("name", [*sorted(POLICIES), "belady"])
@given(steps=STEPS, n_slots=st.integers(MAX_PAGES, N_EXPERT * N_LAYER))
@settings(max_examples=30, deadline=None)
def test_the_quick_way_counts_what_the_slow_one_does(
    name: str, steps: _Steps, n_slots: int
) -> None:
    make = maker(name, n_slots, steps)
    slow, quick = PageTable(n_slots, make(), SHAPE), ReplayTable(n_slots, make(), SHAPE)
    oracle.run_slowly(slow, steps)
    run_steps(quick, steps)
    assert quick.decode.snapshot() == slow.decode.snapshot()
    assert quick.prefill.snapshot() == slow.prefill.snapshot()
    assert set(quick.policy.members()) == set(slow.policy.members())


class Foresight(Belady):
    """The optimum, looked up anew for each victim."""

    def __init__(self, shape: PoolShape, future: Sequence[Sequence[int]]) -> None:
        super().__init__(shape, ())
        self._future = list(future)
        self._now = -1

    def used(self, layer: int, pages: Sequence[int]) -> None:
        if layer >= 0:  # else it comes from `add`
            self._now += 1

    def victim(self, pinned: Container[int]) -> int | None:
        after = self._future[self._now + 1 :]
        never = len(after)

        def rank(page: int) -> tuple[int, int]:
            return next((i for i, pages in enumerate(after) if page in pages), never), -page

        return max((page for page in self.members() if page not in pinned), key=rank, default=None)


@given(steps=STEPS, n_slots=st.integers(MAX_PAGES, 12))
@settings(max_examples=60, deadline=None)
def test_belady_evicts_what_is_needed_last(steps: _Steps, n_slots: int) -> None:
    decode = [(prefill, [pages for pages in wanted if pages]) for prefill, wanted in steps
              if not prefill]  # fmt: skip
    future = [pages for _, wanted in decode for pages in wanted]
    slow = ReplayTable(n_slots, Foresight(SHAPE, future), SHAPE)
    quick = ReplayTable(n_slots, Belady(SHAPE, future), SHAPE)
    run_steps(slow, decode)
    run_steps(quick, decode)
    assert quick.decode.snapshot() == slow.decode.snapshot()
    assert set(quick.policy.members()) == set(slow.policy.members())


def test_a_policy_of_ones_own_is_replayed_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class and a row: here one that evicts what came first."""
    from edgeroute.offload.eviction import Lru
    from edgeroute.offload.eviction_cliff import CycleShape, cyclic_trace
    from edgeroute.offload.replay import choose_policy, replay

    class Fifo(Lru):
        name = "fifo"

        def used(self, layer: int, pages: object) -> None:
            """A use changes nothing."""

    monkeypatch.setitem(POLICIES, "fifo", Fifo)
    trace = cyclic_trace(CycleShape(n_layer=3, n_expert=12, n_expert_used=2), 60, 0.7)
    found = replay(trace, "fifo", 9)
    assert found.policy == "fifo" and 0 < found.hit_ratio < 1
    assert found.hit_ratio != replay(trace, "lru", 9).hit_ratio
    assert choose_policy(trace, 9).hit_ratios["fifo"] == found.hit_ratio


def test_what_does_not_fit_is_refused_alike() -> None:
    policy = make_policy("lru", SHAPE, 4)
    with pytest.raises(CapacityError, match="at least 5 slots"):
        ReplayTable(4, policy, SHAPE).run_step(False, [[0, 1, 2, 3, 4]])
    with pytest.raises(CapacityError, match="at least 5 slots"):
        ReplayTable(4, make_policy("lru", SHAPE, 4), SHAPE).run_step(True, [[0, 1, 2, 3, 4]])
    with pytest.raises(UsageError, match="at least 1 slot"):
        ReplayTable(0, make_policy("lru", SHAPE, 1), SHAPE)
    policy.add(3)
    with pytest.raises(UsageError, match="already has members"):
        ReplayTable(4, policy, SHAPE)
