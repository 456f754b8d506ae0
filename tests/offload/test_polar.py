"""The router's choices and plans, by hand-sized cases."""

import math

import numpy as np
import pytest

from edgeroute.offload.features import PromptFeatures, length_bucket
from edgeroute.offload.polar import AdapterRouter, PolarParams
from edgeroute.offload.polar_controller import (
    EpochController,
    EpochParams,
    PageHinkley,
    RecentContexts,
    SetProblem,
    greedy_set,
    order_by_use,
)
from edgeroute.runtime.errors import UsageError

D = 3
X = np.array([1.0, 0.0, 1.0])
Y = np.array([0.0, 1.0, 1.0])
QUIET = EpochParams.fixed(10)


def _router(names=("a", "b"), n_resident: int = 1, **settings) -> AdapterRouter:
    known = {"d": D, "alpha": 0.0, "epochs": QUIET, "utility_per_s": 1.0, "base_arm": False}
    return AdapterRouter(PolarParams(**{**known, **settings}), names, n_resident, seed=0)


def _teach(router: AdapterRouter, arm, x, reward: float, n: int = 50) -> None:
    for _ in range(n):
        router.learn(x, arm, reward)


def test_paging_is_weighed_against_reward() -> None:
    router = _router()
    _teach(router, "a", X, 0.5)
    _teach(router, "b", X, 0.9)
    for name in "ab":
        for _ in range(60):
            router.paid(name, 0.3)
    both = router.choose(X, ["a", "b"])
    assert (both.arm, both.resident, both.bypass, both.cost) == ("b", True, False, 0.0)
    missed = router.choose(X, ["a"])  # worth its cost: 0.9 - 0.3 > 0.5
    assert (missed.arm, missed.bypass) == ("b", True)
    assert missed.cost == pytest.approx(0.3, abs=1e-3)
    assert missed.score == pytest.approx(missed.mean - missed.cost, abs=1e-6)
    for _ in range(60):
        router.paid("b", 0.6)
    assert router.choose(X, ["a", "unknown"]).arm == "a"
    assert router.choose(X, []).arm == "b"  # both must be paged: 0.9 - 0.6 > 0.5 - 0.3


def test_the_cost_is_no_part_of_what_is_learned() -> None:
    cheap, dear = _router(), _router()
    for _ in range(60):
        dear.paid("a", 5.0)
    for router in (cheap, dear):
        _teach(router, "a", X, 0.8)
    assert cheap.choose(X, ["a"]).mean == dear.choose(X, ["a"]).mean


def test_uncertainty_is_tried_where_alpha_says_so() -> None:
    timid, bold = _router(alpha=0.0), _router(alpha=3.0)
    for router in (timid, bold):
        _teach(router, "a", X, 0.6)
    assert timid.choose(X, ["a", "b"]).arm == "a"
    found = bold.choose(X, ["a", "b"])
    assert found.arm == "b"
    assert found.width == pytest.approx(math.sqrt(X @ X))


def test_the_base_model_never_pages() -> None:
    router = _router(base_arm=True)
    _teach(router, None, X, 0.5)
    found = router.choose(X, [])
    assert (found.arm, found.resident, found.bypass, found.cost) == (None, True, False, 0.0)
    alone = AdapterRouter(PolarParams(d=D), (), 0, 0)
    assert alone.choose(X, []).arm is None
    with pytest.raises(UsageError, match="no adapter to choose"):
        _router(names=()).choose(X, [])


def test_an_epoch_ends_with_the_set_that_serves_both_kinds() -> None:
    """b and c are twins: by mean reward they would take both places, and a's prompts none."""
    router = _router(("a", "b", "c", "d"), n_resident=2)
    first = router.wanted()
    assert first is not None and first.names == ("a", "b") and first.load == ("a", "b")
    for arm, on_x, on_y in (("a", 0.9, 0.0), ("b", 0.1, 0.99), ("c", 0.1, 0.98), ("d", 0, 0)):
        _teach(router, arm, X, on_x)
        _teach(router, arm, Y, on_y)
    for i in range(10):
        assert router.wanted() is None
        router.choose(X if i % 2 else Y, ["c", "d"])
    plan = router.wanted()
    assert plan is not None
    assert set(plan.names) == {"a", "c"}  # c is as good and need not be loaded
    assert (plan.load, plan.evict) == (("a",), ("d",))
    assert router.wanted() is None
    for _ in range(10):
        router.choose(X, plan.names)
    assert router.wanted() is None  # nothing better


def test_forced_plays_break_the_lock_in() -> None:
    """Without them a router of alpha 0 never learns that b is better."""
    epochs = EpochParams(first_epoch=40, max_epoch=40)
    for settings, expected in (({}, False), ({"epochs": epochs}, True)):
        router = _router(**settings)
        for _ in range(200):
            choice = router.choose(X, ["a"])
            router.learn(X, choice.arm, 0.9 if choice.arm == "b" else 0.4)
        assert (router.stats()["adapters"]["b"]["n_plays"] > 0) is expected
        assert (router.choose(X, ["a", "b"]).arm == "b") is expected


def test_nothing_is_forced_where_nobody_rewards() -> None:
    epochs = EpochParams(first_epoch=40, max_epoch=40)
    router = _router(tuple("abcdef"), epochs=epochs)
    counts = []
    for _ in range(5):
        for _ in range(40):
            router.choose(X, ["a"])
        router.wanted()
        router.wanted()
        counts.append(router.stats()["n_forced"])
    assert 0 < counts[0] <= 10  # a quarter of the epoch
    assert counts[-1] == counts[0]


def test_adapters_come_and_go() -> None:
    router = _router()
    router.add("c", 0.25)
    _teach(router, "c", X, 1.0)
    found = router.choose(X, [])
    assert (found.arm, found.cost) == ("c", 0.25)
    router.remove("a")
    assert router.choose(X, ["b"]).arm == "c"
    router.remove("c")
    assert router.choose(X, []).arm == "b"
    with pytest.raises(UsageError, match="'c'"):
        router.learn(X, "c", 1.0)
    router.add("c", 0.25)
    assert router.choose(X, ["b", "c"]).mean == 0  # it starts anew
    assert router.names == ("b", "c")
    for wrong in ("", "x" * 256, "b"):
        with pytest.raises(UsageError):
            router.add(wrong, 0.1)


@pytest.mark.parametrize("reward", [-0.01, 1.01, float("nan"), float("inf"), "1", None, True])
def test_a_reward_outside_its_range_teaches_nothing(reward) -> None:
    router = _router()
    with pytest.raises(UsageError):
        router.learn(X, "a", reward)
    assert router.stats()["n_learned"] == 0


@pytest.mark.parametrize(
    "x", [np.ones(2), np.ones((1, 3)), np.array([1, np.nan, 0]), np.array([np.inf, 0, 0]),
          np.array([1e9, 0, 0])],
)  # fmt: skip
def test_a_context_that_is_none_is_refused(x) -> None:
    router = _router()
    with pytest.raises(UsageError, match="context"):
        router.choose(x, [])
    with pytest.raises(UsageError, match="context"):
        router.learn(x, "a", 1.0)


def test_a_time_that_is_none_is_refused() -> None:
    router = _router()
    for seconds in (-1.0, float("nan"), float("inf"), "1", True):
        with pytest.raises(UsageError, match="paging time"):
            router.paid("a", seconds)
    with pytest.raises(UsageError, match="no adapter 'z'"):
        router.paid("z", 1.0)


@pytest.mark.parametrize(
    "settings", [{"d": 33}, {"alpha": -1}, {"ridge": 0}, {"cost_smoothing": 0},
                 {"utility_per_s": float("nan")}],
)  # fmt: skip
def test_impossible_settings_are_refused(settings) -> None:
    with pytest.raises(UsageError):
        PolarParams(**settings)
    with pytest.raises(UsageError):
        EpochParams(first_epoch=100, max_epoch=10)
    with pytest.raises(UsageError):
        AdapterRouter(PolarParams(), (), -1, 0)


def test_greedy_choice_counts_loads_against_gains() -> None:
    utilities = np.array([[0.9, 0.85, 0.0], [0.0, 0.0, 0.3]])  # the second is a near-duplicate
    floor, costs = np.zeros(2), np.full(3, 0.4)

    def chosen(loads, n_resident: int = 2, horizon: int = 10) -> list[int]:
        problem = SetProblem(utilities=utilities, floor=floor, costs=costs,
                             loads=np.array(loads), n_resident=n_resident,
                             horizon=horizon)  # fmt: skip
        return greedy_set(problem)

    assert chosen([0, 0, 0]) == [0, 2]
    assert chosen([0, 0, 0], n_resident=1) == [0]
    assert chosen([1.0, 0, 0]) == [1, 2]  # 1 is nearly as good and there already
    assert chosen([5, 5, 5]) == []  # nothing is worth its load in ten requests
    assert chosen([5, 5, 5], horizon=1000) == [0, 2]
    assert chosen([0, 0, 0], n_resident=0) == []
    assert order_by_use({"z", "y"}, ["b"], 2) == ["b", "y"]


def test_greedy_choice_is_near_the_best_of_all_sets() -> None:
    from itertools import combinations

    rng = np.random.default_rng(5)
    for _ in range(20):
        u = rng.random((30, 7))
        costs = np.full(7, 0.3)
        served = np.maximum(0.0, (u - costs).max(axis=1)).sum()

        def value(s, u=u, costs=costs) -> float:
            inside = u[:, list(s)].max(axis=1)
            return float(np.maximum(inside, (u - costs).max(axis=1)).sum())

        best = max(value(s) for s in combinations(range(7), 3))
        found = greedy_set(SetProblem(utilities=u, floor=np.zeros(30), costs=costs,
                                      loads=np.zeros(7), n_resident=3, horizon=30))  # fmt: skip
        assert value(found) - served >= (1 - 1 / math.e) * (best - served)


def test_page_hinkley_finds_a_rise_and_no_fall() -> None:
    rng = np.random.default_rng(2)
    quiet = rng.standard_normal(4000)
    for target in (None, 0.0):
        test = PageHinkley(0.15, 60.0, target)
        assert not any(test.add(float(v)) for v in quiet)
        assert not any(test.add(float(v) - 1) for v in quiet[:500])
        test.reset()
        for v in quiet[:500]:
            test.add(float(v))
        fired = [test.add(float(v) + 1.5) for v in quiet[:400]]
        assert fired.count(True) >= 1
    assert not any(PageHinkley(0.15, 60.0).add(0.0) for _ in range(100))


def test_epochs_double_up_to_their_cap_and_begin_again_on_drift() -> None:
    controller = EpochController(EpochParams(first_epoch=10, max_epoch=40), D)
    lengths = []
    for _ in range(4):
        while not controller.due:
            controller.observe(X, 0.0)
        lengths.append(controller.close_epoch())
    assert lengths == [20, 40, 40, 40]
    for _ in range(40):
        controller.learn(float(np.random.default_rng(0).standard_normal()) * 0.01)
    values = np.random.default_rng(0).standard_normal(400) * 0.1
    assert not any(controller.learn(float(v)) for v in values[:200])
    assert any(controller.learn(float(v) + 0.5) for v in values[200:])
    assert controller.due and controller.close_epoch() == 10
    assert controller.counts().n_reward_drifts == 1


def test_a_shift_of_popularity_keeps_what_is_known() -> None:
    controller = EpochController(EpochParams(first_epoch=1000, max_epoch=1000), D)
    noise = 0.05 * np.random.default_rng(1).random(600)
    for v in noise[:300]:
        controller.observe(X, float(v))
    controller.begin_exploration(np.zeros(2))
    for v in noise[300:]:
        controller.observe(Y, float(v) + 0.2)
        if controller.due:
            break
    counts = controller.counts()
    assert (counts.n_popularity_drifts, counts.n_reward_drifts) == (1, 0)
    rows = controller.contexts.rows()
    assert len(rows) == 64 and np.array_equal(rows[-1], Y)
    controller.close_epoch()
    assert not controller.begin_exploration(np.zeros(2)).any()  # nothing to be learned again


def test_what_was_learned_is_forgotten_once_it_proves_wrong() -> None:
    router = _router(epochs=EpochParams(first_epoch=5000, max_epoch=5000))
    rng = np.random.default_rng(0)
    _teach(router, "b", X, 0.5)
    for _ in range(300):
        router.learn(X, "a", float(np.clip(0.9 + 0.05 * rng.standard_normal(), 0, 1)))
    for _ in range(120):
        router.learn(X, "a", float(np.clip(0.1 + 0.05 * rng.standard_normal(), 0, 1)))
    assert router.stats()["controller"]["n_reward_drifts"] >= 1
    assert router.wanted() is not None  # a plan at once
    assert router.choose(X, ["a", "b"]).arm == "b"


def test_recent_contexts_are_a_ring() -> None:
    ring = RecentContexts(3, 1)
    for i in range(5):
        ring.add(np.array([float(i)]))
        assert ring.rows()[-1] == i
    assert ring.rows().ravel().tolist() == [2, 3, 4]
    ring.keep_latest(1)
    assert ring.rows().ravel().tolist() == [4]
    ring.add(np.array([5.0]))
    assert ring.rows().ravel().tolist() == [4, 5]


def test_features_are_the_same_for_the_same_seed_and_keep_angles() -> None:
    rng = np.random.default_rng(0)
    centre = 5 * rng.standard_normal(64)
    make = PromptFeatures(64, 16, seed=1, centre=centre)
    one, near, far = (centre + rng.standard_normal(64) for _ in range(3))
    near = one + 0.1 * (near - centre)
    again = PromptFeatures(64, 16, seed=1, centre=centre)
    x = make(one.astype(np.float32), 7)
    assert np.array_equal(x, again(one.astype(np.float32), 7))
    assert np.linalg.norm(x[:-2]) == pytest.approx(1)
    assert x[-1] == 1 and x[-2] == length_bucket(7)
    assert x[:-2] @ make(near, 7)[:-2] > 0.9 > x[:-2] @ make(far, 7)[:-2]
    assert np.all(make(centre, 1)[:-1] == 0)
    buckets = [length_bucket(n) for n in (1, 10, 100, 1000, 8192, 10**6)]
    assert buckets == sorted(buckets) and buckets[0] == 0 and buckets[-1] == 1


def test_features_refuse_what_is_no_embedding() -> None:
    make = PromptFeatures(8, 5)
    for pooled, n in ((np.ones(7), 1), (np.full(8, np.nan), 1), (np.ones(8), 0)):
        with pytest.raises(UsageError):
            make(pooled, n)
    for n_embd, d in ((8, 2), (8, 11), (64, 33)):
        with pytest.raises(UsageError):
            PromptFeatures(n_embd, d)
