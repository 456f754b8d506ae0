"""How a remote model fares: whether to call it at all, and what a call takes."""

import threading
import time
from collections.abc import Callable
from typing import Final

RETRY_S: Final = 5.0
"""After a first failure; doubled after each further one."""
MAX_RETRY_S: Final = 60.0
WEIGHT: Final = 0.2
"""Of the newest measurement in a moving mean."""


class Health:
    """A circuit breaker and two moving means; any thread may use them.

    After a failure nobody calls for RETRY_S, so that the local model goes on at full pace.
    Then one call is the trial: a success closes the circuit, a failure doubles the pause.

    Attributes:
        first_s: mean seconds from a call to its first text; None until measured.
        token_s: mean seconds from one text to the next, a token each as servers stream them;
            None until measured.
        last_failure: the newest failure's sentence.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.n_calls = 0
        self.n_failures = 0
        self.first_s: float | None = None
        self.token_s: float | None = None
        self.last_failure: str | None = None
        self._clock = clock
        self._lock = threading.Lock()
        self._epoch = 0  # a call counts only against the state in which it began
        self._pause_s = 0.0
        self._retry_at_s = 0.0
        self._on_trial = False

    @property
    def available(self) -> bool:
        """Whether a call may be made now."""
        with self._lock:
            return self._wait_s() <= 0 and not self._on_trial

    def begin(self) -> int | None:
        """Count a call and return its epoch; None: none may be made now."""
        with self._lock:
            if self._wait_s() > 0 or self._on_trial:
                return None
            self._on_trial = self._pause_s > 0
            self.n_calls += 1
            return self._epoch

    def why_not(self) -> str:
        """Say why `begin` returned None."""
        with self._lock:
            wait_s = self._wait_s()
            when = f"in {wait_s:.1f} s" if wait_s > 0 else "under way"
            return f"was not asked; the next trial is {when} after: {self.last_failure}"

    def succeeded(self, epoch: int) -> None:
        """Close the circuit."""
        with self._lock:
            if epoch == self._epoch:
                self._pause_s, self._on_trial = 0.0, False

    def failed(self, epoch: int, failure: str) -> None:
        """Open the circuit; calls that ran beside a failed one do not lengthen the pause."""
        with self._lock:
            self.n_failures += 1
            self.last_failure = failure
            if epoch == self._epoch:
                self._epoch += 1
                self._pause_s = min(MAX_RETRY_S, self._pause_s * 2 or RETRY_S)
                self._retry_at_s = self._clock() + self._pause_s
                self._on_trial = False

    def released(self, epoch: int) -> None:
        """End a call that was stopped before it showed anything."""
        with self._lock:
            if epoch == self._epoch:
                self._on_trial = False

    def measured(self, first_s: float, token_s: float | None) -> None:
        """Add what a call took; `token_s` is None where only one text came."""
        with self._lock:
            self.first_s = _mean(self.first_s, first_s)
            if token_s is not None:
                self.token_s = _mean(self.token_s, token_s)

    def _wait_s(self) -> float:
        return self._retry_at_s - self._clock() if self._pause_s else 0.0


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + WEIGHT * (new - old)
