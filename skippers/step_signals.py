"""How sure a model is of its next token: numbers from its logits.

Logits that are no probabilities (one is NaN or +inf, or all are -inf) give the least sure
answer there is, so that nothing downstream is ever NaN. Tokens ruled out by -inf count nothing.
"""

import math
from typing import Final

import numpy as np

from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.steps import Floats, Glance

N_TOP: Final = 20
"""Source: GlimpRouter, arXiv 2601.05110: servers tell the 20 likeliest tokens."""
_LEAST_LOG: Final = np.float32(-80)
"""Below it a token is taken for this unlikely, e^-80: products with -inf would be NaN."""
_BLOCK: Final = 64


def glance(logits: Floats, index: int, position: int, hidden: Floats | None = None) -> Glance:
    """Return what the small model's logits say of a step that begins.

    Args:
        logits: F32 (n_vocab,), of the step's first token; at least 2.
        index: steps of the answer before this one.
        position: tokens of the answer before this step.
        hidden: F32 (n_embd,), where the policy wants it.

    Raises:
        UsageError: the logits are of another shape.
    """
    logs = _logs(logits)
    if logs is None:
        worst = math.log(logits.size), math.log(min(N_TOP, logits.size))
        return Glance(index=index, position=position, entropy=worst[0], top_entropy=worst[1],
                      margin=0.0, hidden=hidden)  # fmt: skip
    top = _largest(logs, N_TOP)
    return Glance(
        index=index, position=position, entropy=_entropy(logs), top_entropy=_entropy(top),
        margin=_gap(top), hidden=hidden,
    )  # fmt: skip


def entropy(logits: Floats) -> float:
    """Return the entropy over the whole vocabulary, in nats, from F32 (n_vocab,).

    Raises:
        UsageError: the logits are of another shape.
    """
    logs = _logs(logits)
    return math.log(logits.size) if logs is None else _entropy(logs)


def top_entropy(logits: Floats, n_top: int = N_TOP) -> float:
    """Return the entropy over the likeliest tokens, renormalised, in nats, from F32 (n_vocab,).

    Raises:
        UsageError: the logits are of another shape.
    """
    logs = _logs(logits)
    return math.log(min(n_top, logits.size)) if logs is None else _entropy(_largest(logs, n_top))


def margin(logits: Floats) -> float:
    """Return the likeliest token's log-probability over the second's, in nats; never infinite.

    Raises:
        UsageError: the logits are of another shape.
    """
    if not math.isfinite(_best(logits)):
        return 0.0
    return min(_gap(_largest(logits, 2)), -float(_LEAST_LOG))


def _logs(logits: Floats) -> Floats | None:
    """Return logarithms of shares of the likeliest token's probability; None if there are none."""
    best = _best(logits)
    if not math.isfinite(best):
        return None
    logs: Floats = np.maximum(logits - best, _LEAST_LOG)
    return logs


def _best(logits: Floats) -> np.float32:
    """Return the largest logit; NaN if any is."""
    if logits.ndim != 1 or logits.size < 2:
        raise UsageError(f"logits must be F32 (n_vocab,) with at least 2, got {logits.shape}")
    best: np.float32 = logits.max()
    return best


def _entropy(logs: Floats) -> float:
    """Return the entropy of `_logs`; rounding never makes it negative."""
    shares = np.exp(logs)
    total = float(shares.sum())
    shares *= logs
    return max(0.0, math.log(total) - float(shares.sum()) / total)


def _largest(values: Floats, n: int) -> Floats:
    """Return the n largest values in no order, or all where there are fewer.

    The n-th largest of the blocks' maxima is no larger than the n-th largest of all, so few
    values need to be compared: a tenth of the time of a partition of the whole.
    """
    n_blocks = values.size // _BLOCK
    if n_blocks > n:
        heads = values[: n_blocks * _BLOCK].reshape(n_blocks, _BLOCK).max(axis=1)
        values = values[values >= np.partition(heads, n_blocks - n)[n_blocks - n]]
    if values.size <= n:
        return values
    return np.partition(values, values.size - n)[values.size - n :]


def _gap(values: Floats) -> float:
    second, first = np.partition(values, values.size - 2)[-2:]
    return float(first - second)
