"""The gate: one matrix per layer that predicts how much each expert would contribute."""

from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.tools.convert.moe_activations import ROWS_AT_ONCE, Array

Mask = npt.NDArray[np.bool_]

SCORE_SCALE: Final = 3e-4
"""Gate scores are scaled to this standard deviation. The softmax over the experts is then
uniform to a thousandth, as the folded factors need, and float32 still ranks all but ties."""

RIDGE: Final = 1e-3
"""Of the mean power of the gate's inputs."""


def contributions(h: Array, down: Array, n_expert: int) -> Array:
    """Return the norm of each expert's output: (n_tokens, n_expert).

    Args:
        h: activations of the routed neurons, expert after expert (n_tokens, n_routed).
        down: their columns of the down projection (n_embd, n_routed).
        n_expert: how many.
    """
    width = h.shape[1] // n_expert
    found = np.empty((len(h), n_expert), np.float32)
    for expert in range(n_expert):
        mine = np.s_[expert * width : (expert + 1) * width]
        gram = down[:, mine].T @ down[:, mine]
        for at in range(0, len(h), ROWS_AT_ONCE):
            part = h[at : at + ROWS_AT_ONCE, mine]
            squares = np.einsum("ij,ij->i", part @ gram, part)
            found[at : at + ROWS_AT_ONCE, expert] = np.sqrt(np.maximum(squares, 0))
    return found


def fit_gate(u: Array, targets: Array) -> Array:
    """Fit a gate by ridge regression without a bias.

    Args:
        u: normed inputs of the layer (n_tokens, n_embd).
        targets: what to predict, up to a constant per token (n_tokens, n_expert).

    Returns:
        The gate (n_expert, n_embd); its scores deviate by SCORE_SCALE from a token's mean.
    """
    wide = u.astype(np.float64)
    centred = targets - targets.mean(axis=1, keepdims=True)
    gram = wide.T @ wide
    gram[np.diag_indices_from(gram)] += RIDGE * np.trace(gram) / len(gram)
    gate = np.linalg.solve(gram, wide.T @ centred).T
    deviation = float(np.std(wide @ gate.T))
    return (gate * (SCORE_SCALE / max(deviation, 1e-30))).astype(np.float32)


def choose(scores: Array, n_used: int) -> Mask:
    """Mark the `n_used` highest scores of each token: bool (n_tokens, n_expert)."""
    mask = np.zeros(scores.shape, np.bool_)
    if n_used == scores.shape[1]:
        return ~mask
    best = np.argpartition(-scores, n_used - 1, axis=1)[:, :n_used]
    np.put_along_axis(mask, best, True, axis=1)
    return mask
