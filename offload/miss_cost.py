"""What something costs that has a fixed part and a part per page: measured, robustly."""

from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Final

SAMPLES_KEPT: Final = 12
"""Of each number of pages."""
REFIT_EVERY: Final = 4
SURPRISE_RATIO: Final = 1.5
SURPRISES: Final = 3
"""So many samples in a row that are so many times above, or below, what was expected are no
disturbance: what was known before them is forgotten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostReport:
    """A cost as measured: `fixed_s` seconds each time, and `each_s` per page."""

    fixed_s: float
    each_s: float
    n: int


class Cost:
    """Seconds as a line over the number of pages: a line through medians of the latest samples.

    Medians, so that one sample disturbed by another program moves nothing.
    """

    def __init__(self) -> None:
        self.n = self.n_pages = 0
        self.seconds = 0.0
        self.fixed_s = self.each_s = 0.0
        self._samples: dict[int, deque[tuple[int, float]]] = {}
        self._surprises: list[tuple[int, float, bool]] = []

    @property
    def is_known(self) -> bool:
        """Whether anything was measured, or is supposed."""
        return bool(self._samples)

    @property
    def is_doubtful(self) -> bool:
        """Whether the latest sample was far off."""
        return bool(self._surprises)

    def suppose(self, n_pages: int, seconds: float) -> None:
        """Enter what pages took that were only a try: a sample like others, but in no sum."""
        self._keep(n_pages, seconds)
        self._fit()

    def add(self, n_pages: int, seconds: float, *, counts: bool = True) -> None:
        """Enter a sample, or only what it adds to the sums; without pages nothing happens."""
        if n_pages <= 0:
            return
        self.n_pages += n_pages
        self.seconds += seconds
        if not counts:
            return
        self.n += 1
        forgot = self._watch(n_pages, seconds)
        if not forgot:
            self._keep(n_pages, seconds)
        if forgot or self.n <= 2 * REFIT_EVERY or not self.n % REFIT_EVERY:
            self._fit()

    def of(self, n_pages: int) -> float:
        """Return the seconds that so many pages are expected to take."""
        return self.fixed_s + n_pages * self.each_s if n_pages else 0.0

    def on_average(self, n_times: float, n_pages: float) -> float:
        """Return the seconds of so many times, and so many pages altogether."""
        return n_times * self.fixed_s + n_pages * self.each_s

    def report(self) -> CostReport | None:
        """What is known, if only supposed (`n` is 0); None before anything was measured."""
        if not self.is_known:
            return None
        return CostReport(fixed_s=self.fixed_s, each_s=self.each_s, n=self.n)

    def _keep(self, n_pages: int, seconds: float) -> None:
        kept = self._samples.setdefault(n_pages, deque(maxlen=SAMPLES_KEPT))
        kept.append((self.n, seconds))

    def _watch(self, n_pages: int, seconds: float) -> bool:
        """Count surprises; True where they made it forget all but themselves."""
        expected = self.of(n_pages)
        above = seconds > SURPRISE_RATIO * expected
        if not above and seconds * SURPRISE_RATIO >= expected:
            self._surprises.clear()
            return False
        if self._surprises and self._surprises[-1][2] != above:
            self._surprises.clear()
        self._surprises.append((n_pages, seconds, above))
        if len(self._surprises) < SURPRISES:
            return False
        self._samples.clear()
        for n, took, _ in self._surprises:
            self._keep(n, took)
        self._surprises.clear()
        return True

    def _fit(self) -> None:
        """Put a line through the medians; both parts are at least 0."""
        oldest = self.n - 8 * SAMPLES_KEPT
        points: list[tuple[int, float, int]] = []
        for n_pages, samples in self._samples.items():
            while len(samples) > 1 and samples[0][0] < oldest:
                samples.popleft()
            if samples[-1][0] >= oldest:
                points.append((n_pages, median(s for _, s in samples), len(samples)))
        weight = sum(w for _, _, w in points)
        x = sum(n * w for n, _, w in points) / weight
        y = sum(s * w for _, s, w in points) / weight
        spread = sum(w * (n - x) ** 2 for n, _, w in points)
        slope = sum(w * (n - x) * (s - y) for n, s, w in points) / spread if spread else y / x
        self.each_s = min(max(0.0, slope), y / x)
        self.fixed_s = y - self.each_s * x
