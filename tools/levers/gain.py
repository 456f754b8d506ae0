"""What pairs of runs say of a lever: its gain, how sure that is, and a verdict."""

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from edgeroute.lever_proofs import Verdict
from edgeroute.skippers.auto import MAX_KL

N_BOOTSTRAP: Final = 2000
CONFIDENCE: Final = 0.95
Z: Final = 1.959964
"""Standard errors either side of a mean that hold it with that confidence."""
MIN_PAIRS: Final = 3
"""Fewer say nothing: their interval would be that of two lucky runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """How much quicker a lever makes things, less 1, and its 95 % interval."""

    value: float
    low: float
    high: float


def gain_of(off_s: Sequence[float], on_s: Sequence[float], seed: int = 1) -> Gain:
    """Compare seconds per token, pair by pair.

    The value is the median of means of any two pairs' log ratios, which a disturbed run hardly
    moves (Hodges and Lehmann 1963). The interval is a percentile bootstrap over pairs, widened
    as Hesterberg 2015 advises, since that of a few pairs is too narrow.

    Args:
        off_s: of each pair, without the lever.
        on_s: with it.
        seed: of the bootstrap.
    """
    logs = [math.log(off / on) for off, on in zip(off_s, on_s, strict=True)]
    rng = random.Random(seed)
    n = len(logs)
    centres = sorted(centre([logs[rng.randrange(n)] for _ in logs]) for _ in range(N_BOOTSTRAP))
    tail = (1 - CONFIDENCE) / 2
    low, high = centres[int(tail * N_BOOTSTRAP)], centres[int((1 - tail) * N_BOOTSTRAP) - 1]
    value, wider = centre(logs), _widening(n)
    return Gain(value=math.expm1(value), low=math.expm1(value - wider * max(0.0, value - low)),
                high=math.expm1(value + wider * max(0.0, high - value)))  # fmt: skip


def _widening(n: int) -> float:
    """Return by how much a t interval of n values is wider than a normal one's plug-in.

    The quantile of t is expanded in 1 / degrees of freedom (Abramowitz and Stegun, 26.7.5).
    """
    if n < 2:
        return 1.0
    free = n - 1
    t = Z + (Z**3 + Z) / (4 * free) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * free**2)
    t += (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / (384 * free**3)
    return t / Z * math.sqrt(n / free)


def centre(values: Sequence[float]) -> float:
    """Return the Hodges-Lehmann estimate of where the middle of the values lies."""
    return statistics.median(
        (a + b) / 2 for i, a in enumerate(values) for b in values[i:]
    )  # fmt: skip


def verdict_of(gain: Gain, kl: float, n_pairs: int, *, max_kl: float = MAX_KL) -> Verdict:
    """Judge a lever: see `edgeroute.lever_proofs.Verdict`."""
    if n_pairs < MIN_PAIRS:
        return "failed"
    if gain.high < 0:
        return "loses"
    if gain.low <= 0:
        return "level"
    return "wins" if kl <= max_kl else "lossy"
