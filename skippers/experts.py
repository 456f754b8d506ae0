"""Which of a token's chosen experts compute: four rules, and how their numbers are calibrated.

Weights of a token's chosen experts go in as the family's router gives them, best first, before
a constant factor of the model's own; the best expert always computes. Weights that are left are
divided by their sum where the family does that with all chosen ones, and stay as they are
elsewhere: a rule leaves experts out, it does not change what routing means.

Rules, by the names in `runtime.depth.ExpertRule`:
    count   the first ones. Source: uniform top-(k - 1), the control.
    weight  those of at least that weight. With value tau / alpha of the layer it is MoDES'
            "alpha * weight >= tau". Source: MoDES (arXiv 2511.15690).
    mass    the fewest first ones whose weights reach it, capped at the family's own number.
            Source: Harder Tasks Need More Experts (arXiv 2403.07652).
    ratio   those of at least that part of the sum of the weights before. Source: relative-norm
            halting (arXiv 2604.14419), an expert's share predicted by its weight alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.depth import ExpertRule, Step
from edgeroute.runtime.errors import UsageError

Scheme = Literal["modes", "top-p", "halting", "uniform"]
"""A rule for all layers with one number in common."""

SCHEMES: Final[tuple[Scheme, ...]] = ("modes", "top-p", "halting", "uniform")
MIN_FACTOR: Final = 1e-6
"""Least factor of a layer: one whose experts change nothing is thinned first, not without end."""
MAX_RATIO: Final = 1.0
"""Weights fall: from here on the ratio rule stops at once."""
N_HALVINGS: Final = 48

Weights = npt.NDArray[np.float32]
"""Of a layer's chosen experts, F32 (n_tokens, n_expert_used), best first."""


class LayerRule(NamedTuple):
    """What one layer's step says: see `runtime.depth.Step`."""

    rule: ExpertRule
    value: float


ALL: Final = LayerRule("all", 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A number found by bisection, and what it gives: never more than what was asked for."""

    value: float
    reached: float


def kept(weights: Weights, rule: ExpertRule, value: float) -> npt.NDArray[np.bool_]:
    """Mark the experts that compute: bool, the shape of `weights`.

    In single precision and in the order of the graph's operations, for its answers. Where the
    weights fall, as all families' but those that rank with a bias, the marked ones come first.

    Args:
        weights: (n_tokens, n_expert_used), best first.
        rule: which.
        value: its number, not negative.

    Raises:
        UsageError: no such rule, or a number that it cannot have.
    """
    check_rule(rule, value)
    number = np.float32(min(value, float(np.finfo(np.float32).max)))
    before = np.zeros_like(weights)
    before[:, 1:] = np.cumsum(weights, axis=1, dtype=np.float32)[:, :-1]
    found = np.ones(weights.shape, np.bool_)
    if rule == "count":
        found[:, int(value) :] = False
    elif rule == "weight":
        found = ~(weights < number)
    elif rule == "mass":
        found = before < number
    elif rule == "ratio":
        found = ~(before * number > weights)
    found[:, 0] = True
    return found


def n_experts(weights: Weights, rule: ExpertRule, value: float) -> npt.NDArray[np.int64]:
    """Count the experts that compute for each token: see `kept`."""
    counts: npt.NDArray[np.int64] = kept(weights, rule, value).sum(axis=1)
    return counts


def check_rule(rule: str, value: float) -> None:
    """Refuse a rule that cannot be executed.

    Raises:
        UsageError: no such rule, or a number that it cannot have.
    """
    if rule not in ("all", "count", "weight", "mass", "ratio"):
        raise UsageError(f"{rule!r} is no rule for experts; all, count, weight, mass and ratio are")
    if not value >= 0 or math.isinf(value):
        raise UsageError(f"the expert rule {rule} has the value {value}; a finite number of at "
                         "least 0 is wanted")  # fmt: skip
    if rule == "count" and (value < 1 or value != int(value)):
        raise UsageError(f"an expert count of {value:g} is not a whole number of at least 1")


def layer_factors(kl: Sequence[float]) -> tuple[float, ...]:
    """Turn what each layer's routed experts are worth into factors that sum to one.

    Args:
        kl: per layer, mean divergence of the model without the layer's routed experts from the
            full one, nats.

    Raises:
        UsageError: none is positive, or one is no number.
    """
    values = np.array(kl, np.float64)
    if not len(values) or not np.isfinite(values).all() or values.max() <= 0:
        raise UsageError(f"{len(values)} layers' divergences give no factors; finite numbers, "
                         "one of them above 0, are needed")  # fmt: skip
    shares = np.maximum(values, 0) / np.maximum(values, 0).sum()
    shares = np.maximum(shares, MIN_FACTOR)
    return tuple(float(share) for share in shares / shares.sum())


def layer_rules(
    scheme: Scheme, value: float, n_layer: int, factors: Sequence[float] | None = None
) -> tuple[LayerRule, ...]:
    """Spell a scheme out for `n_layer` layers with experts.

    Args:
        scheme: which.
        value: its one number: tau, the mass, the ratio, or the count.
        n_layer: layers with experts.
        factors: `layer_factors`, which `modes` needs.

    Raises:
        UsageError: `modes` without a factor for every layer, or a number no rule can have.
    """
    if scheme == "modes":
        if factors is None or len(factors) != n_layer:
            n_given = 0 if factors is None else len(factors)
            raise UsageError(f"MoDES needs a factor for each of {n_layer} layers, not {n_given}")
        rules = [LayerRule("weight", value / factor) for factor in factors]
    else:
        by_scheme: dict[Scheme, ExpertRule] = {"top-p": "mass", "halting": "ratio",
                                               "uniform": "count"}  # fmt: skip
        rules = [LayerRule(by_scheme[scheme], value)] * n_layer
    for each in rules:
        check_rule(*each)
    return tuple(rules)


def mean_experts(routes: Sequence[Weights], rules: Sequence[LayerRule]) -> float:
    """Average the experts that compute over tokens and layers.

    Args:
        routes: per layer, what its router gave.
        rules: per layer.
    """
    counts = [n_experts(weights, *rule) for weights, rule in zip(routes, rules, strict=True)]
    return float(np.concatenate(counts).mean())


def fit_to_count(
    scheme: Scheme, routes: Sequence[Weights], n_wanted: float,
    factors: Sequence[float] | None = None,
) -> Fitted:  # fmt: skip
    """Find the number with which a scheme computes as many experts as wanted, or just fewer.

    Args:
        scheme: which.
        routes: per layer, what its router gave for the tokens to calibrate on.
        n_wanted: experts per token and layer.
        factors: `layer_factors`, which `modes` needs.

    Raises:
        UsageError: fewer than one expert wanted, or factors missing.
    """
    if not n_wanted >= 1:
        raise UsageError(f"{n_wanted:g} experts a token are wanted; the best one always computes")
    low, high, rising = span_of(scheme, routes, factors)

    def measure(value: float) -> float:
        return mean_experts(routes, layer_rules(scheme, value, len(routes), factors))

    if scheme == "uniform":
        count = float(min(routes[0].shape[1], int(n_wanted)))
        return Fitted(value=count, reached=measure(count))
    return bisect(measure, n_wanted, (low, high), rising=rising)


def span_of(
    scheme: Scheme, routes: Sequence[Weights], factors: Sequence[float] | None = None
) -> tuple[float, float, bool]:
    """Return a scheme's numbers from which one is to be found, and whether experts rise with it.

    One end keeps the best expert alone, the other all.
    """
    if scheme == "uniform":
        return 1.0, float(routes[0].shape[1]), True
    if scheme == "halting":
        return 0.0, float(np.nextafter(np.float32(MAX_RATIO), np.float32(2))), False
    most = max(float(weights.max()) for weights in routes)
    if scheme == "top-p":
        return 0.0, 1.01 * max(float(weights.sum(axis=1).max()) for weights in routes), True
    return 0.0, 1.01 * most * max(factors or (1.0,)), False


def bisect(
    measure: Callable[[float], float], limit: float, span: tuple[float, float], *, rising: bool,
    n_halvings: int = N_HALVINGS,
) -> Fitted:  # fmt: skip
    """Find the number whose measure is as large as it may be under a limit.

    Monotone measures jump: the answer lies at the edge of a jump, on the side that keeps to
    the limit.

    Args:
        measure: monotone in its argument: experts per token, or a divergence.
        limit: what it must not exceed.
        span: least and greatest argument; the end where the measure is least must keep to it.
        rising: whether the measure rises with the argument.
        n_halvings: of the span.

    Raises:
        UsageError: even the least measure is over the limit.
    """
    least, most = span if rising else (span[1], span[0])
    if (reached := measure(most)) <= limit:
        return Fitted(value=most, reached=reached)
    if (reached := measure(least)) > limit:
        raise UsageError(f"{reached:g} is the least to be had, over the limit of {limit:g}")
    good, bad = Fitted(value=least, reached=reached), most
    for _ in range(n_halvings):
        middle = (good.value + bad) / 2
        if middle in (good.value, bad):
            break
        reached = measure(middle)
        if reached <= limit:
            good = Fitted(value=middle, reached=reached)
        else:
            bad = middle
    return good


def with_rules(
    steps: Sequence[Step], layers: Sequence[int], rules: Sequence[LayerRule]
) -> tuple[Step, ...]:
    """Give the steps of layers with experts their rules.

    Args:
        steps: a pass.
        layers: the layers with experts, as the rules have them.
        rules: one per such layer.
    """
    by_layer = dict(zip(layers, rules, strict=True))
    return tuple(
        step._replace(expert_rule=by_layer[step.il].rule, expert_value=by_layer[step.il].value)
        if step.il in by_layer else step
        for step in steps
    )  # fmt: skip
