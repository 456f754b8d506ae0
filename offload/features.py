"""What the router sees of a prompt: a few fixed features of its pooled token embeddings.

Nothing is fitted, so that what was learned yesterday means the same today: a projection
drawn from a seed, a bias, and how long the prompt is.
"""

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edgeroute.offload.linucb import MAX_D
from edgeroute.runtime.errors import UsageError

Vector = NDArray[np.float64]
N_FIXED: Final = 2  # features that are not of the projection: length and bias
_LONGEST: Final = 8192  # tokens; longer prompts are all as long
_LENGTH_STEPS: Final = 8


class PromptFeatures:
    """Projects pooled embeddings F32 or F64 (n_embd,) to contexts F64 (d,).

    The first d - 2 features are the pooled embedding, less `centre`, in random orthonormal
    directions, scaled to norm 1: random projection keeps angles nearly as they are (Johnson
    and Lindenstrauss, 1984). Then comes the length bucket, 0 to 1, and the bias, 1.

    Args:
        n_embd: width of the embeddings.
        d: features in all, 3 to MAX_D.
        seed: of the directions; part of what a saved router must have in common.
        centre: mean of the model's token embeddings, F (n_embd,). Pooled embeddings all
            point much the same way; what tells prompts apart is what is left without it.

    Raises:
        UsageError: a size out of range, or a centre of another shape or not finite.
    """

    def __init__(
        self, n_embd: int, d: int, seed: int = 0, centre: NDArray[np.floating] | None = None
    ) -> None:
        if not N_FIXED < d <= MAX_D or not d - N_FIXED <= n_embd <= 1 << 20:
            raise UsageError(
                f"{d} features of embeddings of {n_embd}: there can be 3 to {MAX_D}, and two "
                "more than the width at most"
            )
        self.n_embd, self.d, self.seed = n_embd, d, seed
        self._centre = np.zeros(n_embd) if centre is None else self._finite(centre)
        drawn = np.random.default_rng(seed).standard_normal((n_embd, d - N_FIXED))
        self._directions = np.ascontiguousarray(np.linalg.qr(drawn)[0].T)

    def __call__(self, pooled: NDArray[np.floating], n_tokens: int) -> Vector:
        """Return a prompt's context, F64 (d,), of norm at most √3.

        Args:
            pooled: mean of its token embeddings, F (n_embd,).
            n_tokens: its length.

        Raises:
            UsageError: `pooled` has another shape or is not finite, or there is no token.
        """
        if n_tokens < 1:
            raise UsageError(f"a prompt of {n_tokens} tokens has no features")
        projected = self._directions @ (self._finite(pooled) - self._centre)
        norm = float(np.linalg.norm(projected))
        x = np.ones(self.d)
        x[:-N_FIXED] = projected / norm if norm > 0 else 0.0
        x[-2] = length_bucket(n_tokens)
        return x

    def _finite(self, values: NDArray[np.floating]) -> Vector:
        found = np.asarray(values, dtype=np.float64)
        if found.shape != (self.n_embd,) or not np.isfinite(found).all():
            raise UsageError(
                f"an embedding has {self.n_embd} finite values, not the shape {found.shape}"
                if found.shape != (self.n_embd,)
                else "an embedding has values that are not finite"
            )
        return found


def length_bucket(n_tokens: int) -> float:
    """Place a length on a scale 0 to 1: each doubling-and-a-half a step, 8192 tokens its end."""
    position = math.log(min(n_tokens, _LONGEST)) / math.log(_LONGEST)
    return round(position * _LENGTH_STEPS) / _LENGTH_STEPS
