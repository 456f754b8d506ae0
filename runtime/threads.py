"""How many threads compute: measured while decoding, changed between tokens.

ggml's threads meet at a spinning barrier after every operation, so one thread that loses
its core stops all the others. On a machine that is never idle, the number of threads is
the lever: as many as there are cores that nobody else uses.
"""

import math
from collections import deque
from collections.abc import Callable, Collection
from typing import Protocol

SLOW_RATIO = 1.6  # a step this much slower than usual, twice running, says a core was lost
VERY_SLOW_RATIO = 3.0  # ... or this much slower once
BUSY_CORES, FREE_CORES = 0.5, 0.25  # others' load that takes a core from us, and gives it back
READ_EVERY_S = 0.12  # jiffies are 10 ms: shorter intervals are noise
TRIAL_STEPS, USUAL_STEPS = 3, 16
GAIN_RATIO = 0.93  # a trial with more threads must take less than this share of the time
BACKOFF_FIRST_S, BACKOFF_LAST_S = 0.5, 8.0


class Meter(Protocol):
    """Reads other processes' load."""

    @property
    def age_s(self) -> float:
        """Seconds since the last reading."""

    def read(self) -> tuple[float, float]:
        """Return (cores others kept busy, seconds covered)."""


class ThreadPolicy:
    """Chooses the number of threads for the next step from what the last ones took.

    Steps are compared with steps of equal batch size only. `clock` and `meter` are
    injected so that tests can play a busy machine.
    """

    def __init__(
        self, n_max: int, meter: Meter, clock: Callable[[], float], *, fixed: bool = False
    ) -> None:
        self.n_max = n_max
        self.n_threads = n_max
        self.n_changes = 0
        self._fixed = fixed or n_max == 1
        self._meter = meter
        self._clock = clock
        self._usual: dict[tuple[int, int], deque[float]] = {}
        self._n_slow = 0
        self._trial_from: int | None = None
        self._trial: list[float] = []
        self._retry_at = 0.0
        self._backoff_s = BACKOFF_FIRST_S
        self._others = 0.0

    def observe(self, n_tokens: int, seconds: float) -> None:
        """Learn from one decode step of `n_tokens` at the current number of threads.

        Steps of a second model count as of a negative number of tokens: they are compared with
        each other only.
        """
        if self._fixed:
            return
        self._read_load()
        if self._trial_from is not None:
            self._judge_trial(n_tokens, seconds)
            return
        if self._lost_a_core(n_tokens, seconds):
            self._give_up_cores()
        elif self.n_threads < self.n_max and self._room():
            self._start_trial()

    def before_prefill(self) -> None:
        """Look at the load before a long computation, which cannot change threads midway."""
        if self._fixed or self._meter.age_s < READ_EVERY_S:
            return
        self._read_load()
        if self._crowded():
            self._give_up_cores()
        elif self._trial_from is None:
            self._set(max(self.n_threads, self._free_cores(FREE_CORES)))

    def resume(self) -> None:
        """Forget what others did since the last reading: nothing was to be computed here."""
        self._meter.read()

    def usual_s(self, n_tokens: int) -> float | None:
        """Median seconds of recent steps at the current number of threads, if there are enough."""
        times = self._usual.get((self.n_threads, n_tokens))
        return median(times) if times and len(times) >= TRIAL_STEPS else None

    def _read_load(self) -> None:
        if self._meter.age_s >= READ_EVERY_S:
            self._others, _ = self._meter.read()

    def _lost_a_core(self, n_tokens: int, seconds: float) -> bool:
        """Note a step; tell whether it looks like a thread waiting for a core."""
        usual = self.usual_s(n_tokens)
        times = self._usual.setdefault((self.n_threads, n_tokens), deque(maxlen=USUAL_STEPS))
        slow = usual is not None and seconds > SLOW_RATIO * usual
        if not slow:
            times.append(seconds)
            self._n_slow = 0
        else:
            self._n_slow += 1
        if self.n_threads == 1:
            if self._n_slow >= USUAL_STEPS:  # it is not a lost core: this is the new usual
                times.clear()
                self._n_slow = 0
            return False
        very = usual is not None and seconds > VERY_SLOW_RATIO * usual
        return very or self._n_slow >= 2 or self._crowded()

    def _crowded(self) -> bool:
        """Whether others use cores that our threads count on."""
        return self._others >= BUSY_CORES and self.n_threads > self._free_cores(BUSY_CORES)

    def _free_cores(self, margin: float) -> int:
        """Cores left by others; a core counts as theirs from `margin` of its time on."""
        return max(1, self.n_max - math.ceil(self._others - margin + 1e-9))

    def _give_up_cores(self) -> None:
        self._trial_from = None
        self._set(max(1, min(self._free_cores(BUSY_CORES), self.n_threads - 1)))
        self._retry_at = self._clock() + self._backoff_s

    def _room(self) -> bool:
        return self._free_cores(FREE_CORES) > self.n_threads and self._clock() >= self._retry_at

    def _start_trial(self) -> None:
        self._trial_from, self._trial = self.n_threads, []
        self._set(self._free_cores(FREE_CORES))

    def _judge_trial(self, n_tokens: int, seconds: float) -> None:
        """Keep more threads if the trial's steps were faster than before; else go back.

        Every step is set against steps of its own size; where there were none it counts as fast.
        """
        before = self._usual.get((self._trial_from or 1, n_tokens))
        self._trial.append(seconds / median(before) if before else 0.0)
        hopeless = self._trial[-1] > VERY_SLOW_RATIO
        if len(self._trial) < TRIAL_STEPS and not hopeless:
            return
        won = not hopeless and median(self._trial) < GAIN_RATIO
        if won:
            self._backoff_s = BACKOFF_FIRST_S
            self._trial_from = None
            return
        back, self._trial_from = self._trial_from, None
        self._set(back or 1)
        self._backoff_s = min(BACKOFF_LAST_S, 2 * self._backoff_s)
        self._retry_at = self._clock() + self._backoff_s

    def _set(self, n_threads: int) -> None:
        if n_threads != self.n_threads:
            self.n_threads = n_threads
            self.n_changes += 1
            self._n_slow = 0


def median(values: Collection[float]) -> float:
    """Return the median of at least one value.

    Not of the standard library: its module brings fractions, decimals and hashes with it, for
    which the first token of every program would wait.
    """
    ordered, middle = sorted(values), len(values) // 2
    return (ordered[middle] + ordered[~middle]) / 2
