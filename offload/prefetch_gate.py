"""Whether prefetch is on: only while it has measured to lose less time than its absence.

A pure state machine. The engine reports what each step cost; nothing here reads a clock.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import median, quantiles
from typing import Final

from edgeroute.runtime.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class GateParams:
    """How prefetch must prove itself.

    A trial runs `n_rounds` pairs of windows, off then on, of `window_steps` steps each; the
    first `skip_steps` of a window are the echo of the one before and do not count. Prefetch
    wins where the median on-step costs less than (1 - `min_gain_ratio`) of the median
    off-step and at least `min_useful_ratio` of the prefetched bytes were asked for. After a
    loss the next trial waits `first_wait_steps`, then `wait_growth` times longer each time up
    to `max_wait_steps`; after a win as long as the latest wait, and a second win in a row
    waits longer too. A step's prefetches may take up to `step_budget_bytes`.

    A trial ends with the first pair after which prefetch surely loses. Steps scatter, and a
    trial is short: where its medians lie within twice their standard
    error of each other, what it measured is kept, and the next trial, which adds to it, waits
    `open_wait_steps` only, up to `n_open` times in a row.

    With `max_loss_ratio`, prefetch that is on when a trial begins need not win it: it stays on
    while the median on-step costs at most (1 + `max_loss_ratio`) of the median off-step.

    Raises:
        UsageError: a value outside its range.
    """

    window_steps: int = 8
    skip_steps: int = 1
    n_rounds: int = 2
    min_gain_ratio: float = 0.01
    min_useful_ratio: float = 0.5
    warmup_steps: int = 16
    open_wait_steps: int = 48
    n_open: int = 4
    first_wait_steps: int = 512
    wait_growth: float = 2.0
    max_wait_steps: int = 16384
    step_budget_bytes: int = 64 << 20
    max_loss_ratio: float | None = None

    def __post_init__(self) -> None:
        good = (
            0 <= self.skip_steps < self.window_steps
            and self.n_rounds >= 1
            and 0 <= self.min_gain_ratio < 1
            and 0 <= self.min_useful_ratio <= 1
            and min(self.warmup_steps, self.n_open) >= 0
            and self.open_wait_steps >= 1
            and 1 <= self.first_wait_steps <= self.max_wait_steps
            and self.wait_growth >= 1
            and self.step_budget_bytes >= 0
            and (self.max_loss_ratio is None or 0 <= self.max_loss_ratio < 1)
        )
        if not good:
            raise UsageError(f"prefetch gate settings contradict each other: {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """What one decode step cost: seconds lost (or taken in all, as long as it is always the
    same kind), bytes prefetched in it, and bytes of prefetched pages that were asked for."""

    stall_s: float
    prefetched_bytes: int = 0
    useful_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """The state, and the latest trial's medians in seconds per step (None before any)."""

    state: str
    n_trials: int
    n_wins: int
    stall_on_s: float | None
    stall_off_s: float | None
    useful_ratio: float | None
    next_trial_steps: int
    off_at_step: int | None = None
    """The decode step at which it was last switched off; None if it never was."""
    off_because: str = ""


WATCHED: Final = GateParams(
    window_steps=4, skip_steps=1, n_rounds=3, warmup_steps=16, max_loss_ratio=0.02
)
"""For prefetch that is on from the start, because a proof says so: it is tried within 40 steps,
less than a minute at a token a second, and stays on unless it loses."""


_MIN_SURE: Final = 6
"""Steps on before a trial may end early: the quartiles of fewer say nothing."""


def _error_of_median(costs: Sequence[float]) -> float:
    """Standard error of a median: 0.93 times the quartiles' distance over the root of n."""
    if len(costs) < 2:
        return math.inf
    low, _, high = quantiles(costs, n=4, method="inclusive")
    return 0.93 * (high - low) / math.sqrt(len(costs))


class _State(Enum):
    OFF = "off"
    ON = "on"
    TRIAL = "trial"


class PrefetchGate:
    """Switches prefetch on and off by what steps cost. Not thread-safe.

    Call `begin_step`, prefetch only if it says so and `take` grants the bytes, then
    `end_step`. `allowed=False` (slots below one token's cycle, say) keeps it off for good;
    `begin_on` has it on until it has lost a trial.
    """

    def __init__(
        self, params: GateParams | None = None, allowed: bool = True, *, begin_on: bool = False
    ) -> None:
        self.params = params or GateParams()
        self.allowed = allowed
        self._state = _State.ON if begin_on else _State.OFF
        self._was_on = False
        self._n_steps = 0
        self._off_at: int | None = None
        self._off_because = ""
        self._until_trial = self.params.warmup_steps
        self._wait = self.params.first_wait_steps
        self._n_trials = self._n_wins = self._n_open = 0
        self._costs: dict[bool, list[float]] = {False: [], True: []}
        self._position = 0
        self._prefetched = self._useful = 0
        self._latest: tuple[float, float, float | None] | None = None
        self._budget_left = 0

    def begin_step(self) -> bool:
        """Begin a decode step; True where it may prefetch."""
        if self.allowed and self._state is not _State.TRIAL and self._until_trial <= 0:
            self._begin_trial()
        on = self.is_on
        self._budget_left = self.params.step_budget_bytes if on else 0
        return on

    @property
    def is_on(self) -> bool:
        """Whether the step at work may prefetch."""
        if not self.allowed or self._state is _State.OFF:
            return False
        return self._state is _State.ON or self._window % 2 == 1

    @property
    def _window(self) -> int:
        return self._position // self.params.window_steps

    def take(self, n_bytes: int) -> bool:
        """Claim bytes of this step's budget; False, and nothing claimed, where they exceed it."""
        if n_bytes > self._budget_left:
            return False
        self._budget_left -= n_bytes
        return True

    def end_step(self, cost: StepCost) -> None:
        """Enter what the step cost."""
        self._n_steps += 1
        if self._state is _State.TRIAL:
            self._end_trial_step(cost)
            return
        self._until_trial -= 1
        if self._state is _State.ON:
            self._watch(cost)

    def _watch(self, cost: StepCost) -> None:
        """Off at once where a window's prefetches were mostly in vain.

        Not in the first steps: a predictor that learns knows nothing yet.
        """
        if self._n_steps <= self.params.warmup_steps:
            return
        self._prefetched += cost.prefetched_bytes
        self._useful += cost.useful_bytes
        self._position += 1
        if self._position < self.params.window_steps:
            return
        if self._is_wasteful():
            self._state = _State.OFF
            self._note_off(was_on=True)
            self._n_open = 0
            self._back_off()
        self._position = self._prefetched = self._useful = 0

    def _note_off(self, *, was_on: bool) -> None:
        """Remember why what was on is off now."""
        if not was_on:
            return
        self._off_at = self._n_steps
        if self._is_wasteful():
            share = self._useful / self._prefetched
            self._off_because = f"only {share:.0%} of the bytes it read ahead were asked for"
        elif self._latest is not None:
            on, off, _ = self._latest
            self._off_because = f"tokens took {1e3 * on:.3g} ms with it and {1e3 * off:.3g} without"

    def _is_wasteful(self) -> bool:
        return self._useful < self.params.min_useful_ratio * self._prefetched

    def _begin_trial(self) -> None:
        self._was_on = self._state is _State.ON
        self._state = _State.TRIAL
        self._n_trials += 1
        if not self._n_open:
            self._costs = {False: [], True: []}
        self._position = self._prefetched = self._useful = 0

    def _end_trial_step(self, cost: StepCost) -> None:
        on = self.is_on
        if self._position % self.params.window_steps >= self.params.skip_steps:
            self._costs[on].append(cost.stall_s)
        self._prefetched += cost.prefetched_bytes
        self._useful += cost.useful_bytes
        self._position += 1
        if self._position % self.params.window_steps:
            return
        last = self._window == 2 * self.params.n_rounds
        if last or (on and (self._is_wasteful() or self._surely_loses())):
            self._end_trial()

    def _end_trial(self) -> None:
        on, off = median(self._costs[True]), median(self._costs[False])
        useful = self._useful / self._prefetched if self._prefetched else None
        self._latest = (on, off, useful)
        if self._was_on and self.params.max_loss_ratio is not None:
            won = on <= off * (1 + self.params.max_loss_ratio)
        else:
            won = on < off * (1 - self.params.min_gain_ratio) and useful is not None
        won = won and not self._is_wasteful()
        if won:
            self._n_wins += 1
        else:
            self._note_off(was_on=self._was_on)
        self._state = _State.ON if won else _State.OFF
        if self._is_open(on, off):
            self._n_open += 1
            self._until_trial = self.params.open_wait_steps
        else:
            self._n_open = 0
            self._back_off()
        self._position = self._prefetched = self._useful = 0

    def _is_open(self, on: float, off: float) -> bool:
        """Whether what was measured says too little, and may be added to."""
        if self._n_open >= self.params.n_open or self._is_wasteful() or not self._prefetched:
            return False
        return abs(on - off) < 2 * self._error()

    def _surely_loses(self) -> bool:
        """Whether no further pair is needed: it leaves what a trial that it lost would."""
        if len(self._costs[True]) < _MIN_SURE:
            return False
        allowed = self.params.max_loss_ratio if self._was_on else None
        off = median(self._costs[False]) * (1 + (allowed or 0.0))
        return median(self._costs[True]) > off + 2 * self._error()

    def _error(self) -> float:
        """Standard error of the difference of both medians."""
        return math.hypot(*(_error_of_median(costs) for costs in self._costs.values()))

    def _back_off(self) -> None:
        """Test again after the present wait; wait longer the next time."""
        self._until_trial = self._wait
        longer = int(self._wait * self.params.wait_growth)
        self._wait = min(longer, self.params.max_wait_steps)

    def report(self) -> GateReport:
        """What it knows now, for `stats`."""
        on, off, useful = self._latest or (None, None, None)
        return GateReport(
            state=self._state.value if self.allowed else "forbidden",
            n_trials=self._n_trials,
            n_wins=self._n_wins,
            stall_on_s=on,
            stall_off_s=off,
            useful_ratio=useful,
            next_trial_steps=max(0, self._until_trial),
            off_at_step=self._off_at,
            off_because=self._off_because,
        )
