"""The rule of early exit against its definition, and the threshold's promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.early_exit import (
    ExitCosts,
    ExitGate,
    ExitRule,
    confidence,
    threshold_for,
)

unit = st.floats(0, 1, width=32)


def test_confidence_is_the_top_probability_or_its_lead() -> None:
    logits = np.log(np.array([[0.2, 0.5, 0.3], [0.25, 0.25, 0.5]]))
    assert confidence(logits, "top") == pytest.approx([0.5, 0.5])
    assert confidence(logits, "margin") == pytest.approx([0.2, 0.25])
    broken = np.array([[np.nan, 1.0, 2.0], [np.inf, 0.0, 0.0]])
    assert confidence(broken, "top").tolist() == [0, 0]


@given(st.lists(st.tuples(unit, unit), min_size=1, max_size=40), unit)
@settings(max_examples=200, deadline=None)
def test_a_threshold_keeps_its_promise_and_no_lower_one_does(
    tokens: list[tuple[float, float]], max_kl: float
) -> None:
    sure, kl = (np.array(column, np.float64) for column in zip(*tokens, strict=True))

    def cost(threshold: float) -> float:
        return float(kl[sure >= threshold].sum() / len(kl))

    found = threshold_for(sure, kl, max_kl)
    slack = 1e-9
    if found is None:
        assert all(cost(each) > max_kl - slack for each in sure)
    else:
        assert cost(found) <= max_kl + slack
        assert all(cost(each) > max_kl - slack for each in sure if each < found)


def test_a_look_in_vain_is_followed_by_a_pause() -> None:
    gate = ExitGate(ExitRule(layer=2, threshold=0.6, n_pause=2))
    sure, unsure = np.log(np.array([0.7, 0.2, 0.1])), np.log(np.array([0.5, 0.3, 0.2]))
    assert gate.looks() and gate.leaves(sure)
    assert gate.looks() and not gate.leaves(unsure)
    assert [gate.looks() for _ in range(3)] == [False, False, True]


def test_a_rule_that_never_leaves() -> None:
    gate = ExitGate(ExitRule(layer=1, threshold=1.5))
    assert not gate.leaves(np.array([100.0, 0.0]))


def test_costs_tell_where_looking_pays() -> None:
    costs = ExitCosts(whole_s=10, before_s=5, look_s=2, keys_s=0.5, rest_s=5)
    assert costs.break_even == pytest.approx(2 / 4.5)
    assert costs.speed(costs.break_even) == pytest.approx(1)
    assert costs.speed(1) == pytest.approx(10 / 7.5) and costs.speed(0) < 1


@pytest.mark.parametrize("change", [{"layer": 0}, {"threshold": -0.1}, {"threshold": float("nan")},
                                    {"n_pause": -1}, {"measure": "luck"}])  # fmt: skip
def test_a_rule_out_of_bounds_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        ExitRule(**({"layer": 1, "threshold": 0.5} | change))  # type: ignore[arg-type]
