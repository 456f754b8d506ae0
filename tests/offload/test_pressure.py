"""Slots shrink before memory runs out, and grow back when it is there again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeroute.offload.pressure import Pressure, PressureParams
from edgeroute.runtime.errors import UsageError

PARAMS = PressureParams(low_bytes=100, high_bytes=200, calm_readings=2)


def test_enough_memory_changes_nothing() -> None:
    pressure = Pressure(1000, PARAMS)
    assert [pressure.read(10_000, 1000) for _ in range(5)] == [None] * 5


def test_a_shortage_is_made_good_up_to_the_upper_margin() -> None:
    pressure = Pressure(1000, PARAMS)
    assert pressure.read(150, 1000) is None
    assert pressure.read(60, 1000) == 860  # 140 short of 200
    assert pressure.n_shrunk == 1


def test_a_shortage_that_stays_shrinks_further_down_to_nothing() -> None:
    pressure = Pressure(1000, PARAMS)
    held, seen = 1000, []
    for _ in range(12):
        target = pressure.read(0, held)
        held = held if target is None else target
        seen.append(held)
    assert seen[0] == 800 and seen[-1] == 0


def test_slots_come_back_only_after_calm_and_never_beyond_the_beginning() -> None:
    pressure = Pressure(1000, PARAMS)
    assert pressure.read(0, 1000) == 800
    assert pressure.read(500, 800) is None  # calm once
    assert pressure.read(350, 800) is None  # calm no more
    assert pressure.read(600, 800) is None
    assert pressure.read(600, 800) == 900
    assert pressure.read(5000, 900) is None
    assert pressure.read(5000, 900) == 1000
    assert [pressure.read(5000, 1000) for _ in range(4)] == [None] * 4


def test_half_of_one_byte_changes_nothing() -> None:
    pressure = Pressure(1000, PARAMS)
    assert pressure.read(0, 1000) == 800
    assert [pressure.read(401, 800) for _ in range(3)] == [None] * 3


def test_margins_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(UsageError, match="contradict"):
        PressureParams(low_bytes=2, high_bytes=1)


@given(st.lists(st.integers(0, 3000), max_size=60))
def test_the_target_stays_between_nothing_and_the_beginning(readings: list[int]) -> None:
    pressure = Pressure(1000, PARAMS)
    held = 1000
    for available in readings:
        target = pressure.read(available, held)
        if target is not None:
            assert 0 <= target <= 1000 and target != held
            held = target
        assert pressure.target_bytes == held
