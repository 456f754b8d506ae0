"""A trial of the two ways to serve what a device misses: windows of steps, in turn."""

from dataclasses import dataclass
from statistics import median
from typing import Final

from edgeroute.offload.miss_counts import Step
from edgeroute.runtime.errors import UsageError

HOPELESS_STEPS: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialParams:
    """How the ways are told apart.

    A trial runs `n_rounds` pairs of windows, the present way and then the other. Steps that
    turn the cache over, up to `max_skip_steps` of a window, do not count, `window_steps` after
    them do. A window ends early where its steps cost `stop_ratio` times the other way's, and a
    trial after a pair of windows whose steps differ by `clear_ratio`.

    Raises:
        UsageError: a value outside its range.
    """

    window_steps: int = 4
    max_skip_steps: int = 4
    n_rounds: int = 2
    stop_ratio: float = 2.0
    clear_ratio: float = 1.15

    def __post_init__(self) -> None:
        good = self.window_steps >= 1 and self.max_skip_steps >= 0 and self.n_rounds >= 1
        if not good or self.stop_ratio <= 1 or self.clear_ratio <= 1:
            raise UsageError(f"miss gate settings contradict each other: {self}")


class Trial:
    """Says which way each step goes, and keeps what it cost.

    Attributes:
        computing: the way of the step at work.
        costs: seconds of the steps that count, by way, and `steps` what they missed.
    """

    def __init__(self, present: bool, n_skip: int, params: TrialParams) -> None:
        self._present, self._n_skip, self._params = present, n_skip, params
        self.computing = present
        self.costs: dict[bool, list[float]] = {False: [], True: []}
        self.steps: dict[bool, list[Step]] = {False: [], True: []}
        self._window = self._position = self._n_dear = 0

    def end_step(self, seconds: float, step: Step) -> bool:
        """Enter a step of the way it was on; True when the trial is over."""
        params, other = self._params, self.costs[not self.computing]
        # What the window before left in the cache is still there at the very beginning.
        n_skip = self._n_skip if self._window else 0
        self._position += 1
        counts = self._position > n_skip
        most = params.stop_ratio if counts else 2 * params.stop_ratio
        dear = bool(other) and seconds > most * median(other)
        self._n_dear = self._n_dear + 1 if dear else 0
        hopeless = self._n_dear >= HOPELESS_STEPS
        if counts or hopeless:
            self.costs[self.computing].append(seconds)
            self.steps[self.computing].append(step)
        if not hopeless and self._position < n_skip + params.window_steps:
            return False
        self._position = self._n_dear = 0
        self._window += 1
        self.computing = self._present ^ bool(self._window % 2)
        return hopeless or self._window >= 2 * params.n_rounds or self._is_clear()

    def _is_clear(self) -> bool:
        """Whether a round of both ways has told them apart already."""
        if self._window % 2:
            return False
        one, other = median(self.costs[False]), median(self.costs[True])
        return max(one, other) > self._params.clear_ratio * min(one, other)
