"""How local routing is: SRP, how well a segment's experts are a fixed set, with its floor.

The measures are those of the paper, computed from counts that add up over sequences, so that
a bootstrap over sequences costs next to nothing. SCH, its cache counterpart, is in
`segment_cache`.
Source: "Not All Models Suit Expert Offloading", arXiv 2505.16056.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from edgeroute.offload.routes import Routes, all_layers, checked
from edgeroute.offload.segment_cache import SegmentCache, sch_counts
from edgeroute.offload.trace import Ids
from edgeroute.runtime.errors import UsageError

Counts = npt.NDArray[np.int64]
Ratios = npt.NDArray[np.float64]

_CHUNK_TOKENS: Final = 4096
_LEVEL: Final = 0.95


class Srp(NamedTuple):
    """Segment routing best performance: an F1 from 0 to 1.

    `rho` is predicted over actual activations at the best threshold, an estimate of how many
    times the experts of one token are worth caching; `threshold` the activations in a window
    from which on an expert counts as active throughout.
    """

    value: float
    rho: float
    threshold: int


class Estimate(NamedTuple):
    """A ratio with its bootstrap interval of 95 %."""

    value: float
    low: float
    high: float


# --- SRP --------------------------------------------------------------------------------


def activation_counts(
    routes: Sequence[Routes], n_expert: int, m: int, layers: Collection[int] | None = None
) -> Counts:
    """Count, for all windows of m tokens at stride 1, how often an expert was active f times.

    Returns:
        (n_sequence, n_layer, m + 1): windows times experts by f, all that SRP depends on.
        A sequence of less than m tokens has no window.

    Raises:
        UsageError: m below 1, layers or experts that the routes have not.
    """
    _check_window(m)
    wanted = all_layers(routes, layers)
    counts = np.zeros((len(routes), len(wanted), m + 1), np.int64)
    for i, one in enumerate(routes):
        for j, il in enumerate(wanted):
            if il in one.ids:
                counts[i, j] = _histogram(checked(one.ids[il], n_expert), n_expert, m)
    return counts


def _check_window(m: int) -> None:
    if m < 1:
        raise UsageError(f"a segment has at least 1 token, got {m}")


def _histogram(ids: Ids, n_expert: int, m: int) -> Counts:
    """f over all windows and experts, some thousand windows at a time to bound memory."""
    total = np.zeros(m + 1, np.int64)
    for at in range(0, len(ids) - m + 1, _CHUNK_TOKENS):
        part = ids[at : at + _CHUNK_TOKENS + m - 1]
        uses = np.zeros((len(part) + 1, n_expert), np.int32)
        np.put_along_axis(uses[1:], part.astype(np.intp), 1, axis=1)
        np.cumsum(uses, axis=0, out=uses)
        total += np.bincount((uses[m:] - uses[:-m]).ravel(), minlength=m + 1)
    return total


def _f1(counts: Counts) -> tuple[Ratios, Ratios]:
    """F1 and predicted over actual mass at each threshold 1..m, of (..., m + 1) counts.

    Threshold 0 would add experts that no token of a window uses, and so never wins.
    """
    m = counts.shape[-1] - 1
    mass = counts * np.arange(m + 1)
    actual = mass.sum(axis=-1, keepdims=True).astype(np.float64)
    right = np.cumsum(mass[..., :0:-1], axis=-1)[..., ::-1]
    predicted = m * np.cumsum(counts[..., :0:-1], axis=-1)[..., ::-1]
    return 2 * right / (predicted + actual), predicted / actual


def srp_of(counts: npt.ArrayLike) -> Srp:
    """SRP of activation counts (..., m + 1), added up over all but the last axis.

    Raises:
        UsageError: they are all 0: no sequence had m tokens.
    """
    pooled = np.asarray(counts)
    pooled = pooled.reshape(-1, pooled.shape[-1]).sum(axis=0)
    if not pooled.any():
        raise UsageError(
            f"no sequence has the {pooled.size - 1} tokens of a segment; take shorter segments "
            f"or record longer texts"
        )
    f1, rho = _f1(pooled)
    best = int(np.argmax(f1))
    return Srp(float(f1[best]), float(rho[best]), best + 1)


def srp(
    routes: Sequence[Routes], n_expert: int, m: int, layers: Collection[int] | None = None
) -> Srp:
    """SRP of segments of m tokens, counts of all sequences and layers pooled.

    For every window and expert f is the number of its activations. Experts with f >= a are
    predicted to be active in the whole window; F1 compares the m activations so predicted for
    each with those that happened. SRP is the best F1 over a, which is one for all that is
    pooled.

    Raises:
        UsageError: no sequence has m tokens; m, layers or experts that cannot be.

    Source: arXiv 2505.16056, section 3.
    """
    return srp_of(activation_counts(routes, n_expert, m, layers))


def srp_by_layer(routes: Sequence[Routes], n_expert: int, m: int) -> dict[int, Srp]:
    """SRP of each layer alone, with its own threshold; see `srp`."""
    counts = activation_counts(routes, n_expert, m).sum(axis=0)
    return {il: srp_of(counts[i]) for i, il in enumerate(all_layers(routes))}


def srp_floor(n_expert: int, n_expert_used: int, m: int) -> Srp:
    """SRP of a gate that draws each token's experts anew, all alike: f is Binomial(m, k / E).

    No gate of balanced load can be less local for long; the value is exact for an endless text.

    Raises:
        UsageError: more experts used than there are, or m below 1.
    """
    _check_window(m)
    if not 1 <= n_expert_used <= n_expert:
        raise UsageError(f"a token cannot use {n_expert_used} of {n_expert} experts")
    if n_expert_used == n_expert:
        return Srp(1.0, 1.0, 1)
    yes = math.log(n_expert_used / n_expert)
    no = math.log1p(-n_expert_used / n_expert)
    ways = [math.lgamma(m + 1) - math.lgamma(f + 1) - math.lgamma(m - f + 1) for f in range(m + 1)]
    shares = np.exp([way + f * yes + (m - f) * no for f, way in enumerate(ways)])
    f1, rho = _f1(shares)
    best = int(np.argmax(f1))
    return Srp(float(f1[best]), float(rho[best]), best + 1)


# --- SCH --------------------------------------------------------------------------------


def sch(routes: Sequence[Routes], n_expert: int, n_expert_used: int, m: int, rho: float) -> float:
    """Segment cache best hit rate: rho times a token's experts cached per layer, m tokens known.

    Over all sequences and layers; see `SegmentCache` for the rule, which charges no miss that
    fills an empty slot. Of `joined` routes (n_expert and n_expert_used times the layers) it is
    the hit rate of one cache for all layers.

    Raises:
        UsageError: sizes that cannot be, or texts so short that nothing is ever charged.
    """
    cache = SegmentCache(n_expert=n_expert, n_expert_used=n_expert_used, m=m, rho=rho)
    return float(_hit_ratio(_charged(sch_counts(routes, cache)).sum(axis=0)))


def _hit_ratio(counts: Counts) -> Ratios:
    """Of (..., 2) hits and charged requests."""
    return np.asarray(counts[..., 0] / counts[..., 1], np.float64)


def _charged(counts: Counts) -> Counts:
    """The sequences that had a request charged."""
    kept = counts[counts[:, 1] > 0]
    if not len(kept):
        raise UsageError(
            "every request fills an empty slot, which is not charged: there is no hit rate; "
            "take a smaller rho or longer texts"
        )
    return kept


# --- intervals --------------------------------------------------------------------------


def bootstrap(
    counts: Counts, statistic: Callable[[Counts], Ratios], n: int = 1000, seed: int = 0
) -> Estimate:
    """Resample sequences, with replacement, and give a ratio its basic interval of 95 %.

    Args:
        counts: (n_sequence, ...), such that a set of sequences has the sum of their counts.
        statistic: of (n, ...) such sums, n ratios from 0 to 1.

    Returns:
        The ratio of all sequences, and 2 * ratio - quantiles, kept within 0 to 1. One sequence
        says nothing about others: its interval is all of 0 to 1.

    Raises:
        UsageError: no sequence, or no resample.
    """
    if len(counts) < 1 or n < 1:
        raise UsageError(f"a bootstrap of {n} resamples of {len(counts)} sequences is none")
    value = float(statistic(counts.sum(axis=0, keepdims=True))[0])
    if len(counts) == 1:
        return Estimate(value, 0.0, 1.0)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=n)
    sums = (times @ counts.reshape(len(counts), -1)).reshape(n, *counts.shape[1:])
    below, above = np.quantile(statistic(sums), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Estimate(value, max(0.0, 2 * value - float(above)), min(1.0, 2 * value - float(below)))


def srp_interval(routes: Sequence[Routes], n_expert: int, m: int, seed: int = 0) -> Estimate:
    """SRP of all layers pooled, with its interval over sequences; see `srp`."""
    counts = activation_counts(routes, n_expert, m).sum(axis=1)
    value = srp_of(counts).value  # refuses where there is nothing to resample
    kept = counts[counts.any(axis=1)]
    found = bootstrap(kept, lambda sums: _f1(sums)[0].max(axis=-1), seed=seed)
    return found._replace(value=value)


def sch_interval(routes: Sequence[Routes], cache: SegmentCache, seed: int = 0) -> Estimate:
    """SCH with its interval over sequences; see `sch`."""
    return bootstrap(_charged(sch_counts(routes, cache)), _hit_ratio, seed=seed)
