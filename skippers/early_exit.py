"""Early exit: a token is taken from a middle layer where the head is sure enough there.

Looking costs a pass through the head, so a rule pauses after a look in vain, and `ExitCosts`
tells whether exits come often enough. Thresholds are calibrated: see `threshold_for`.
"""

from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.errors import UsageError

Measure = Literal["top", "margin"]
"""The likeliest token's probability, or how far it is above the second's."""

MEASURES: Final[tuple[Measure, ...]] = get_args(Measure)
MAX_PAUSE: Final = 1 << 16
Floats = npt.NDArray[np.floating]


def confidence(logits: Floats, measure: Measure) -> npt.NDArray[np.float64]:
    """Measure how sure a model is of its next token.

    Args:
        logits: (n, n_vocab), n_vocab at least 2.
        measure: by what.

    Returns:
        Numbers from 0 to 1, (n,); 0 where a logit is not finite.
    """
    rows = np.asarray(logits, np.float64)
    good = np.isfinite(rows).sum(axis=1, keepdims=True) == rows.shape[1]
    rows = np.where(good, rows, 0.0)
    share = np.exp(rows - rows.max(axis=1, keepdims=True))
    share /= share.sum(axis=1, keepdims=True)
    second, first = np.partition(share, -2, axis=1)[:, -2:].T
    found = first if measure == "top" else first - second
    return np.where(good[:, 0], found, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitRule:
    """When a token leaves early.

    Attributes:
        layer: layers computed before the look; at least 1.
        threshold: confidence from which on it leaves, from 0 to 1; above 1 it never does.
        measure: see `Measure`.
        n_pause: tokens after a look in vain that are computed without one.

    Raises:
        UsageError: a number is out of bounds.
    """

    layer: int
    threshold: float
    measure: Measure = "top"
    n_pause: int = 0

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise UsageError(
                f"confidence is measured by {' or '.join(MEASURES)}, not {self.measure!r}"
            )
        if self.layer < 1 or not 0 <= self.threshold <= 2 or not 0 <= self.n_pause <= MAX_PAUSE:
            raise UsageError(
                f"{self} is out of bounds: a layer from 1, a threshold from 0 to 2 and a pause of "
                f"0 to {MAX_PAUSE} tokens are wanted"
            )


class ExitGate:
    """One sequence's exits: whether to look, and whether what was seen suffices."""

    def __init__(self, rule: ExitRule) -> None:
        self.rule = rule
        self._pause = 0

    def looks(self) -> bool:
        """Tell whether the next token is looked at; called once per token."""
        if self._pause:
            self._pause -= 1
            return False
        return True

    def leaves(self, logits: Floats) -> bool:
        """Judge what the head said in the middle, (n_vocab,)."""
        rule = self.rule
        sure = bool(confidence(logits[None], rule.measure)[0] >= rule.threshold)
        self._pause = 0 if sure else rule.n_pause
        return sure


def threshold_for(sureness: Floats, kl: Floats, max_kl: float) -> float | None:
    """Return the lowest threshold that keeps a promise on the text it is measured on.

    Args:
        sureness: confidence in the middle, (n_tokens,).
        kl: what leaving there costs each token, in nats, (n_tokens,).
        max_kl: promised mean over all tokens, those that stay costing nothing.

    Returns:
        The threshold; None where no token could leave.
    """
    order = np.argsort(-sureness, kind="stable")
    ranked = sureness[order]
    cost = np.cumsum(kl[order]) / len(kl)
    ends = np.append(ranked[1:] != ranked[:-1], True)  # equals leave together
    good = np.flatnonzero((cost <= max_kl) & ends)
    return float(ranked[good[-1]]) if len(good) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitCosts:
    """Seconds of a token's parts: all at once, the layers before the look, the look itself, the
    keys that later layers store for a token that left, and the rest of one that stayed."""

    whole_s: float
    before_s: float
    look_s: float
    keys_s: float
    rest_s: float

    def speed(self, exit_ratio: float) -> float:
        """Return the speed over computing everything, if every token is looked at."""
        after = exit_ratio * self.keys_s + (1 - exit_ratio) * self.rest_s
        return self.whole_s / (self.before_s + self.look_s + after)

    @property
    def break_even(self) -> float:
        """Share of tokens that must leave for looking to pay; above 1 it never does."""
        spent = self.before_s + self.look_s + self.rest_s - self.whole_s
        return spent / max(1e-12, self.rest_s - self.keys_s)
