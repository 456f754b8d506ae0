"""Overlap of computing and reading: on while it has measured to pay, and only then."""

import pytest

from edgeroute.offload.overlap_gate import OverlapGate, OverlapParams
from edgeroute.runtime.errors import UsageError

QUICK = OverlapParams(warmup=4, trial=12, wait=5, max_wait=20)


def drive(gate: OverlapGate, n: int, cost: dict[bool, float]) -> list[bool]:
    """Pass `n` layers that miss one to three experts; a miss takes as long as all before it."""
    chosen = []
    for i in range(n):
        n_missing = 1 + i % 3
        on = gate.begin(n_missing)
        chosen.append(on)
        gate.end(n_missing + cost[on])
    return chosen


def test_it_is_on_while_graphs_are_built_then_tried() -> None:
    gate = OverlapGate(QUICK)
    assert drive(gate, 4, {True: 9.0, False: 0.0}) == [True] * 4
    assert gate.state == "trial" and gate.n_trials == 0
    tried = drive(gate, 12, {True: 0.0, False: 0.5})
    assert sum(tried) == 6 and tried[:4] == [True, True, True, False]
    assert gate.state == "on" and gate.n_wins == gate.n_trials == 1


def test_equal_numbers_of_misses_are_compared() -> None:
    """Long layers on, short ones off: what counts is the difference between equals."""
    gate = OverlapGate(QUICK)
    drive(gate, 4, {True: 0.0, False: 0.0})
    for n_missing in [4] * 4 + [1] * 8:
        on = gate.begin(n_missing)
        gate.end(10.0 * n_missing + (-0.5 if on else 0.0))
    assert gate.state == "on" and gate.gain_ratio is not None and 0.01 < gate.gain_ratio < 0.05


def test_it_switches_itself_off_where_it_loses_and_tries_again_ever_later() -> None:
    gate = OverlapGate(QUICK)
    lost = {True: 0.2, False: 0.0}
    drive(gate, 16, lost)
    assert gate.state == "off" and gate.n_wins == 0
    assert not any(drive(gate, 5, lost))
    assert any(drive(gate, 12, lost)) and gate.n_trials == 2
    assert not any(drive(gate, 10, lost)) and gate.state == "trial"
    drive(gate, 12, {True: 0.0, False: 0.2})
    assert gate.state == "on" and all(drive(gate, 20, lost))


def test_equal_is_not_enough() -> None:
    gate = OverlapGate(QUICK)
    drive(gate, 16, {True: 0.0, False: 0.0})
    assert gate.state == "off" and gate.gain_ratio == 0


def test_layers_of_one_side_only_prove_nothing() -> None:
    gate = OverlapGate(OverlapParams(warmup=0, trial=4, wait=3))
    assert gate.begin(1)
    gate.end(1.0)
    for n_missing in (1, 2, 3, 4):
        gate.begin(n_missing)
        gate.end(1.0)
    assert gate.n_trials == 1 and not gate.on


def test_it_can_be_forbidden_and_an_end_without_a_begin_is_nothing() -> None:
    gate = OverlapGate(allowed=False)
    assert not gate.begin(1) and gate.state == "forbidden"
    gate.end(1.0)
    free = OverlapGate(OverlapParams(warmup=1))
    free.end(1.0)
    assert free.state == "on"


@pytest.mark.parametrize(
    "wrong", [{"warmup": -1}, {"trial": 3}, {"wait": 0}, {"wait": 9, "max_wait": 8},
              {"min_gain_ratio": 1.0}, {"min_gain_ratio": -0.1}], ids=str,
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="overlap gate settings"):
        OverlapParams(**wrong)  # type: ignore[arg-type]
