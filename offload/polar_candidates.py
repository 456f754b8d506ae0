"""The adapters that a router chooses among: what is learned of each, and what paging it takes.

Everything is kept in arrays by the rows of the bandit, whose last row moves when one is removed.
"""

import math
from collections.abc import Collection, Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edgeroute.offload.linucb import Arm, LinUCB
from edgeroute.offload.polar_state import SavedArm
from edgeroute.runtime.errors import UsageError

Vector = NDArray[np.float64]
MAX_NAME_CHARS: Final = 255
_TIE: Final = 1e-9  # of a reward: below any difference that was learned


class Candidates:
    """Candidates by name, and None for the base model. Not thread-safe.

    Args:
        bandit: empty; what is learned of them, and their rows.
        utility_per_s: reward that a second of paging is worth.
        seed: of the order in which adapters equally good are tried.
    """

    def __init__(self, bandit: LinUCB, utility_per_s: float, seed: int) -> None:
        self.bandit = bandit
        self.utility_per_s = utility_per_s
        self._rng = np.random.default_rng(seed)
        self._identities: dict[str, str] = {}
        self.cost_s: Vector = np.zeros(0)
        """What paging each is expected to take; 0 for the base model."""
        self.owed: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        """Plays that each still has to get, whatever its score."""
        self.tie: Vector = np.zeros(0)
        """What decides between scores that are equal."""

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in the order in which they were added."""
        return tuple(self._identities)

    def __contains__(self, name: object) -> bool:
        return name in self._identities

    def add(self, name: str, load_s: float, identity: str, n_owed: int) -> None:
        """Add an adapter that nothing is known of.

        Raises:
            UsageError: the name is a candidate's or not a name, or load_s not a duration.
        """
        if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME_CHARS:
            raise UsageError(f"an adapter's name has 1 to {MAX_NAME_CHARS} characters: {name!r}")
        cost_s = _seconds(name, load_s)
        self.restore(SavedArm(name=name, identity=identity, cost_s=cost_s), n_owed)

    def restore(self, saved: SavedArm, n_owed: int) -> None:
        """Add an adapter, or the base model, with what is known of it.

        Plays are owed to an adapter of which nothing was learned.

        Raises:
            UsageError: it is a candidate.
        """
        arm = saved.name
        self.bandit.add(arm, saved.statistics)
        owed = n_owed if arm is not None and saved.statistics is None else 0
        self.cost_s = np.append(self.cost_s, saved.cost_s)
        self.owed = np.append(self.owed, owed)
        self.tie = np.append(self.tie, _TIE * self._rng.random())
        if arm is not None:
            self._identities[arm] = saved.identity

    def remove(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            UsageError: there is no such adapter.
        """
        self._row(name)
        row, last = self.bandit.remove(name), len(self.cost_s) - 1
        for array in (self.cost_s, self.owed, self.tie):
            array[row] = array[last]
        self.cost_s, self.owed = self.cost_s[:last].copy(), self.owed[:last].copy()
        self.tie = self.tie[:last].copy()
        del self._identities[name]

    def costs(self, resident: Iterable[str]) -> Vector:
        """Paging cost per row in reward units; more than the best reward never matters."""
        costs = np.minimum(self.cost_s * self.utility_per_s, 1.0)
        rows = [self.bandit.row(name) for name in (None, *resident)]
        costs[[row for row in rows if row is not None]] = 0.0
        return costs

    def paid(self, name: str, seconds: float, weight: float) -> None:
        """Enter what paging an adapter just took, at a weight of 0 to 1 against what was known.

        Raises:
            UsageError: there is no such adapter, or `seconds` is not a duration.
        """
        row = self._row(name)
        self.cost_s[row] += weight * (_seconds(name, seconds) - self.cost_s[row])

    def owe(self, plays: NDArray[np.int64]) -> None:
        """Owe each that many plays, I64 (n_rows,); the base model is never owed any."""
        self.owed = plays
        base = self.bandit.row(None)
        if base is not None:
            self.owed[base] = 0

    def saved(self) -> tuple[SavedArm, ...]:
        """Copy what is known of each."""
        return tuple(
            SavedArm(
                name=arm,
                identity="" if arm is None else self._identities[arm],
                cost_s=float(self.cost_s[row]),
                statistics=self.bandit.statistics(arm),
            )
            for row, arm in enumerate(self.bandit.names)
        )

    def stats(self, resident: Collection[Arm]) -> dict[str, object]:
        """What is known of each adapter, by name."""
        plays, costs_s = self.bandit.n_plays, self.cost_s
        n_rows = min(len(plays), len(costs_s))
        return {
            name: {
                "n_plays": float(plays[row]),
                "paging_s": float(costs_s[row]),
                "resident": name in resident,
            }
            for name in list(self._identities)  # other threads may ask for these figures
            if (row := self.bandit.row(name)) is not None and row < n_rows
        }

    def _row(self, name: str) -> int:
        row = self.bandit.row(name) if name is not None else None
        if row is None:
            raise UsageError(f"there is no adapter {name!r} among the router's candidates")
        return row


def _seconds(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating):
        raise UsageError(f"the paging time of {name!r} is a number of seconds, not {value!r}")
    if not 0.0 <= value < math.inf:
        raise UsageError(f"the paging time of {name!r} is 0 s or more, not {value}")
    return float(value)
