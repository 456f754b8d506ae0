"""Weights with which several adapters serve one request: pure functions of probabilities.

The probabilities are a gate's: here a softmax of predicted rewards, such as the router's.
Every function returns name → weight with the zero weights left out, in descending order of
probability, and mixes at most `limit` adapters: those that fit the slots together.
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgeroute.runtime.errors import UsageError

Weights = dict[str, float]
_SUM_TOLERANCE = 1e-6


def softmax(utilities: Mapping[str, float], temperature: float = 0.1) -> Weights:
    """Turn predicted rewards into probabilities, best first.

    Args:
        utilities: predicted reward per adapter.
        temperature: difference in reward that makes one adapter e times as probable.

    Raises:
        UsageError: no adapter, a utility that is no number, or a temperature not positive.
    """
    if not utilities or not all(math.isfinite(u) for u in utilities.values()):
        raise UsageError("a softmax needs at least one utility, and finite ones")
    if not 0 < temperature < math.inf:
        raise UsageError(f"temperature {temperature} is not positive and finite")
    best = max(utilities.values())
    raised = {name: math.exp((u - best) / temperature) for name, u in utilities.items()}
    total = math.fsum(raised.values())
    return dict(_ranked({name: value / total for name, value in raised.items()}))


def tsallis_entropy(probabilities: NDArray[np.float64], q: float = 1.1) -> float:
    """Return the Tsallis entropy (1 - Σpᵠ) / (q - 1); Shannon's, in nats, at q = 1.

    Source: Tsallis, "Possible generalization of Boltzmann-Gibbs statistics", Journal of
    Statistical Physics 52 (1988).
    """
    p = probabilities[probabilities > 0]
    if q == 1.0:
        return float(-(p * np.log(p)).sum())
    return float((1.0 - (p**q).sum()) / (q - 1.0))


def dynmole(
    gate: Mapping[str, float], limit: int, *,
    q: float = 1.1, all_above: float = 0.9, top_p: float = 0.75,
) -> Weights:  # fmt: skip
    """Mix all adapters where the gate is undecided, else the few that it favours.

    Undecided means an entropy above `all_above` of a uniform gate's. Else the adapters are
    those whose probabilities sum to at most `top_p`, the crossing one excluded, and at least
    two. The weights are the probabilities, not renormalised: they sum to less than 1.

    Args:
        gate: probability per adapter, summing to 1.
        limit: adapters that fit together; the most probable are kept.

    Raises:
        UsageError: the gate is no distribution, or a setting is out of range.

    Source: DynMoLE's released code; q = 1.1, 0.9 and 0.75 are its defaults.
    """
    ranked = _checked(gate, limit)
    if not (0 < q < math.inf and 0 <= all_above <= 1 and 0 <= top_p <= 1):
        raise UsageError(f"q {q}, all_above {all_above} or top_p {top_p} is out of range")
    n = len(ranked)
    probabilities = np.array([p for _, p in ranked])
    uniform = tsallis_entropy(np.full(n, 1 / n), q)
    if n > 1 and tsallis_entropy(probabilities, q) / uniform > all_above:
        return _kept(ranked, min(n, limit))
    n_within = int((np.cumsum(probabilities) <= top_p + 1e-12).sum())
    return _kept(ranked, min(max(2, n_within), limit))


def remix(gate: Mapping[str, float], k: int, limit: int) -> Weights:
    """Mix the k most probable adapters with equal weights 1/k.

    The probabilities choose and do not weigh. ReMix's own factor is 2/(k × rank), or 2/(k ×
    √rank); of that, 2/rank (or 2/√rank) is an adapter's alpha / rank, which its scale holds
    already, and 1/k is what remains here.

    Args:
        gate: probability per adapter, summing to 1.
        k: adapters to mix; fewer where there are fewer, or `limit` is.

    Raises:
        UsageError: the gate is no distribution, or k is less than 1.

    Source: ReMix, as described by others; its code was not read.
    """
    ranked = _checked(gate, limit)
    if k < 1:
        raise UsageError(f"{k} adapters cannot be mixed; 1 is the least")
    chosen = ranked[: min(k, limit)]
    return {name: 1.0 / len(chosen) for name, _ in chosen}


def _ranked(gate: Mapping[str, float]) -> list[tuple[str, float]]:
    """Most probable first; equals by name, so that the order of a mapping never matters."""
    return sorted(gate.items(), key=lambda item: (-item[1], item[0]))


def _checked(gate: Mapping[str, float], limit: int) -> list[tuple[str, float]]:
    if limit < 1:
        raise UsageError(f"a mix of at most {limit} adapters has none; give it 1 slot or more")
    total = math.fsum(gate.values()) if gate else 0.0
    if not (abs(total - 1.0) <= _SUM_TOLERANCE and all(p >= 0 for p in gate.values())):
        raise UsageError(f"gate probabilities are 0 or more and sum to 1, not to {total}")
    return _ranked(gate)


def _kept(ranked: list[tuple[str, float]], n: int) -> Weights:
    return {name: p for name, p in ranked[:n] if p > 0}
