"""Choosing among calibrated plans."""

from edgeroute.skippers.auto import Z_ONE_SIDED, at_speed, fastest, kl_bound, pareto
from edgeroute.skippers.plan import DepthPlan, LayerDepth


def plan(
    name: str, speed: float | None, kl: float | None, error: float | None = 0.0,
    compute: float = 0.9,
) -> DepthPlan:  # fmt: skip
    return DepthPlan(name=name, layers=(LayerDepth(),), speed=speed, kl=kl, kl_error=error,
                     compute=compute)  # fmt: skip


def test_the_fastest_plan_within_the_limit() -> None:
    plans = [plan("a", 1.1, 0.02), plan("b", 1.2, 0.04), plan("c", 1.5, 0.06)]
    assert fastest(plans) is plans[1]
    assert fastest(plans, 0.1) is plans[2]
    assert fastest(plans, 0.01) is None
    assert fastest([]) is None


def test_an_uncertain_plan_is_not_within_the_limit() -> None:
    """Half of such plans would exceed the limit on other text."""
    unsure = plan("a", 1.2, 0.04, 0.01)
    assert kl_bound(unsure) == 0.04 + Z_ONE_SIDED * 0.01
    assert fastest([unsure]) is None
    assert fastest([plan("a", 1.2, 0.04, 0.006)]) is not None


def test_what_was_not_measured_or_is_not_faster_is_not_chosen() -> None:
    assert fastest([plan("a", None, 0.01), plan("b", 1.2, None), plan("c", 1.2, 0.01, None),
                    plan("d", 1.0, 0.01), plan("e", 0.9, 0.0)]) is None  # fmt: skip


def test_of_equally_fast_plans_the_better() -> None:
    plans = [plan("a", 1.2, 0.03), plan("b", 1.2, 0.02), plan("c", 1.2, 0.04)]
    assert fastest(plans) is plans[1]


def test_the_best_plan_at_a_speed() -> None:
    plans = [plan("a", 1.1, 0.02), plan("b", 1.2, 0.08), plan("c", 1.3, 0.06), plan("d", None, 0.0)]
    assert at_speed(plans, 1.15) is plans[2]
    assert at_speed(plans, 1.05) is plans[0]
    assert at_speed(plans, 1.5) is None


def test_only_plans_that_no_other_beats_are_kept() -> None:
    plans = [
        plan("a", 1.1, 0.02, compute=0.95), plan("b", 1.3, 0.06, compute=0.8),
        plan("beaten", 1.2, 0.06, compute=0.85), plan("unmeasured", None, 0.01, compute=0.5),
        plan("slower-but-fewer", 1.2, 0.06, compute=0.75),
    ]  # fmt: skip
    assert [each.name for each in pareto(plans)] == ["a", "b", "slower-but-fewer"]
    twins = [plan("a", 1.1, 0.02), plan("b", 1.1, 0.02)]
    assert len(pareto(twins)) == 2  # neither is better
