"""Mixing rules on gates small enough to work out by hand."""

import math

import numpy as np
import pytest

from edgeroute.offload.mixing import dynmole, remix, softmax, tsallis_entropy
from edgeroute.runtime.errors import UsageError


def test_softmax_is_a_distribution_and_any_scale_is_safe() -> None:
    gate = softmax({"a": 0.2, "b": 0.3}, temperature=0.1)
    assert list(gate) == ["b", "a"]
    assert gate["b"] / gate["a"] == pytest.approx(math.e)
    assert sum(softmax({"a": 1e6, "b": -1e6, "c": 0.0}).values()) == pytest.approx(1)
    for bad in ({}, {"a": float("nan")}):
        with pytest.raises(UsageError):
            softmax(bad)
    with pytest.raises(UsageError, match="temperature"):
        softmax({"a": 1.0}, temperature=0)


def test_tsallis_entropy() -> None:
    p = np.array([0.5, 0.5])
    assert tsallis_entropy(p, 2.0) == pytest.approx(0.5)
    assert tsallis_entropy(p, 1.0) == pytest.approx(math.log(2))
    assert tsallis_entropy(p, 1.0 + 1e-6) == pytest.approx(math.log(2), abs=1e-5)
    assert tsallis_entropy(np.array([1.0, 0.0])) == pytest.approx(0)


def test_dynmole_mixes_all_where_the_gate_is_undecided() -> None:
    gate = {"a": 0.26, "b": 0.25, "c": 0.25, "d": 0.24}
    assert dynmole(gate, limit=4) == gate
    assert list(dynmole(gate, limit=3)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "gate, names",
    [
        ({"a": 0.9, "b": 0.06, "c": 0.04}, ["a", "b"]),  # a alone crosses; two at least
        ({"a": 0.7, "b": 0.04, "c": 0.26 - 1e-9, "d": 1e-9}, ["a", "c"]),
        ({"a": 0.45, "b": 0.25, "c": 0.04, "d": 0.26, "e": 0, "f": 0, "g": 0}, ["a", "d"]),
        ({"a": 0.40, "b": 0.20, "c": 0.1, "d": 0.30, "e": 0, "f": 0, "g": 0, "h": 0, "i": 0},
         ["a", "d"]),
        ({"a": 1.0, "b": 0.0}, ["a"]),
        ({"a": 1.0}, ["a"]),
    ],
)  # fmt: skip
def test_dynmole_takes_the_favoured_below_the_crossing_one(gate, names) -> None:
    found = dynmole(gate, limit=8)
    assert list(found) == names
    assert all(found[name] == gate[name] for name in names)


def test_dynmole_can_take_more_than_two() -> None:
    gate = {"a": 0.25, "b": 0.24, "c": 0.23, "d": 0.28} | {f"z{i}": 0.0 for i in range(30)}
    assert list(dynmole(gate, limit=8)) == ["d", "a"]
    assert list(dynmole(gate, limit=8, top_p=0.78)) == ["d", "a", "b"]


def test_remix_weighs_equally_whatever_the_gate_says() -> None:
    gate = {"a": 0.1, "b": 0.6, "c": 0.3}
    assert remix(gate, k=2, limit=8) == {"b": 0.5, "c": 0.5}
    assert remix(gate, k=5, limit=8) == pytest.approx({"b": 1 / 3, "c": 1 / 3, "a": 1 / 3})
    assert remix(gate, k=3, limit=1) == {"b": 1.0}
    tied = {"b": 0.5, "a": 0.5}
    assert remix(tied, k=1, limit=1) == remix(dict(reversed(tied.items())), k=1, limit=1)


@pytest.mark.parametrize("gate", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": float("nan")}])
def test_what_is_no_distribution_is_refused(gate: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        dynmole(gate, limit=4)
    with pytest.raises(UsageError):
        remix(gate, k=1, limit=4)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="1 slot"):
        remix({"a": 1.0}, k=1, limit=0)
    with pytest.raises(UsageError):
        remix({"a": 1.0}, k=0, limit=4)
    with pytest.raises(UsageError, match="out of range"):
        dynmole({"a": 1.0}, limit=4, q=0)
