"""Rules for experts against definitions spelled out, and the bisection that calibrates them."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeroute.runtime.depth import ExpertRule, all_run
from edgeroute.runtime.errors import UsageError
from edgeroute.skippers import experts
from edgeroute.skippers.experts import LayerRule, Weights

F32 = np.float32
numbers = st.floats(0, 1, width=32)
some_weights = st.lists(st.lists(numbers, min_size=5, max_size=5), min_size=1, max_size=8).map(
    lambda rows: np.sort(np.array(rows, F32), axis=1)[:, ::-1].copy()
)
any_rule = st.one_of(
    st.tuples(st.just("count"), st.integers(1, 7).map(float)),
    st.tuples(st.sampled_from(["weight", "mass", "ratio"]), st.floats(0, 3, width=32)),
    st.just(("all", 0.0)),
)


def brute(row: list[F32], rule: ExpertRule, value: float) -> list[bool]:
    """The definition, expert by expert."""
    found = [True]
    total = row[0]
    for j in range(1, len(row)):
        if rule == "count":
            here = j < value
        elif rule == "weight":
            here = bool(row[j] >= F32(value))
        elif rule == "mass":
            here = bool(total < F32(value))
        elif rule == "ratio":
            here = bool(row[j] >= total * F32(value))
        else:
            here = True
        found.append(here)
        total = F32(total + row[j])
    return found


@given(some_weights, any_rule)
@settings(max_examples=120, deadline=None)
def test_rules_are_their_definitions(weights: Weights, rule: tuple[ExpertRule, float]) -> None:
    found = experts.kept(weights, *rule)
    assert found.tolist() == [brute(list(row), *rule) for row in weights]
    counts = experts.n_experts(weights, *rule)
    assert counts.min() >= 1 and counts.max() <= 5
    for row, n in zip(found, counts, strict=True):  # weights that fall: the first ones
        assert row[:n].all() and not row[n:].any()


@given(some_weights, st.floats(0, 2, width=32), st.floats(0, 2, width=32))
@settings(max_examples=60, deadline=None)
def test_rules_are_monotone(weights: Weights, one: float, other: float) -> None:
    low, high = sorted((one, other))
    rules: list[tuple[ExpertRule, bool]] = [("weight", False), ("mass", True), ("ratio", False)]
    for rule, rising in rules:
        less, more = (low, high) if rising else (high, low)
        assert (
            experts.n_experts(weights, rule, less) <= experts.n_experts(weights, rule, more)
        ).all()


def test_rules_by_hand() -> None:
    weights = np.array([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]], F32)

    def counts(rule: ExpertRule, value: float) -> list[int]:
        return experts.n_experts(weights, rule, value).tolist()

    assert counts("all", 0) == counts("weight", 0) == counts("count", 9) == [4, 4]
    assert counts("count", 3) == [3, 3]
    assert counts("weight", 0.25) == [2, 4] and counts("weight", 0.251) == [1, 1]
    assert counts("mass", 0.75) == [2, 3] and counts("mass", 0.76) == [3, 4]
    assert counts("mass", 0) == [1, 1] and counts("mass", 2) == [4, 4]
    assert counts("ratio", 0.5) == [2, 3] and counts("ratio", 1.01) == [1, 1]
    unsorted = np.array([[0.1, 0.3, 0.05]], F32)  # ranked with a bias: the best is the first
    assert experts.kept(unsorted, "weight", 0.2).tolist() == [[True, True, False]]


@pytest.mark.parametrize(
    ("rule", "value", "words"),
    [("count", 0, "whole number"), ("count", 1.5, "whole number"), ("weight", -1, "at least 0"),
     ("mass", math.nan, "at least 0"), ("ratio", math.inf, "finite"), ("best", 1, "no rule")],
)  # fmt: skip
def test_impossible_rules_are_refused(rule: ExpertRule, value: float, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        experts.kept(np.ones((1, 2), F32), rule, value)


def routes(n_layer: int = 6, n_tokens: int = 400, n_used: int = 8, seed: int = 1) -> list[Weights]:
    """Softmax weights whose spread differs between layers."""
    rng = np.random.default_rng(seed)
    found = []
    for il in range(n_layer):
        wide = np.exp((0.3 + 0.2 * il) * rng.standard_normal((n_tokens, 4 * n_used)))
        weights = np.sort((wide / wide.sum(axis=1, keepdims=True)).astype(F32), axis=1)
        found.append(weights[:, ::-1][:, :n_used].copy())
    return found


@pytest.mark.parametrize("scheme", experts.SCHEMES)
@pytest.mark.parametrize("n_wanted", [1, 2.5, 4, 6, 8, 20])
def test_bisection_hits_its_target(scheme: experts.Scheme, n_wanted: float) -> None:
    """It is met to a thousandth of an expert, and never exceeded."""
    given_routes, factors = routes(), experts.layer_factors([3, 0.1, 0.2, 0.1, 0.5, 1.1])
    found = experts.fit_to_count(scheme, given_routes, n_wanted, factors)
    rules = experts.layer_rules(scheme, found.value, len(given_routes), factors)
    reached = experts.mean_experts(given_routes, rules)
    assert reached == found.reached <= n_wanted
    missed = min(n_wanted, 8) - reached
    assert missed < (1 if scheme == "uniform" else 1e-3)


def test_modes_spares_the_layers_that_matter() -> None:
    given_routes, factors = routes(), experts.layer_factors([3, 0.1, 0.2, 0.1, 0.5, 1.1])
    found = experts.fit_to_count("modes", given_routes, 4, factors)
    rules = experts.layer_rules("modes", found.value, 6, factors)
    means = [
        experts.mean_experts([weights], [rule])
        for weights, rule in zip(given_routes, rules, strict=True)
    ]
    assert means[0] > means[2] > means[1]  # divergences 3, 0.2, 0.1
    assert [rule.value * factor for rule, factor in zip(rules, factors, strict=True)] == (
        pytest.approx([found.value] * 6)
    )


def test_factors() -> None:
    assert experts.layer_factors([1, 3]) == (0.25, 0.75)
    least = experts.layer_factors([0, 1, -0.1])  # noise may be below zero
    assert least[0] == least[2] == pytest.approx(experts.MIN_FACTOR, rel=1e-3)
    assert sum(least) == pytest.approx(1)
    for bad in ([], [0.0, 0.0], [1.0, math.nan], [math.inf]):
        with pytest.raises(UsageError, match="divergences"):
            experts.layer_factors(bad)
    with pytest.raises(UsageError, match="each of 2 layers"):
        experts.layer_rules("modes", 0.1, 2, (1.0,))
    with pytest.raises(UsageError, match="best one"):
        experts.fit_to_count("top-p", routes(), 0.5)


@pytest.mark.parametrize(("sign", "rising"), [(1, True), (-1, False)])
def test_bisection_stops_at_the_right_side_of_a_jump(sign: int, rising: bool) -> None:
    def measure(value: float) -> float:
        return float(sign * value >= sign * 0.3) + 0.5

    found = experts.bisect(measure, 1.0, (0.0, 1.0), rising=rising)
    assert found.reached == 0.5
    assert found.value == pytest.approx(0.3) and (found.value < 0.3) == rising
    assert experts.bisect(measure, 2.0, (0.0, 1.0), rising=rising).reached == 1.5
    with pytest.raises(UsageError, match=r"0.5 is the least"):
        experts.bisect(measure, 0.4, (0.0, 1.0), rising=rising)


@given(st.floats(0.01, 0.99))
@settings(max_examples=50, deadline=None)
def test_bisection_for_a_divergence(limit: float) -> None:
    """A measure that costs a run each is found in few."""
    calls: list[float] = []

    def traced(curve: Callable[[float], float]) -> Callable[[float], float]:
        def measure(value: float) -> float:
            calls.append(value)
            return curve(value)

        return measure

    found = experts.bisect(traced(lambda x: x * x), limit, (0, 1), rising=True, n_halvings=12)
    assert found.value**2 == found.reached <= limit
    assert (found.value + 2**-11) ** 2 > limit and len(calls) <= 14


def test_steps_get_their_rules() -> None:
    steps = experts.with_rules(all_run(range(4)), [1, 3], [LayerRule("mass", 0.5),
                                                          LayerRule("count", 2)])  # fmt: skip
    assert [(s.expert_rule, s.expert_value) for s in steps] == [
        ("all", 0.0), ("mass", 0.5), ("all", 0.0), ("count", 2)
    ]  # fmt: skip
    assert [s._replace(expert_rule="all", expert_value=0.0) for s in steps] == list(
        all_run(range(4))
    )
