"""Least-squares repair of a down projection for the neurons that routing leaves."""

from typing import Final

import numpy as np

from edgeroute.tools.convert.moe_activations import ROWS_AT_ONCE, Array

RIDGE: Final = 1e-2
"""Pull towards the original projection, of the mean power of the neurons that run."""


def refit(h: Array, target: Array, down: Array, weights: Array) -> Array:
    """Return the down projection closest to `target` on these tokens.

    Minimises the weighted squared error of D h against the target over D, and RIDGE times
    the distance of D from the original.

    Args:
        h: activations with those of the experts not chosen set to zero (n_tokens, n_ff).
        target: outputs wanted (n_tokens, n_embd).
        down: the original projection (n_embd, n_ff).
        weights: of each token (n_tokens,).
    """
    n_ff = h.shape[1]
    gram = np.zeros((n_ff, n_ff), np.float32)
    cross = np.zeros((n_ff, len(down)), np.float32)
    root = np.sqrt(weights)[:, None]
    for at in range(0, len(h), ROWS_AT_ONCE):
        part = np.s_[at : at + ROWS_AT_ONCE]
        a = h[part] * root[part]
        gram += a.T @ a
        cross += a.T @ ((target[part] - h[part] @ down.T) * root[part])
    diagonal = np.diag_indices(n_ff)
    gram[diagonal] += RIDGE * float(np.mean(gram[diagonal]))
    return down + np.linalg.solve(gram, cross).T
