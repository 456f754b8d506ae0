"""What step routing costs in seconds, from what passes of both models cost now.

A pass over k tokens takes a time of its own and a time per token. Where the first is large
(weights streamed from disk, another machine), reading what the other model wrote is nearly
free and routing pays; where a pass over k tokens costs k times one, every token is paid twice.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

from edgeroute.runtime.errors import UsageError

FORGET: Final = 0.1
"""Weight of a new measurement of passes of about that size."""
N_MEDIAN: Final = 5
"""Last measurements whose median counts as the new one, so that an outlier counts nothing."""
LEAST_GAIN: Final = 1.05
"""Speed over the large model alone from which on routing pays."""


class _Octave:
    """Passes over about as many tokens: what they took lately, as one point."""

    def __init__(self) -> None:
        self._last: deque[tuple[int, float]] = deque(maxlen=N_MEDIAN)
        self.n_tokens = self.seconds = 0.0

    def observe(self, n_tokens: int, seconds: float) -> None:
        self._last.append((n_tokens, seconds))
        ranked = sorted(self._last, key=lambda each: each[1] / each[0])
        k, s = ranked[(len(ranked) - 1) // 2]
        rate = 1.0 if len(self._last) < N_MEDIAN else FORGET
        self.n_tokens += rate * (k - self.n_tokens)
        self.seconds += rate * (s - self.seconds)


@dataclass(kw_only=True)
class PassCost:
    """Seconds of a pass over k tokens: base_s + k token_s.

    The line runs through one point for every size of pass that occurs (1, 2 and 3, 4 to 7, ...),
    which follows its own measurements with exponential forgetting: thousands of decoded tokens
    do not wash out what is known of reading. Relative deviations count, and neither part is
    negative. Not thread-safe.

    Attributes:
        base_s, token_s: both 0 while they are not known: see `known`.
    """

    base_s: float = 0.0
    token_s: float = 0.0

    def __post_init__(self) -> None:
        self._octaves: dict[int, _Octave] = {}

    @property
    def known(self) -> bool:
        """Whether passes of different sizes were measured, or the line was given."""
        return self.base_s > 0 or self.token_s > 0

    def observe(self, n_tokens: int, seconds: float) -> None:
        """Enter what a pass took.

        Raises:
            UsageError: it had no tokens, or the seconds are no time; nothing was entered.
        """
        if n_tokens < 1 or not 0 <= seconds < math.inf:
            raise UsageError(f"a pass over {n_tokens} tokens in {seconds} s cannot be entered: at "
                             "least 1 token and finite seconds from 0 are wanted")  # fmt: skip
        octave = self._octaves.setdefault(n_tokens.bit_length(), _Octave())
        octave.observe(n_tokens, seconds)
        if len(self._octaves) > 1:
            self._fit()

    def seconds(self, n_tokens: float) -> float:
        """Return what a pass over so many tokens takes.

        While only one size of pass was measured, a larger one is taken to cost in proportion
        and a smaller one as much: neither can cost more.

        Raises:
            UsageError: no pass was measured.
        """
        if self.known:
            return self.base_s + self.token_s * n_tokens
        if not self._octaves:
            raise UsageError("what a pass costs is not known before one was measured")
        only = next(iter(self._octaves.values()))
        return only.seconds * max(1.0, n_tokens / only.n_tokens)

    def to_dict(self) -> dict[str, float]:
        """Return the line as plain JSON types: `PassCost(**found)` makes an equal one."""
        return {"base_s": self.base_s, "token_s": self.token_s}

    def _fit(self) -> None:
        """Lay the line through the points of all sizes."""
        w = wk = wkk = ws = wks = 0.0
        for octave in self._octaves.values():
            k, s = octave.n_tokens, octave.seconds
            weight = 1.0 / max(s, 1e-9) ** 2  # so that relative deviations count
            w, wk, wkk = w + weight, wk + weight * k, wkk + weight * k * k
            ws, wks = ws + weight * s, wks + weight * k * s
        slope = (w * wks - wk * ws) / (w * wkk - wk * wk)
        base = (ws - slope * wk) / w
        if slope < 0:
            slope, base = 0.0, ws / w
        elif base < 0:
            slope, base = wks / wkk, 0.0
        self.base_s, self.token_s = base, slope


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a policy has both models do, as means: per token of an answer, or per answer.

    Attributes:
        small_written: tokens that the small model wrote, refused ones included.
        small_read: tokens of others that it read.
        large_written: tokens that the large model wrote one by one.
        large_passes: its passes that read what others wrote.
        large_read: tokens that those read.
    """

    small_written: float = 0.0
    small_read: float = 0.0
    large_written: float = 0.0
    large_passes: float = 0.0
    large_read: float = 0.0


ALONE: Final = Workload(large_written=1.0)
"""One token that the large model writes, and nobody else."""


def predicted_s(workload: Workload, small: PassCost, large: PassCost) -> float:
    """Return the seconds of a workload.

    The small model's reading is priced per token: what it reads comes in passes that it makes
    for its glances anyway, or in few long ones.

    Raises:
        UsageError: a model is needed of which no pass was measured.
    """
    seconds = 0.0
    if workload.small_written or workload.small_read:
        two = small.seconds(2.0)
        seconds += workload.small_written * small.seconds(1.0)
        seconds += workload.small_read * (two - small.seconds(1.0) if small.known else two / 2)
    if workload.large_written:
        seconds += workload.large_written * large.seconds(1.0)
    if workload.large_passes:
        each = workload.large_read / workload.large_passes
        seconds += workload.large_passes * large.seconds(each)
    return seconds


def pays(
    workload: Workload, small: PassCost, large: PassCost, least_gain: float = LEAST_GAIN,
    alone: Workload = ALONE,
) -> bool | None:  # fmt: skip
    """Tell whether a policy is faster than the large model alone.

    Args:
        workload: what the policy has the models do.
        small, large: what their passes cost now.
        least_gain: speed over the large model alone from which on it pays.
        alone: what the large model alone does for the same; one token of an answer if the
            workload is per token.

    Returns:
        None while what passes cost is not known of both models.
    """
    if not (small.known and large.known):
        return None
    return predicted_s(alone, small, large) >= least_gain * predicted_s(workload, small, large)
