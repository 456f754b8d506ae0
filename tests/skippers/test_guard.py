"""The quality guard: plans that keep their promise stay, others leave, and soon."""

import math
import random

import pytest

from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.guard import Guard, GuardParams, promise_of
from edgeroute.skippers.plan import DepthPlan, LayerDepth


def draws(mean: float, seed: int) -> random.Random:
    """Divergences of tokens are heavy in the tail: most near 0, a few of whole nats."""
    return random.Random(f"{seed} {mean}")


def token_kl(rng: random.Random, mean: float) -> float:
    return mean * rng.lognormvariate(-0.72, 1.2)


def test_a_plan_that_keeps_its_promise_stays() -> None:
    """The interval is looked at after every sample; it must hold over thousands of them."""
    false_alarms = 0
    for seed in range(100):
        guard, rng = Guard(0.06), draws(0.05, seed)
        for _ in range(2000):
            guard.observe(token_kl(rng, 0.05))
        false_alarms += guard.verdict == "disable"
    assert false_alarms <= 2


def test_a_plan_that_breaks_it_leaves_and_stays_away() -> None:
    lasted = []
    for seed in range(50):
        guard, rng = Guard(0.06), draws(0.24, seed)
        n = 0
        while guard.observe(token_kl(rng, 0.24)) == "keep":
            n += 1
            assert n < 5000
        lasted.append(n)
        for _ in range(2000):
            assert guard.observe(0.0) == "disable"
        assert not guard.wants()
        guard.reset()
        assert guard.verdict == "keep" and guard.estimate.n_samples == 0
    assert sorted(lasted)[25] < 150


def test_no_verdict_before_there_are_enough_samples() -> None:
    guard = Guard(0.05, GuardParams(min_samples=40))
    verdicts = [guard.observe(3.0 + 0.01 * (i % 2)) for i in range(40)]
    assert verdicts == ["keep"] * 39 + ["disable"]


def test_one_bad_token_is_no_verdict() -> None:
    guard = Guard(0.05)
    for i in range(200):
        guard.observe(8.0 if i == 100 else 0.02)
    assert guard.verdict == "keep"
    assert guard.estimate.mean > 0.05


def test_the_estimate_forgets() -> None:
    guard = Guard(1.0, GuardParams(memory=50))
    for _ in range(1000):
        guard.observe(0.5)
    for _ in range(500):
        guard.observe(0.1)
    assert guard.estimate.mean == pytest.approx(0.1, rel=0.01)


def test_the_interval_is_that_of_a_mean() -> None:
    guard = Guard(1.0, GuardParams(memory=1e9, z=2.0))
    values = [0.1, 0.2, 0.4, 0.1, 0.0, 0.3]
    for value in values:
        guard.observe(value)
    mean = sum(values) / 6
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / 5 / 6)
    found = guard.estimate
    assert found.mean == pytest.approx(mean)
    assert found.low == pytest.approx(max(0, mean - 2 * error), rel=1e-5)
    assert found.high == pytest.approx(mean + 2 * error, rel=1e-5)
    assert found.n_samples == 6


def test_nothing_is_known_without_samples() -> None:
    guard = Guard(0.05)
    assert guard.estimate.low == 0 and guard.estimate.high == math.inf
    guard.observe(0.1)
    assert guard.estimate.mean == pytest.approx(0.1) and guard.estimate.high == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonsense_disables_at_once(value: float) -> None:
    guard = Guard(0.05)
    assert guard.observe(value) == "disable"
    assert math.isfinite(guard.estimate.mean)


def test_rounding_below_zero_is_zero() -> None:
    guard = Guard(0.0)
    for _ in range(100):
        assert guard.observe(-1e-9) == "keep"
    assert guard.estimate.mean == 0


def test_tokens_are_sampled_at_the_rate_and_alike_for_a_seed() -> None:
    params = GuardParams(rate=0.1)
    guard, again = Guard(0.05, params, seed=3), Guard(0.05, params, seed=3)
    asked = [guard.wants() for _ in range(5000)]
    assert 400 < sum(asked) < 600
    assert asked == [again.wants() for _ in range(5000)]
    assert not any(Guard(0.05, GuardParams(rate=0)).wants() for _ in range(100))


def test_a_promise_is_what_was_measured_and_a_margin() -> None:
    def plan(kl: float | None, error: float | None) -> DepthPlan:
        return DepthPlan(name="x", layers=(LayerDepth(),), kl=kl, kl_error=error)

    params = GuardParams(margin=0.25, floor=0.01)
    assert promise_of(plan(0.2, 0.0), params) == pytest.approx(0.25)
    assert promise_of(plan(0.2, 0.1), params) == pytest.approx(1.25 * 0.364)
    assert promise_of(plan(0.0, None), params) == pytest.approx(0.01)
    assert promise_of(plan(None, None), params) is None


@pytest.mark.parametrize("promise", [-0.1, math.nan, math.inf])
def test_a_promise_must_be_a_number(promise: float) -> None:
    with pytest.raises(UsageError, match="promise"):
        Guard(promise)


@pytest.mark.parametrize(
    "change", [{"rate": 1.5}, {"rate": math.nan}, {"memory": 0}, {"z": -1}, {"min_samples": 1}]
)
def test_settings_are_bounded(change: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(change))):
        GuardParams(**change)  # type: ignore[arg-type]
