"""Whether resident experts are computed while others arrive: only while it has measured to pay.

Two graph calls more per layer, and cores that the I/O threads want too, against computing that
hides behind reading. Nothing here reads a clock.
"""

from dataclasses import dataclass, field
from statistics import median
from typing import Final

from edgeroute.runtime.errors import UsageError

MOST_MISSES: Final = 4
"""Layers that miss as many or more experts are compared as one kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapParams:
    """How overlap must prove itself, in layers that miss some of a token's experts, not all.

    It is on for the first `warmup` of them, in which graphs are built, then on and off in turn
    for `trial`. It wins where it saved at least `min_gain_ratio` of the time from the lease to
    the next router, layers with equally many misses compared. The next trial is after `wait`
    such layers, then after twice as many each time, up to `max_wait`.

    Raises:
        UsageError: a value outside its range.
    """

    warmup: int = 64
    trial: int = 64
    min_gain_ratio: float = 0.01
    wait: int = 4096
    max_wait: int = 65536

    def __post_init__(self) -> None:
        good = self.warmup >= 0 and self.trial >= 4 and 1 <= self.wait <= self.max_wait
        if not good or not 0 <= self.min_gain_ratio < 1:
            raise UsageError(f"overlap gate settings contradict each other: {self}")


@dataclass(slots=True)
class _Kind:
    """Seconds that layers with equally many misses took, overlap off and on."""

    off: list[float] = field(default_factory=list)
    on: list[float] = field(default_factory=list)


class OverlapGate:
    """Switches overlap on and off by what layers cost. Not thread-safe.

    Ask `begin` for each layer that misses some experts, and tell `end` what it took. `forced`
    has it on whether it pays or not.
    """

    def __init__(
        self, params: OverlapParams | None = None, allowed: bool = True, *, forced: bool = False
    ) -> None:
        self.params = params or OverlapParams()
        self.allowed = allowed
        self._forced = allowed and forced
        self.on = allowed
        """What the latest trial decided."""
        self.gain_ratio: float | None = None
        """The share of such layers' time that overlap saved in the latest trial."""
        self.n_trials = self.n_wins = 0
        self._left = self.params.warmup
        self._wait = self.params.wait
        self._trying = False
        self._kinds: dict[int, _Kind] = {}
        self._open: tuple[int, bool] | None = None

    @property
    def state(self) -> str:
        """The state as a word, for `stats`."""
        if not self.allowed:
            return "forbidden"
        if self._forced:
            return "forced"
        return "trial" if self._trying else "on" if self.on else "off"

    def begin(self, n_missing: int) -> bool:
        """Begin a layer; True where its resident experts are to be computed at once."""
        if not self.allowed:
            return False
        if self._forced:
            return True
        kind = min(n_missing, MOST_MISSES)
        on = self.on
        if self._trying:
            seen = self._kinds.setdefault(kind, _Kind())
            on = len(seen.on) <= len(seen.off)
        self._open = kind, on
        return on

    def end(self, seconds: float) -> None:
        """Enter what the layer begun last took; without one, nothing happens."""
        if self._open is None:
            return
        (kind, on), self._open = self._open, None
        self._left -= 1
        if self._trying:
            seen = self._kinds[kind]
            (seen.on if on else seen.off).append(seconds)
        if self._left <= 0:
            self._next()

    def _next(self) -> None:
        """Begin a trial, or end it."""
        self._trying = not self._trying
        if self._trying:
            self._kinds.clear()
            self._left = self.params.trial
            return
        self.n_trials += 1
        spent = saved = 0.0
        for kind in self._kinds.values():
            if kind.on and kind.off:
                n = len(kind.on) + len(kind.off)
                spent += n * median(kind.off)
                saved += n * (median(kind.off) - median(kind.on))
        self.gain_ratio = saved / spent if spent else None
        self.on = saved > self.params.min_gain_ratio * spent
        self.n_wins += self.on
        self._left, self._wait = self._wait, min(2 * self._wait, self.params.max_wait)
