"""Closed forms for stand-ins: which neurons stay, their new down projection, low-rank maps.

Every sum over tokens is weighted. The weights make an error count by its share of the
residual stream it lands on, since the next norm divides by the stream's size, and leave
position 0 out, whose state no linear map should try to explain.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.tools.convert.moe_activations import Array
from edgeroute.tools.standin_records import STRENGTHS

Ints = npt.NDArray[np.int64]

HUGE_STATE: Final = 4.0
"""Times other tokens' states."""

FIRST_STATE_MARGIN: Final = 0.1
"""Of the state's size, more than other tokens' change."""

_FLOOR: Final = 0.01
_TINY: Final = 1e-20


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Tokens to fit to, or to judge by.

    Attributes:
        inputs: (n_tokens, n_in).
        targets: (n_tokens, n_embd).
        weights: of the tokens (n_tokens,), zero for those left out.
    """

    inputs: Array
    targets: Array
    weights: Array

    def where(self, columns: Ints) -> "Sample":
        """Keep some of the inputs."""
        return Sample(inputs=self.inputs[:, columns], targets=self.targets, weights=self.weights)


def token_weights(stream: Array, n_window: int) -> Array:
    """Weigh tokens by one over the power of their residual stream, mean 1, position 0 by zero.

    Args:
        stream: (n_tokens, n_embd), whole windows.
        n_window: tokens of a window.
    """
    power = np.einsum("ij,ij->i", stream, stream) / np.float32(stream.shape[1])
    weights: Array = 1 / np.maximum(power, np.float32(_TINY))
    weights[::n_window] = 0
    mean = float(weights.sum()) / max(1, int(np.count_nonzero(weights)))
    weights /= np.float32(max(mean, _TINY))
    return weights


def makes_first_state(stream: Array, added: Array, n_window: int) -> bool:
    """Whether a sub-block makes or removes the huge state that models keep at position 0.

    All later tokens attend to that state, and a stand-in adds nothing there: such a sub-block
    must run. Others change position 0 no more than the rest, in proportion.

    Args:
        stream: (n_tokens, n_embd), whole windows.
        added: what the sub-block adds to it.
        n_window: tokens of a window.
    """
    others = np.delete(np.arange(len(stream)), np.s_[::n_window])
    sizes = [np.linalg.norm(x, axis=1) for x in (stream, stream + added)]
    huge = [float(x[::n_window].mean()) > HUGE_STATE * float(np.median(x[others])) for x in sizes]
    ratios = np.linalg.norm(added, axis=1) / np.maximum(sizes[0], _TINY)
    excess = float(ratios[::n_window].mean()) - float(np.median(ratios[others]))
    return any(huge) and excess > FIRST_STATE_MARGIN


def error_ratio(sample: Sample, outputs: Array) -> float:
    """Return what a stand-in leaves unexplained: its squared error over that of a constant.

    1 is the best constant vector; 0 is perfect.
    """
    w = sample.weights[:, None]
    mean = (w * sample.targets).sum(axis=0) / np.float32(max(float(w.sum()), _TINY))
    lost = float((w * (sample.targets - outputs) ** 2).sum())
    return lost / max(float((w * (sample.targets - mean) ** 2).sum()), _TINY)


def by_energy(acts: Array, weights: Array, down: Array) -> Ints:
    """Order neurons by what they put into the output on average, most first.

    Args:
        acts: activations (n_tokens, n_ff).
        weights: of the tokens (n_tokens,).
        down: down projection (n_ff, n_embd).
    """
    power = np.einsum("ij,ij,i->j", acts, acts, weights, optimize=False)
    return np.argsort(-power * np.einsum("ij,ij->i", down, down), kind="stable")


class Ridge:
    """Weighted least squares with a ridge towards a start, for several strengths.

    Solved in tokens where there are fewer of them than inputs.

    Args:
        sample: tokens to fit to.
        start: (n_in, n_embd), where the ridge pulls to.
    """

    def __init__(self, sample: Sample, start: Array) -> None:
        self._start = start
        root = np.sqrt(sample.weights / np.float32(len(sample.weights)))[:, None]
        used = np.flatnonzero(sample.weights)
        self._inputs: Array = (sample.inputs * root)[used]
        self._missing: Array = ((sample.targets - sample.inputs @ start) * root)[used]
        self._power: Array = np.einsum("ij,ij->j", self._inputs, self._inputs)

    def solve(self, strength: float) -> Array:
        """Return the map (n_in, n_embd)."""
        power = self._power
        pull = np.float32(strength) * power + np.float32(_FLOOR) * power.mean() + np.float32(_TINY)
        inputs, missing = self._inputs, self._missing
        change: Array
        if len(inputs) < len(power):
            scaled = inputs / np.sqrt(pull)
            products = scaled @ scaled.T
            products[np.diag_indices(len(products))] += 1
            change = (scaled.T @ np.linalg.solve(products, missing)) / np.sqrt(pull)[:, None]
        else:
            products = inputs.T @ inputs
            products[np.diag_indices(len(products))] += pull
            change = np.linalg.solve(products, inputs.T @ missing)
        return self._start + change

    def best(self, check: Sample, strengths: tuple[float, ...] = STRENGTHS) -> tuple[Array, float]:
        """Return the map that is best on tokens kept apart, and its strength."""
        found = [(self.solve(strength), strength) for strength in strengths]
        if len(found) == 1:
            return found[0]
        return min(found, key=lambda pair: error_ratio(check, check.inputs @ pair[0]))

    def split(self, linear: Array, rank: int) -> tuple[Array, Array]:
        """Split a fitted map of the first inputs in two that lose least of its outputs.

        Args:
            linear: (n, n_embd), of the first n inputs.
            rank: at most n_embd.

        Returns:
            a (n, rank) and b (rank, n_embd), whose product is closest to `linear` on such inputs.
        """
        outputs = self._inputs[:, : len(linear)] @ linear
        return reduce_rank(linear, outputs.T @ outputs, rank)


def reduce_rank(linear: Array, power: Array, rank: int) -> tuple[Array, Array]:
    """Split a map (n_in, n_out) in two, given its outputs' second moments (n_out, n_out)."""
    _, vectors = np.linalg.eigh(power.astype(np.float64))
    kept = np.ascontiguousarray(vectors[:, ::-1][:, :rank]).astype(np.float32)
    return linear @ kept, np.ascontiguousarray(kept.T)
