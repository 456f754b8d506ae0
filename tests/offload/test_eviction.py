"""Every policy against a slow reference written from its definition, and against Belady."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from edgeroute.offload.eviction import PolicyParams, PoolShape
from edgeroute.offload.eviction_cliff import CycleShape, check_cliff, cyclic_trace
from edgeroute.offload.eviction_registry import POLICIES, make_policy
from edgeroute.offload.page_table import PageTable
from edgeroute.offload.replay import replay
from edgeroute.runtime.errors import CapacityError, UsageError

N_LAYER, N_EXPERT = 4, 7
SHAPE = PoolShape(pages=range(N_LAYER * N_EXPERT), n_expert=N_EXPERT)
HOT = {page: (page * 5) % 11 for page in SHAPE.pages}
# Powers of two make fading exact, so that ties are ties in both implementations.
PARAMS = PolicyParams(decay=0.5, weights=(0.5, 0.25, 0.25), window=1 << 20, hot_counts=HOT)


@dataclass
class Use:
    """Every use of a page: (step, tick)."""

    at: list[tuple[int, int]] = field(default_factory=list)


class Reference:
    """A cache that scans all its pages for each victim; `key` is the policy's definition."""

    def __init__(self, n_slots: int, key: Callable[["Reference", int], object]) -> None:
        self.n_slots, self.key = n_slots, key
        self.step = self.tick = 0
        self.layer = -1
        self.members: set[int] = set()
        self.uses = {page: Use() for page in SHAPE.pages}
        self.hits = 0

    def begin_step(self) -> None:
        self.step += 1
        self.layer = -1

    def use(self, page: int) -> None:
        self.tick += 1
        self.uses[page].at.append((self.step, self.tick))

    def request(self, pages: list[int]) -> None:
        self.layer = pages[0] // N_EXPERT
        hits = [page for page in pages if page in self.members]
        absent = [page for page in pages if page not in self.members]
        self.hits += len(hits)
        self.touch(hits)
        while len(self.members) + len(absent) > self.n_slots:
            free = [page for page in self.members if page not in pages]
            self.members.remove(min(free, key=lambda page: self.key(self, page)))
        for page in absent:
            self.members.add(page)
            self.enter(page)

    def enter(self, page: int) -> None:
        self.use(page)

    def touch(self, hits: list[int]) -> None:
        for page in hits:
            self.use(page)


class LfruReference(Reference):
    """Keeps the privileged part as a plain list, oldest first."""

    def __init__(self, n_slots: int) -> None:
        super().__init__(n_slots, LfruReference.order)
        self.privileged: list[int] = []

    def order(self, page: int) -> tuple[bool, float, float]:
        self.privileged = [one for one in self.privileged if one in self.members]
        if page in self.privileged:
            return True, self.privileged.index(page), 0
        return False, frequency(self, page), last(self, page)

    def touch(self, hits: list[int]) -> None:
        super().touch(hits)
        for page in hits:
            self.promote(page)

    def enter(self, page: int) -> None:
        super().enter(page)
        self.promote(page)

    def promote(self, page: int) -> None:
        self.privileged = [one for one in self.privileged if one in self.members and one != page]
        self.privileged.append(page)
        if len(self.privileged) > max(1, int(self.n_slots * PARAMS.protected_ratio)):
            self.privileged.pop(0)


def last(cache: Reference, page: int) -> int:
    return cache.uses[page].at[-1][1]


def frequency(cache: Reference, page: int) -> float:
    return sum(0.5 ** (cache.step - step) for step, _ in cache.uses[page].at)


def hobbit(cache: Reference, page: int) -> tuple[float, int]:
    uses, token = cache.uses[page].at, cache.step + 1
    distance = ((page // N_EXPERT - cache.layer) % N_LAYER) / N_LAYER
    recency, count = (uses[-1][0] + 1) / token, len(uses) / token
    score = 0.5 * recency + 0.25 * count + 0.25 * (1 - distance)
    return round(score, 9), last(cache, page)


def least_stale(cache: Reference, page: int) -> tuple[bool, int]:
    step, tick = cache.uses[page].at[-1]
    turns_missed = cache.step - step - (page // N_EXPERT > cache.layer)
    return (False, tick) if turns_missed > 0 else (True, -tick)


def static(cache: Reference, page: int) -> tuple[bool, int, int]:
    seen = [one for one in HOT if HOT[one] > 0]
    hot = sorted(seen, key=lambda one: (-HOT[one], one))[: cache.n_slots]
    return (True, -hot.index(page), 0) if page in hot else (False, last(cache, page), 0)


REFERENCES: dict[str, Callable[[int], Reference]] = {
    "lru": lambda n: Reference(n, last),
    "mru": lambda n: Reference(n, lambda cache, page: -last(cache, page)),
    "lfu": lambda n: Reference(n, lambda cache, page: (frequency(cache, page), last(cache, page))),
    "lfru": LfruReference,
    "hobbit": lambda n: Reference(n, hobbit),
    "least-stale": lambda n: Reference(n, least_stale),
    "static": lambda n: Reference(n, static),
}


def random_steps(seed: int, n_tokens: int, skew: float) -> list[list[list[int]]]:
    """Tokens of layers of 1 to 3 distinct experts, popular ones more often."""
    rng = random.Random(seed)
    weights = [1 / (1 + expert) ** skew for expert in range(N_EXPERT)]
    steps = []
    for _ in range(n_tokens):
        token = []
        for il in range(N_LAYER):
            chosen = dict.fromkeys(rng.choices(range(N_EXPERT), weights, k=rng.randint(1, 3)))
            token.append([il * N_EXPERT + (expert + il) % N_EXPERT for expert in chosen])
        steps.append(token)
    return steps


@pytest.mark.parametrize("name", sorted(REFERENCES))
@pytest.mark.parametrize("n_slots", [3, 6, 13, 20])
def test_a_policy_does_what_its_definition_says(name: str, n_slots: int) -> None:
    """The same pages are resident after every request, over forty tokens and three skews."""
    for seed, skew in enumerate((0.0, 1.0, 2.0)):
        table = PageTable(n_slots, make_policy(name, SHAPE, n_slots, PARAMS), SHAPE)
        reference = REFERENCES[name](n_slots)
        for token in random_steps(seed, 40, skew):
            table.begin_step()
            reference.begin_step()
            for pages in token:
                for one in table.acquire(pages)[1]:
                    table.loaded(one.page)
                table.release(pages)
                reference.request(pages)
                assert set(table.resident()) == reference.members
        table.check()
        assert sum(table.decode.hits) == reference.hits


def test_every_policy_is_deterministic_and_random_follows_its_seed() -> None:
    trace = cyclic_trace(CycleShape(n_layer=5, n_expert=9, n_expert_used=2), 60, 0.5)
    for name in POLICIES:
        assert replay(trace, name, 8) == replay(trace, name, 8), name
    runs = {replay(trace, "random", 8, PolicyParams(seed=seed)).hit_ratio for seed in range(6)}
    assert len(runs) > 1


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.9, 1.0])
def test_no_policy_beats_belady(keep: float) -> None:
    shape = CycleShape(n_layer=6, n_expert=12, n_expert_used=3)
    for seed in range(3):
        trace = cyclic_trace(shape, 50, keep, seed)
        for n_slots in (3, 10, 17, 18, 30, 60, 72):
            best = replay(trace, "belady", n_slots).decode.total.hits
            for name in POLICIES:
                assert replay(trace, name, n_slots).decode.total.hits <= best, (name, n_slots)


def test_belady_is_the_optimum_of_all_schedules() -> None:
    """Exhaustive search over every victim, on small random traces."""

    def most_hits(requests: list[list[int]], held: frozenset[int], n_slots: int) -> int:
        if not requests:
            return 0
        wanted = frozenset(requests[0])
        n_over = len(held | wanted) - n_slots
        states = {held | wanted}
        for _ in range(max(0, n_over)):
            states = {state - {page} for state in states for page in state - wanted}
        hits = len(held & wanted)
        return hits + max(most_hits(requests[1:], state, n_slots) for state in states)

    for seed in range(8):
        shape = CycleShape(n_layer=2, n_expert=4, n_expert_used=1 + seed % 2)
        trace = cyclic_trace(shape, 5, 0.4, seed)
        requests = [
            [layer * 4 + int(expert) for expert in ids]
            for step in trace.steps
            for layer, ids in step.parts()
        ]
        found = replay(trace, "belady", 4).decode.total.hits
        assert found == most_hits(requests, frozenset(), 4)


def test_lru_falls_off_the_cliff_exactly_where_the_guard_says() -> None:
    shape = CycleShape(n_layer=6, n_expert=12, n_expert_used=3)
    for keep in (0.3, 1.0):
        trace = cyclic_trace(shape, 40, keep)
        for n_slots in range(3, shape.n_slots + 1):
            report = check_cliff(n_slots, shape)
            hits = replay(trace, "lru", n_slots).decode.total.hits
            if n_slots < report.zero_below:
                assert hits == 0
            assert report.is_below == (n_slots < shape.n_slots)
            assert (report.warning is None) == (report.fallback is None) == (not report.is_below)
    assert replay(cyclic_trace(shape, 40, 1.0), "lru", shape.n_slots).decode.total.misses == 18


def test_the_fallback_holds_on_where_lru_collapses() -> None:
    shape = CycleShape(n_layer=16, n_expert=64, n_expert_used=8)
    report = check_cliff(100, shape)
    assert report.fallback is not None
    assert report.repeating["lru"] == report.drifting["lru"] == 0
    assert report.repeating[report.fallback] == report.repeating["belady"] > 0.5
    assert report.drifting[report.fallback] > 0.5 * report.drifting["belady"]
    assert "keep nothing" in str(report.warning) and "128 slots" in str(report.warning)


def test_slots_below_one_layers_experts_are_refused() -> None:
    with pytest.raises(CapacityError, match=r"7 expert slots cannot hold the 8 .* at least 8"):
        check_cliff(7, CycleShape(n_layer=2, n_expert=64, n_expert_used=8))
    with pytest.raises(UsageError):
        CycleShape(n_layer=2, n_expert=4, n_expert_used=5)


def test_static_counts_its_own_hot_set_when_given_none() -> None:
    """After the warm-up, what was popular in it stays though only other pages are used."""
    policy = make_policy("static", SHAPE, 3, PolicyParams(warmup_tokens=4))
    table = PageTable(3, policy, SHAPE)
    for token in range(30):
        table.begin_step()
        for page in (1, 2) if token < 4 else (3 + token % 4,):
            for one in table.acquire([page])[1]:
                table.loaded(one.page)
            table.release([page])
    assert {1, 2} <= set(table.resident())


def test_fading_counts_stay_in_range_over_a_long_run() -> None:
    """Thousands of tokens at a strong fade overflow a plain sum of decay**-t."""
    policy = make_policy("lfu", SHAPE, 2, PolicyParams(decay=0.5))
    table = PageTable(2, policy, SHAPE)
    for token in range(4000):
        table.begin_step()
        for page in (1,) if token % 3 else (1, 2 + token % 5):
            for one in table.acquire([page])[1]:
                table.loaded(one.page)
            table.release([page])
    assert table.decode.misses[0] == 1 + len([t for t in range(4000) if t % 3 == 0])


def test_hobbit_halves_its_past_and_still_agrees_with_its_own_formula() -> None:
    """A short window changes which pages stay, deterministically, and nothing breaks."""
    trace = cyclic_trace(CycleShape(n_layer=4, n_expert=10, n_expert_used=2), 100, 0.6)
    short, long = (
        replay(trace, "hobbit", 14, PolicyParams(window=window)).decode.total
        for window in (4, 1 << 20)
    )
    assert short.requests == long.requests and short.hits != long.hits


def test_unknown_names_and_settings_are_refused() -> None:
    with pytest.raises(UsageError, match=r"no eviction policy is called 'lur'.*'lru'"):
        make_policy("lur", SHAPE, 3)
    for wrong in (
        {"decay": 0.0},
        {"decay": float("nan")},
        {"protected_ratio": 1.0},
        {"weights": (0.0, 0.0, 0.0)},
        {"weights": (1.0, -1.0, 1.0)},
        {"window": 1},
        {"warmup_tokens": 0},
    ):
        with pytest.raises(UsageError, match=f"eviction parameter {next(iter(wrong))}"):
            PolicyParams(**wrong)  # type: ignore[arg-type]
