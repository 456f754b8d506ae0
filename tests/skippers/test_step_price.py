"""Prices with exact numbers; a pass that took oddly long does not change them."""

import math
import random
from dataclasses import asdict

import pytest

from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.step_price import PassCost, Workload, pays, predicted_s

SMALL, LARGE = PassCost(base_s=0.01, token_s=0.03), PassCost(base_s=0.9, token_s=0.1)


def measured(
    base_s: float, token_s: float, sizes: list[int], noise: float = 0.0, seed: int = 1
) -> PassCost:
    cost, rng = PassCost(), random.Random(seed)
    for k in sizes:
        cost.observe(k, (base_s + token_s * k) * (1 + rng.uniform(-noise, noise)))
    return cost


def test_a_line_is_found_exactly() -> None:
    for base_s, token_s in ((0.04, 0.002), (0.0, 0.07), (0.5, 0.0)):
        cost = measured(base_s, token_s, [1, 1, 17, 1, 40, 9, *[1] * 50, 33])
        assert cost.known
        assert cost.base_s == pytest.approx(base_s, abs=1e-9)
        assert cost.token_s == pytest.approx(token_s, abs=1e-9)
        assert cost.seconds(100) == pytest.approx(base_s + 100 * token_s, rel=1e-6)


def test_noise_is_averaged_out() -> None:
    """By more than a median of five does, and for short passes beside long ones too."""
    off = []
    for seed in range(8):
        cost = measured(0.04, 0.002, [1, 1, 1, 16, 1, 1, 400] * 60, noise=0.25, seed=seed)
        off += [abs(cost.seconds(k) / (0.04 + 0.002 * k) - 1) for k in (1, 16, 400)]
    assert sum(off) / len(off) < 0.04 and max(off) < 0.15


def test_two_sizes_are_enough() -> None:
    cost = measured(0.3, 0.01, [9, 70])
    assert cost.known
    assert cost.seconds(1) == pytest.approx(0.31, abs=1e-9)


def test_before_two_sizes_nothing_is_made_up() -> None:
    cost = PassCost()
    assert not cost.known
    with pytest.raises(UsageError, match="before one was measured"):
        cost.seconds(1)
    cost.observe(16, 0.8)
    assert not cost.known
    assert cost.seconds(16) == cost.seconds(1) == 0.8
    assert cost.seconds(32) == pytest.approx(1.6)
    cost.observe(16, 0.4)
    assert cost.seconds(16) == 0.4  # of two, the first is the slow one
    assert cost.to_dict() == {"base_s": 0.0, "token_s": 0.0}


def test_neither_part_is_negative() -> None:
    falling = PassCost()
    for _ in range(3):
        falling.observe(1, 0.2)
        falling.observe(64, 0.1)
    assert falling.token_s == 0.0 and 0.1 < falling.base_s < 0.2
    steep = PassCost()
    for _ in range(3):
        steep.observe(1, 0.01)
        steep.observe(64, 6.4)
    assert steep.base_s == 0.0 and 0.01 <= steep.token_s <= 0.1


@pytest.mark.parametrize("factor", [0.01, 10.0, 1000.0])
@pytest.mark.parametrize("at", [0, 1, 40])
def test_one_outlier_changes_nothing(factor: float, at: int) -> None:
    """Nor does the first pass, which is often a slow one."""
    cost = PassCost()
    for i in range(50):
        for k in (1, 20):
            cost.observe(k, (0.04 + 0.002 * k) * (factor if i == at else 1.0))
    assert cost.seconds(1) == pytest.approx(0.042, rel=0.01)
    assert cost.seconds(20) == pytest.approx(0.08, rel=0.01)


def test_it_follows_a_change() -> None:
    cost = PassCost()
    for seconds in [0.04] * 200 + [0.2] * 40:
        cost.observe(1, seconds)
        cost.observe(32, 2 * seconds)
    assert cost.seconds(1) == pytest.approx(0.2, rel=0.05)
    assert cost.seconds(32) == pytest.approx(0.4, rel=0.05)


def test_decoding_does_not_wash_out_reading() -> None:
    cost = measured(0.5, 0.01, [50, 50, 50, *[1] * 20_000])
    assert cost.seconds(50) == pytest.approx(1.0, rel=1e-6)


def test_it_survives_its_dict_and_goes_on() -> None:
    cost = measured(0.04, 0.002, [1, 8])
    again = PassCost(**cost.to_dict())
    assert again == cost and again.known and cost.to_dict() == asdict(cost)
    again.observe(1, 9.0)
    assert again.seconds(1) == cost.seconds(1)  # one size says nothing of both parts
    again.observe(8, 9.0)
    assert again.seconds(1) == pytest.approx(9.0)


@pytest.mark.parametrize(
    ("n_tokens", "seconds"), [(0, 1.0), (-1, 1.0), (1, -0.1), (1, math.nan), (1, math.inf)]
)
def test_what_is_no_pass_is_refused(n_tokens: int, seconds: float) -> None:
    cost = PassCost()
    with pytest.raises(UsageError, match="cannot be entered"):
        cost.observe(n_tokens, seconds)
    assert not cost.known


def test_zero_seconds_are_a_time() -> None:
    cost = measured(0.0, 0.0, [1, 8])
    assert cost.seconds(8) == 0.0


def test_a_workload_costs_the_sum_of_its_passes() -> None:
    assert predicted_s(Workload(), SMALL, LARGE) == 0.0
    assert predicted_s(Workload(small_written=2), SMALL, LARGE) == pytest.approx(0.08)
    assert predicted_s(Workload(small_read=3), SMALL, LARGE) == pytest.approx(0.09)
    assert predicted_s(Workload(large_written=2), SMALL, LARGE) == pytest.approx(2.0)
    read = Workload(large_passes=0.5, large_read=4)
    assert predicted_s(read, SMALL, LARGE) == pytest.approx(0.5 * 0.9 + 4 * 0.1)
    mixed = Workload(small_written=0.8, small_read=0.2, large_written=0.2, large_passes=0.05,
                     large_read=0.8)  # fmt: skip
    assert predicted_s(mixed, SMALL, LARGE) == pytest.approx(0.032 + 0.006 + 0.2 + 0.125)


def test_routing_pays_where_passes_are_flat_and_not_where_tokens_cost() -> None:
    """The numbers of Study A: resident models lose, a streamed one wins."""
    half = Workload(small_written=0.54, small_read=0.46, large_written=0.46, large_passes=0.03,
                    large_read=0.54)  # fmt: skip
    small = PassCost(base_s=0.022, token_s=0.019)
    resident = PassCost(base_s=0.026, token_s=0.043)
    streamed = PassCost(base_s=0.8, token_s=0.02)
    assert pays(half, small, resident) is False
    assert pays(half, small, streamed) is True
    assert pays(half, small, PassCost()) is None
    assert pays(half, PassCost(), streamed) is None


def test_the_least_gain_and_the_other_side_count() -> None:
    large, small = PassCost(token_s=1.0), PassCost(token_s=0.5)
    work = Workload(small_written=1.0)
    assert pays(work, small, large, 2.0) is True
    assert pays(work, small, large, 2.01) is False
    answer = Workload(small_written=100)
    assert pays(answer, small, large) is False
    assert pays(answer, small, large, alone=Workload(large_written=60)) is True
