"""Which tokens of a prompt a pruned layer computes: how many, which always, by what score.

A record that policies make (skippers/) and graphs execute (models/).
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.errors import UsageError

Floats = npt.NDArray[np.float32]

N_FACTORS: Final = 4
"""Position, attention received, rank of that, share left out. Source: FTP, arXiv 2412.11494."""
FORCED: Final = 1e9
"""Added to the score of a token that is kept in any case: far above any score."""
MAX_HIDDEN: Final = 1024
MIN_TOKENS: Final = 128
"""Passes over fewer tokens are computed whole: choosing would cost what it saves."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenRule:
    """A score of four factors by a small network that all layers share, and who needs none.

    score = out · silu(hidden · factors + bias) + noise; tokens of the highest scores are kept.

    Attributes:
        hidden: F32 (n_hidden, 4).
        bias: F32 (n_hidden,).
        out: F32 (n_hidden,); where all are zero, nobody looks at attention.
        n_first: tokens kept from the start of a sequence, where models park attention.
        n_recent: tokens kept from the end of a pass.
        n_probe: tokens at the end of a pass whose attention is looked at.
        noise: standard deviation of a random part of the score, for controls.
        seed: of the random part.

    Raises:
        UsageError: the network's shapes do not fit, or a number is not finite or in bounds.
    """

    hidden: Floats
    bias: Floats
    out: Floats
    n_first: int = 4
    n_recent: int = 32
    n_probe: int = 32
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        n = len(self.bias) if self.bias.ndim == 1 else 0
        shapes = (self.hidden.shape, self.bias.shape, self.out.shape)
        if not 0 < n <= MAX_HIDDEN or shapes != ((n, N_FACTORS), (n,), (n,)):
            raise UsageError(
                f"a token rule's network has the shapes {shapes}; (n, {N_FACTORS}), (n,) and (n,) "
                f"are wanted, n up to {MAX_HIDDEN}"
            )
        numbers = (self.hidden, self.bias, self.out, np.float32(self.noise))
        good = all(each.dtype == np.float32 and np.isfinite(each).all() for each in numbers)
        if not good or self.noise < 0:
            raise UsageError("a token rule's numbers must be finite and of single precision, its "
                             "noise not negative")  # fmt: skip
        for name in ("n_first", "n_recent", "n_probe"):
            if not 1 <= getattr(self, name) <= MIN_TOKENS:
                raise UsageError(
                    f"{name} of a token rule is {getattr(self, name)}, outside 1 to {MIN_TOKENS}"
                )

    @property
    def looks(self) -> bool:
        """Whether the score depends on the factors."""
        return bool(self.out.any())

    def n_kept(self, n_tokens: int, keep: int, n_out: int) -> int | None:
        """Count the tokens that a pass over `n_tokens` computes; None where it computes all.

        Args:
            n_tokens: tokens of the pass.
            keep: percent to be computed, 1 to 100.
            n_out: tokens at its end whose logits are wanted.
        """
        if keep >= 100 or n_tokens < MIN_TOKENS:
            return None
        forced = self.n_first + max(self.n_recent, n_out)
        n = max(math.ceil(keep * n_tokens / 100), forced)
        return n if n < n_tokens else None

    def forced(self, pos: int, n_tokens: int, n_out: int) -> Floats:
        """Return what is added to the scores of a pass from `pos` on: F32 (n_tokens,)."""
        found = np.zeros(n_tokens, np.float32)
        if self.noise:
            draw = np.random.default_rng((self.seed, pos)).normal(0.0, self.noise, n_tokens)
            found += draw.astype(np.float32)
        found[: max(0, self.n_first - pos)] = FORCED
        found[n_tokens - max(self.n_recent, n_out) :] = FORCED
        return found


def ranked_rule(position: float = 0.0, attention: float = 0.0, rank: float = -1.0) -> TokenRule:
    """Return the rule whose score is a weighted sum of factors; by itself, attention's rank.

    A linear map in closed form: silu(t) - silu(-t) = t.
    """
    row = np.array([position, attention, rank, 0.0], np.float32)
    return TokenRule(
        hidden=np.stack([row, -row]), bias=np.zeros(2, np.float32),
        out=np.array([1.0, -1.0], np.float32),
    )  # fmt: skip


BY_ATTENTION: Final = ranked_rule()
"""The static rule of FTP: tokens by the rank of the attention they receive."""
