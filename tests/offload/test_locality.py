"""SRP and SCH against their definitions, their limits, and each other."""

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest

from edgeroute.offload.hit_curve import hit_curve
from edgeroute.offload.locality import (
    Srp,
    bootstrap,
    sch,
    sch_interval,
    srp,
    srp_by_layer,
    srp_floor,
    srp_interval,
)
from edgeroute.offload.replay import replay
from edgeroute.offload.routes import Routes, joined, pieces, routes_of
from edgeroute.offload.segment_cache import SegmentCache, sch_counts
from edgeroute.offload.trace import Trace, TraceError, make_step
from edgeroute.runtime.errors import UsageError
from tests.offload.routing_lab import Draw, drawn, meta_of, written


def text(*layers: Sequence[Sequence[int]], label: str = "") -> Routes:
    """A sequence by its layers' tokens."""
    return Routes(label=label, ids={il: np.array(ids, np.uint16) for il, ids in enumerate(layers)})


def drawn_texts(seed: int, n_text: int = 3) -> list[Routes]:
    """Texts of different length, of 3 of 9 experts in 2 layers."""
    rng = random.Random(seed)
    return [
        routes_of(
            drawn(Draw(n_layer=2, n_expert=9, n_expert_used=3, n_step=rng.randint(9, 60)), rng)
        )[0]
        for _ in range(n_text)
    ]


# --- routes -----------------------------------------------------------------------------


def test_routes_are_cut_at_marks_and_prefill_counts() -> None:
    meta = meta_of(2, 8, 2)
    prompt = make_step(meta, True, [(0, [0, 1, 2, 3, 4, 5]), (1, [6, 7])])
    token = make_step(meta, False, [(0, [1, 2]), (1, [3, 4])])
    trace = written(meta, [], (0, "prose"), (3, "code"), (3, "empty"), (4, "code"))
    trace = Trace(meta=meta, steps=(prompt, token, token, token, token), marks=trace.marks)
    found = routes_of(trace)
    assert [(one.label, one.n_token) for one in found] == [("prose", 5), ("empty", 1), ("code", 1)]
    assert found[0].ids[0].tolist() == [[0, 1], [2, 3], [4, 5], [1, 2], [1, 2]]
    assert found[0].ids[1].tolist() == [[6, 7], [3, 4], [3, 4]]
    assert found[0].ids[0].dtype == np.uint16


def test_routes_of_no_model_are_refused() -> None:
    meta = meta_of(1, 8, 2)
    for ids, text in (([0, 1, 2], "no multiple of the 2"), ([0, 1, 3, 3], "token 1 of layer 0")):
        with pytest.raises(TraceError, match=text):
            routes_of(Trace(meta=meta, steps=(make_step(meta, False, [(0, ids)]),)))


def test_pieces_hold_every_token_once() -> None:
    whole = text([[at % 7] for at in range(10)], [[at % 5] for at in range(3)])
    cut = pieces([whole], 4)
    assert [one.n_token for one in cut] == [4, 4, 2]
    assert [one.layers for one in cut] == [(0, 1), (0,), (0,)]
    assert np.array_equal(np.concatenate([one.ids[0] for one in cut]), whole.ids[0])
    with pytest.raises(UsageError, match="at least 1 token"):
        pieces([whole], 0)


# --- SRP --------------------------------------------------------------------------------


def slow_srp(routes: Sequence[Routes], n_expert: int, m: int) -> float:
    """From the definition, window by window."""
    pairs = []
    for one in routes:
        for ids in one.ids.values():
            for at in range(len(ids) - m + 1):
                window = ids[at : at + m].ravel().tolist()
                pairs += [window.count(expert) for expert in range(n_expert)]
    best = 0.0
    for threshold in range(1, m + 1):
        right = sum(f for f in pairs if f >= threshold)
        predicted = m * sum(f >= threshold for f in pairs)
        best = max(best, 2 * right / (predicted + sum(pairs)))
    return best


@pytest.mark.parametrize("m", [1, 2, 5, 9])
def test_srp_is_that_of_the_definition(m: int) -> None:
    routes = drawn_texts(m)
    found = srp(routes, 9, m)
    assert found.value == pytest.approx(slow_srp(routes, 9, m), abs=1e-12)
    for il, one in srp_by_layer(routes, 9, m).items():
        alone = [Routes(label="", ids={il: each.ids[il]}) for each in routes]
        assert one == srp(routes, 9, m, [il]) == srp(alone, 9, m)
        assert one.value == pytest.approx(slow_srp(alone, 9, m), abs=1e-12)


def test_srp_computed_by_hand() -> None:
    """Windows of 2: {0,1}, {1,1}, {1,2}; f = 1 four times, 2 once.

    From 1 on: 6 right of 10 predicted, 6 happened: 12/16. From 2 on: 2 of 2: 4/8.
    """
    assert srp([text([[0], [1], [1], [2]])], 4, 2) == Srp(0.75, pytest.approx(10 / 6), 1)


def test_a_constant_route_is_perfectly_local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeroute.offload.locality._CHUNK_TOKENS", 7)
    routes = routes_of(written(meta_of(2, 16, 3), [[[1, 5, 9], [0, 2, 15]]] * 80))
    for m in (1, 4, 16, 64):
        assert srp(routes, 16, m)[:2] == (1.0, 1.0)
    assert srp_interval(pieces(routes, 40), 16, 16) == (1.0, 1.0, 1.0)
    assert sch(routes, 16, 3, 16, 1) == 1.0


@pytest.mark.parametrize(("n_expert", "used"), [(8, 2), (64, 8), (128, 8)])
def test_a_uniform_gate_is_at_the_floor(n_expert: int, used: int) -> None:
    rng = np.random.default_rng(n_expert)
    ids = np.argsort(rng.random((4000, n_expert)), axis=1)[:, :used].astype(np.uint16)
    routes = [Routes(label="", ids={0: ids})]
    for m in (4, 16, 64):
        floor = srp_floor(n_expert, used, m)
        found = srp(routes, n_expert, m)
        assert found.value == pytest.approx(floor.value, rel=0.01)
        assert found.rho == pytest.approx(floor.rho, rel=0.05)
        assert found.threshold == floor.threshold


def test_the_floor_computed_by_hand() -> None:
    """f of two tokens with half of the experts is 0, 1, 2 with 1/4, 1/2, 1/4."""
    assert srp_floor(8, 4, 2) == pytest.approx((0.8, 1.5, 1))
    assert srp_floor(8, 8, 64) == (1.0, 1.0, 1)
    assert srp_floor(128, 8, 1) == pytest.approx((1.0, 1.0, 1))
    # An endless segment tells nothing but the load: all experts predicted, 2k / (E + k).
    assert srp_floor(16, 4, 20_000).value == pytest.approx(2 * 4 / 20, rel=0.02)
    with pytest.raises(UsageError, match="cannot use"):
        srp_floor(4, 5, 2)


def test_srp_without_a_window_is_refused() -> None:
    routes = [text([[0], [1]])]
    for call, match in (
        (lambda: srp(routes, 4, 3), "no sequence has the 3 tokens"),
        (lambda: srp(routes, 4, 0), "at least 1 token"),
        (lambda: srp(routes, 1, 2), "expert 1"),
        (lambda: srp(routes, 4, 2, [3]), "not all among"),
        (lambda: srp_interval(routes, 4, 3), "no sequence"),
    ):
        with pytest.raises(UsageError, match=match):
            call()


# --- SCH --------------------------------------------------------------------------------


def slow_sch(ids: Sequence[Sequence[int]], cache: SegmentCache) -> tuple[int, int]:
    """Hits and charged requests of one layer, from the definition."""
    inside: set[int] = set()
    last: dict[int, int] = {}
    n_hit = n_charged = 0
    for t, token in enumerate(ids):
        n_hit += len(inside & set(token))
        n_absent = len(set(token) - inside)
        n_cold = min(n_absent, cache.n_slots - len(inside))
        n_charged += len(token) - (0 if cache.charge_cold else n_cold)
        inside |= set(token)
        last |= {expert: t * 100 + rank for rank, expert in enumerate(token)}
        future = ids[t + 1 :]
        while len(inside) > cache.n_slots:
            free = inside - set(token) if cache.hold else inside
            if cache.m is None:
                uses = {e: [e in each for each in future] + [True] for e in free}
                inside.remove(max(free, key=lambda e: uses[e].index(True)))
            else:
                near = [expert for each in future[: cache.m] for expert in each]
                inside.remove(min(free, key=lambda e: (near.count(e), last[e])))
    return n_hit, n_charged


@pytest.mark.parametrize("m", [None, 0, 1, 4, 100])
@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("charge_cold", [False, True])
def test_sch_is_that_of_the_definition(m: int | None, hold: bool, charge_cold: bool) -> None:
    routes = drawn_texts(7 if m is None else m)
    for rho in (1, 1.4, 2, 5):
        cache = SegmentCache(
            n_expert=9, n_expert_used=3, m=m, rho=rho, hold=hold, charge_cold=charge_cold
        )
        for one, counts in zip(routes, sch_counts(routes, cache).tolist(), strict=True):
            slow = [slow_sch(ids.tolist(), cache) for ids in one.ids.values()]
            assert counts == [sum(each) for each in zip(*slow, strict=True)], rho


def test_sch_computed_by_hand() -> None:
    """One slot. 0 enters free; 1 comes for once and leaves again, as 0 comes next.

    So 0 hits twice in 4 charged requests, and with nothing known never.
    """
    routes = [text([[0], [1], [0], [2], [0]])]
    assert sch(routes, 4, 1, 1, 1) == pytest.approx(2 / 4)
    cache = SegmentCache(n_expert=4, n_expert_used=1, m=1, rho=1, charge_cold=True)
    assert sch_counts(routes, cache).tolist() == [[2, 5]]
    lru = SegmentCache(n_expert=4, n_expert_used=1, m=0, rho=1)
    assert sch_counts(routes, lru).tolist() == [[0, 4]]
    held = SegmentCache(n_expert=4, n_expert_used=1, m=1, rho=1, hold=True)
    assert sch_counts(routes, held).tolist() == [[0, 4]]


@pytest.mark.parametrize("seed", range(5))
def test_sch_is_never_above_belady(seed: int) -> None:
    """Of the same rule on every sequence; and no pool of the runtime is above that either."""
    rng = random.Random(seed)
    draw = Draw(n_layer=3, n_expert=8, n_expert_used=2, n_step=60, keep=rng.random())
    trace = drawn(draw, rng)
    whole = routes_of(trace)
    wide = joined(whole, 8)
    for rho in (1, 1.5, 2, 3):
        for routes, n in ((whole, 1), (pieces(whole, 17), 1), (wide, 3)):
            for hold in (False, True):
                caches = [
                    SegmentCache(n_expert=8 * n, n_expert_used=2 * n, m=m, rho=rho, hold=hold)
                    for m in (None, 0, 1, 4, 16)
                ]
                best, *others = (sch_counts(routes, cache) for cache in caches)
                for other in others:
                    assert (other[:, 1] == best[:, 1]).all()  # charged alike
                    assert (other[:, 0] <= best[:, 0]).all()
        layer_slots, slots = round(2 * rho), round(6 * rho)
        free = SegmentCache(n_expert=8, n_expert_used=2, m=None, rho=rho, charge_cold=True)
        held = SegmentCache(
            n_expert=8, n_expert_used=2, m=None, rho=rho, charge_cold=True, hold=True
        )
        by_layer = [replay(trace, "belady", layer_slots, layers=[il]).decode for il in range(3)]
        n_live = sum(each.total.hits for each in by_layer)
        assert n_live == sch_counts(whole, held)[0, 0] <= sch_counts(whole, free)[0, 0]
        pooled = SegmentCache(n_expert=24, n_expert_used=6, m=None, rho=rho, charge_cold=True)
        n_hit, n_request = sch_counts(wide, pooled)[0].tolist()
        assert hit_curve(trace, "belady", [slots])[0] <= n_hit / n_request


def test_sch_grows_with_the_cache_and_is_nothing_where_nothing_is_charged() -> None:
    routes = drawn_texts(3)
    ratios = [sch(routes, 9, 3, 4, rho) for rho in (1 / 3, 1, 2, 2.7)]
    assert ratios == sorted(ratios) and 0 < ratios[0] < ratios[-1] < 1
    with pytest.raises(UsageError, match="fills an empty slot"):
        sch([text([[0], [1], [2]])], 9, 1, 4, 3)
    assert sch([text([[0], [1], [0]])], 9, 1, 4, 3) == 1.0
    estimate = sch_interval(
        [*routes, text([[0, 1, 2]])], SegmentCache(n_expert=9, n_expert_used=3, m=4, rho=2)
    )
    assert estimate.value == pytest.approx(sch(routes, 9, 3, 4, 2))


def test_sequences_and_layers_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    routes = drawn_texts(11, n_text=9)
    cache = SegmentCache(n_expert=9, n_expert_used=3, m=4, rho=2)
    found = sch_counts(routes, cache)
    monkeypatch.setattr("edgeroute.offload.segment_cache._CHUNK_CELLS", 27)
    assert np.array_equal(sch_counts(routes, cache), found)
    for one, counts in zip(routes, found, strict=True):
        assert np.array_equal(sch_counts([one], cache)[0], counts)


def test_caches_that_cannot_be_are_refused() -> None:
    for other, match in (
        ({"n_expert_used": 5}, "cannot use 5"),
        ({"m": -1}, "-1 tokens"),
        ({"rho": 0.1}, "no slot"),
        ({"rho": math.nan}, "no slot"),
        ({"rho": 0.5, "hold": True}, "cannot hold"),
    ):
        with pytest.raises(UsageError, match=match):
            SegmentCache(**{"n_expert": 4, "n_expert_used": 2, "m": 4, "rho": 1.0, **other})
    assert SegmentCache(n_expert=4, n_expert_used=2, m=4, rho=math.inf).n_slots == 4
    with pytest.raises(UsageError, match="2 were said"):
        sch([text([[0], [1]])], 4, 2, 4, 1)
    with pytest.raises(UsageError, match="expert 7"):
        sch([text([[0], [7]])], 4, 1, 4, 1)


# --- intervals --------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_that_of_theory() -> None:
    counts = np.random.default_rng(1).poisson(30, 400)[:, None]
    found = bootstrap(counts, lambda sums: sums[:, 0] / 40_000, n=4000)
    assert found.value == counts.sum() / 40_000
    half = 1.96 * counts.std() * 20 / 40_000
    assert found.high - found.value == pytest.approx(half, rel=0.1)
    assert found.value - found.low == pytest.approx(half, rel=0.1)
    assert found == bootstrap(counts, lambda sums: sums[:, 0] / 40_000, n=4000)


def test_the_interval_is_the_basic_one() -> None:
    """One sequence in 20 has all: resamples have a long tail above, the interval one below."""
    counts = np.zeros((20, 1), np.int64)
    counts[3] = 6
    found = bootstrap(counts, lambda sums: 0.4 + sums[:, 0] / 60, n=4000, seed=3)
    # Resamples have 0 to 3 such sequences (0.975 of Binomial(20, 1/20)): 2 * 0.5 - {0.7, 0.4}.
    assert found == pytest.approx((0.5, 0.3, 0.6))
    found = bootstrap(counts, lambda sums: sums[:, 0] / 60, n=4000, seed=3)
    assert found == pytest.approx((0.1, 0.0, 0.2))  # -0.1 is no ratio


def test_one_sequence_tells_nothing_about_others() -> None:
    routes = drawn_texts(4, n_text=1)
    found = srp_interval(routes, 9, 4)
    assert (found.low, found.high) == (0.0, 1.0) and found.value == srp(routes, 9, 4).value
    several = srp_interval(pieces(routes, 6), 9, 4)
    assert 0 < several.low < several.value < several.high < 1
    with pytest.raises(UsageError, match="0 sequences"):
        bootstrap(np.zeros((0, 2), np.int64), lambda sums: sums[:, 0])


def test_short_sequences_do_not_change_an_interval() -> None:
    routes = drawn_texts(6, n_text=8)
    short = text([[0, 1, 2]], [[0, 1, 2]])
    assert srp_interval([*routes, short], 9, 4) == srp_interval(routes, 9, 4)
