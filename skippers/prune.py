"""Token pruning in a prompt's passes: which layers keep how many tokens, and which tokens.

`TokenRule` says what a graph scores; here is the same choice in plain numbers, the rules that it
is compared with, and the steps that ask for it. Source: FTP, arXiv 2412.11494.
"""

from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.depth import Step
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.token_choice import N_FACTORS, Floats, TokenRule, ranked_rule

BY_POSITION: Final = ranked_rule(position=1.0, rank=0.0)
"""The latest tokens: a control."""

Numbers = npt.NDArray[np.int64]


def at_random(seed: int) -> TokenRule:
    """Return a rule that keeps random tokens beside those always kept: a control."""
    return TokenRule(
        hidden=np.zeros((1, N_FACTORS), np.float32), bias=np.zeros(1, np.float32),
        out=np.zeros(1, np.float32), noise=1.0, seed=seed,
    )  # fmt: skip


def pruned(steps: Iterable[Step], keep: int, first: int) -> tuple[Step, ...]:
    """Let passes over layers from `first` on compute `keep` percent of a prompt's tokens.

    Raises:
        UsageError: `keep` is no percentage from 1 to 100.
    """
    if not 1 <= keep <= 100:
        raise UsageError(f"{keep} percent of a prompt's tokens cannot be kept; 1 to 100 can")
    return tuple(step._replace(keep=keep) if step.il >= first else step for step in steps)


def factors(attention: Floats, pos: int, keep: int) -> Floats:
    """Return what a rule scores of the tokens of one pass.

    Args:
        attention: mean share that each token receives from the last ones, times the tokens of
            the pass; F32 (n_tokens,).
        pos: position of the first.
        keep: percent to be computed.

    Returns:
        F32 (n_tokens, 4): place from 0 to 1, the squashed share, its rank from 0 (most) to 1,
        and the part that is left out.
    """
    n = len(attention)
    rank = np.empty(n, np.float32)
    rank[np.argsort(-attention, kind="stable")] = np.arange(n, dtype=np.float32) / np.float32(n)
    place = np.arange(pos + 1, pos + n + 1) / (pos + n)
    left_out = np.full(n, 1 - keep / 100)
    return np.stack([place, np.tanh(attention), rank, left_out], axis=1).astype(np.float32)


def scores(rule: TokenRule, known: Floats) -> Floats:
    """Score tokens by their factors, F32 (n_tokens, 4), before noise and force: (n_tokens,)."""
    inner = known @ rule.hidden.T + rule.bias
    found: Floats = (inner / (1 + np.exp(-inner))) @ rule.out
    return found


def choose(
    rule: TokenRule, attention: Floats, keep: int, *, pos: int = 0, n_out: int = 1
) -> Numbers:
    """Choose the tokens of one pass that a layer computes.

    Args:
        rule: scores them.
        attention: as `factors` takes it.
        keep: percent to be computed.
        pos: position of the first.
        n_out: tokens at the end whose logits are wanted.

    Returns:
        Their numbers, ascending.
    """
    n = len(attention)
    n_kept = rule.n_kept(n, keep, n_out)
    if n_kept is None:
        return np.arange(n)
    score = rule.forced(pos, n, n_out)
    if rule.looks:
        score = score + scores(rule, factors(attention, pos, keep))
    return np.sort(np.argsort(-score, kind="stable")[:n_kept])
