"""Linear rewards learned per named arm, with confidence widths: disjoint LinUCB.

Each arm has a ridge regression of its own; only the arm that was played learns. The arms'
matrices are stacked, so that scoring a thousand of them is two matrix-vector products.

Source: Li, Chu, Langford, Schapire, "A contextual-bandit approach to personalized news
article recommendation", WWW 2010, algorithm 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeroute.runtime.errors import UsageError

MAX_D: Final = 32
MAX_ARMS: Final = 1 << 14

Arm = str | None
"""An adapter's name; None is the base model without an adapter."""
Vector = NDArray[np.float64]
_FIRST_ROOM: Final = 8


class ArmScores(NamedTuple):
    """Predicted reward and confidence width of every arm for one context, F64 (n_arms,)."""

    means: Vector
    widths: Vector


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmStatistics:
    """One arm's sums: A F64 (d, d) without the ridge, b F64 (d,), and how many plays."""

    gram: Vector
    moment: Vector
    n_plays: float


class LinUCB:
    """Ridge regressions of the arms' rewards on contexts F64 (d,). Not thread-safe.

    The inverse of A = ridge × I + Σxxᵀ follows each play by a rank-one update (Sherman and
    Morrison, 1950) and is computed afresh every `reinvert_every` plays of an arm, so that
    rounding cannot add up.

    Raises:
        UsageError: d is not 1 to MAX_D, or the ridge is not positive and finite.
    """

    def __init__(self, d: int, ridge: float = 1.0, reinvert_every: int = 256) -> None:
        if not 1 <= d <= MAX_D:
            raise UsageError(f"a context has 1 to {MAX_D} features, not {d}")
        if not (0 < ridge < np.inf) or reinvert_every < 1:
            raise UsageError(f"ridge {ridge} or reinvert_every {reinvert_every} is not positive")
        self.d = d
        self.ridge = float(ridge)
        self.reinvert_every = reinvert_every
        self._rows: dict[Arm, int] = {}
        self._names: list[Arm] = []
        self._reserve(_FIRST_ROOM)

    def _reserve(self, room: int) -> None:
        n, d = len(self._names), self.d
        fresh: dict[str, Vector] = {
            "_gram": np.zeros((room, d, d)), "_inverse": np.zeros((room, d, d)),
            "_moment": np.zeros((room, d)), "_theta": np.zeros((room, d)),
            "_n_plays": np.zeros(room), "_since": np.zeros(room),
        }  # fmt: skip
        for name, array in fresh.items():
            if n:
                array[:n] = getattr(self, name)[:n]
            setattr(self, name, array)

    _gram: Vector
    _inverse: Vector
    _moment: Vector
    _theta: Vector
    _n_plays: Vector
    _since: Vector

    @property
    def names(self) -> Sequence[Arm]:
        """The arms in the order of every array returned here; removal moves the last one."""
        return self._names

    @property
    def n_plays(self) -> Vector:
        """Rewards learned per arm, F64 (n_arms,), less what was forgotten. Do not write."""
        return self._n_plays[: len(self._names)]

    def row(self, arm: Arm) -> int | None:
        """An arm's place in the arrays, None where there is no such arm."""
        return self._rows.get(arm)

    def add(self, arm: Arm, known: ArmStatistics | None = None) -> int:
        """Add an arm that knows nothing, or what `known` says, and return its row.

        Raises:
            UsageError: there is such an arm, there are MAX_ARMS, or `known` is of another d.
        """
        if arm in self._rows:
            raise UsageError(f"there is an arm {arm!r} already; remove it first")
        if len(self._names) >= MAX_ARMS:
            raise UsageError(f"{MAX_ARMS} arms are the most; remove one before adding {arm!r}")
        if known is not None and known.gram.shape != (self.d, self.d):
            raise UsageError(f"{arm!r} was learned with {len(known.gram)} features, not {self.d}")
        row = len(self._names)
        if row == len(self._gram):
            self._reserve(2 * row)
        self._rows[arm] = row
        self._names.append(arm)
        self._gram[row] = 0 if known is None else known.gram
        self._moment[row] = 0 if known is None else known.moment
        self._n_plays[row] = 0 if known is None else known.n_plays
        self._solve(row)
        return row

    def remove(self, arm: Arm) -> int:
        """Forget an arm; the last one takes its row, which is returned.

        Raises:
            UsageError: there is no such arm.
        """
        row = self._known(arm)
        last = len(self._names) - 1
        for array in (self._gram, self._inverse, self._moment, self._theta, self._n_plays,
                      self._since):  # fmt: skip
            array[row] = array[last]
        self._names[row] = self._names[last]
        self._rows[self._names[row]] = row
        self._names.pop()
        del self._rows[arm]
        return row

    def score(self, x: Vector) -> ArmScores:
        """Predict every arm's reward in context x F64 (d,), and how uncertain that is.

        The width is √(xᵀA⁻¹x); the upper bound of algorithm 1 is mean + alpha × width.
        """
        n, d = len(self._names), self.d
        projected = (self._inverse[:n].reshape(n * d, d) @ x).reshape(n, d)
        return ArmScores(self._theta[:n] @ x, np.sqrt(np.maximum(projected @ x, 0.0)))

    def means(self, contexts: Vector) -> Vector:
        """Predict every arm's reward, F64 (n_contexts, n_arms), in contexts (n_contexts, d)."""
        return contexts @ self._theta[: len(self._names)].T

    def predict(self, row: int, x: Vector) -> float:
        """Predict one arm's reward in context x F64 (d,)."""
        return float(self._theta[row] @ x)

    def learn(self, arm: Arm, x: Vector, reward: float) -> None:
        """Enter the reward that an arm got in context x F64 (d,).

        Raises:
            UsageError: there is no such arm.
        """
        row = self._known(arm)
        self._gram[row] += np.outer(x, x)
        self._moment[row] += reward * x
        self._n_plays[row] += 1
        self._since[row] += 1
        if self._since[row] >= self.reinvert_every:
            self._solve(row)
            return
        inverse = self._inverse[row]
        ax = inverse @ x
        inverse -= np.outer(ax, ax / (1.0 + x @ ax))
        self._theta[row] = inverse @ self._moment[row]

    def forget(self, keep: float) -> None:
        """Weigh all that was learned by `keep`, 0 to 1: the ridge counts in full again."""
        n = len(self._names)
        for array in (self._gram, self._moment, self._n_plays):
            array[:n] *= keep
        for row in range(n):
            self._solve(row)

    def statistics(self, arm: Arm) -> ArmStatistics:
        """Copy what an arm has learned.

        Raises:
            UsageError: there is no such arm.
        """
        row = self._known(arm)
        return ArmStatistics(gram=self._gram[row].copy(), moment=self._moment[row].copy(),
                             n_plays=float(self._n_plays[row]))  # fmt: skip

    def drift(self, arm: Arm) -> float:
        """Largest entry of A × A⁻¹ - I: what rank-one updates have lost since `_solve`.

        Raises:
            UsageError: there is no such arm.
        """
        row = self._known(arm)
        identity = np.eye(self.d)
        full = self._gram[row] + self.ridge * identity
        return float(np.abs(full @ self._inverse[row] - identity).max())

    def _known(self, arm: Arm) -> int:
        row = self._rows.get(arm)
        if row is None:
            raise UsageError(f"there is no arm {arm!r} among the router's {len(self._names)}")
        return row

    def _solve(self, row: int) -> None:
        """Invert an arm's matrix afresh."""
        inverse = np.linalg.inv(self._gram[row] + self.ridge * np.eye(self.d))
        self._inverse[row] = (inverse + inverse.T) / 2
        self._theta[row] = self._inverse[row] @ self._moment[row]
        self._since[row] = 0
