"""Which of the calibrated plans to use: the fastest within a limit of quality, or none."""

from collections.abc import Iterable, Sequence
from typing import Final

from edgeroute.skippers.plan import DepthPlan

MAX_KL: Final = 0.05
"""Divergence from the full model that `depth="auto"` accepts by default, nats per token."""
Z_ONE_SIDED: Final = 1.64
"""Standard errors above the mean that hold the true value in 95 of 100 calibrations."""


def kl_bound(plan: DepthPlan) -> float | None:
    """Return what a plan's divergence is at most, as far as it was measured; None if it was not."""
    if plan.kl is None or plan.kl_error is None:
        return None
    return plan.kl + Z_ONE_SIDED * plan.kl_error


def fastest(plans: Iterable[DepthPlan], max_kl: float = MAX_KL) -> DepthPlan | None:
    """Pick the fastest plan that is surely within the limit and faster than the full model.

    None where there is no such plan: the full model runs. Of two equally fast plans the better
    is taken.
    """
    fit = [
        (plan.speed, -bound, plan.name, plan)
        for plan in plans
        if plan.speed is not None and plan.speed > 1
        and (bound := kl_bound(plan)) is not None and bound <= max_kl
    ]  # fmt: skip
    return max(fit, key=lambda each: each[:3])[3] if fit else None


def at_speed(plans: Iterable[DepthPlan], speed: float) -> DepthPlan | None:
    """Pick the plan of least divergence among those at least so fast; None if none is."""
    fit = [
        (plan.kl, plan.name, plan)
        for plan in plans
        if plan.speed is not None and plan.speed >= speed and plan.kl is not None
    ]
    return min(fit, key=lambda each: each[:2])[2] if fit else None


def pareto(plans: Sequence[DepthPlan]) -> tuple[DepthPlan, ...]:
    """Keep the measured plans that no other beats, in the order given.

    One beats another by being as good or better in divergence, in compute and in speed: speed
    alone is too uncertain a measurement.
    """
    known = {
        plan.name: (plan.kl, plan.compute, -plan.speed)
        for plan in plans
        if plan.kl is not None and plan.speed is not None
    }

    def beaten(name: str) -> bool:
        mine = known[name]
        return any(
            theirs != mine and all(a <= b for a, b in zip(theirs, mine, strict=True))
            for theirs in known.values()
        )

    return tuple(plan for plan in plans if plan.name in known and not beaten(plan.name))
