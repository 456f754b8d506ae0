"""How many tokens of each answer one pass computes, and whether that pays."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from edgeroute.models.ahead import Ahead, Computed
from edgeroute.models.forward import Forward, Piece
from edgeroute.runtime.threads import median

if TYPE_CHECKING:
    from edgeroute.loaded import LoadedModel
    from edgeroute.request import Request

MOST: Final = 4
"""Tokens of an answer at once: eight gained no more."""
MOST_OUT: Final = 4
"""Tokens of all answers at once: with four answers nothing was gained."""
BURST_S: Final = 0.06
"""How long nobody may hear anything: what arrives or is cancelled meanwhile waits for it."""
TURN_TOKENS: Final = 8
"""Of each answer, after which a trial goes over to the other way."""
TRIAL_TOKENS: Final = 96
"""Of each answer and way, after which a trial is decided."""
HOLD_TOKENS: Final = 4096
"""Of each answer, until it is tried again."""
PAUSE_S: Final = 0.002
"""Between two passes that follow each other; with more, somebody else was served."""


class Race:
    """Time of a token when a pass computes one of each answer, and when it computes several.

    Both take turns in a trial, for a machine is not as quick now as it was; then the winner runs.
    """

    def __init__(self) -> None:
        self._took = _no_times()
        self._n_tokens = {False: 0, True: 0}
        self._left = 0  # tokens until the next trial
        self._turn, self._turn_left = False, TURN_TOKENS
        self.ratio: float | None = None
        """Time of a token in passes of several over that in passes of one, in the last trial."""

    @property
    def lost(self) -> bool:
        """Whether several tokens at once lost the last trial."""
        return self.ratio is not None and self.ratio >= 1.0

    @property
    def several(self) -> bool:
        """Whether the next pass should compute several tokens."""
        return not self.lost if self._left > 0 else self._turn

    @property
    def single_s(self) -> float | None:
        """Least time of a token in passes of one lately, as far as it is known."""
        return min(self._took[False], default=None)

    def took(self, n_passes: int, seconds: float) -> None:
        """Note a pass over `n_passes` tokens of each answer, and what the host did after it."""
        if self._left > 0:
            self._left -= n_passes
            if self._left <= 0:
                self._took, self._n_tokens = _no_times(), {False: 0, True: 0}
            return
        several = n_passes > 1
        self._took[several].append(seconds / n_passes)
        self._n_tokens[several] += n_passes
        if several == self._turn:
            self._turn_left -= n_passes
            if self._turn_left <= 0:
                self._turn, self._turn_left = not self._turn, TURN_TOKENS
        if min(self._n_tokens.values()) >= TRIAL_TOKENS:
            self.ratio = median(self._took[True]) / median(self._took[False])
            self._left = HOLD_TOKENS


class RunAhead:
    """Decides for every pass, by what passes took. Not thread-safe: the engine thread owns it."""

    def __init__(self, forward: Forward, clock: Callable[[], float] = time.perf_counter) -> None:
        self._ahead = Ahead(forward)
        self._clock = clock
        self._races: dict[int, Race] = {}
        self._last: tuple[int, float] = 0, 0.0
        self._asked = 0.0
        self.n_passes = 0
        self.n_tokens = 0

    def n_tokens_each(self, pieces: Sequence[Piece], batch: Sequence["Request"]) -> int:
        """Return how many tokens of each answer the next pass should compute."""
        self._asked = self._clock()
        n = min(MOST, MOST_OUT // len(batch))
        race = self._races.get(len(batch))
        if n < 2 or race is None or not race.several or (single_s := race.single_s) is None:
            return 1
        while n > 1 and n * single_s > BURST_S:
            n //= 2
        if n < 2 or not all(_may(request, n) for request in batch):
            return 1
        return n if self._ahead.ready(pieces, n) else 1

    def run(self, pieces: Sequence[Piece], n: int) -> list[Computed] | None:
        """Compute `n` tokens of each; see `Ahead.run`."""
        found = self._ahead.run(pieces, n)
        if found is not None:
            self.n_passes += 1
            self.n_tokens += n * len(pieces)
        return found

    def took(self, n_answers: int, n: int) -> None:
        """Note that a pass is over, and what the host had to do with it: to be called each time."""
        now, (n_before, before) = self._clock(), self._last
        if n_before == n_answers and self._asked - before < PAUSE_S:
            self._races.setdefault(n_answers, Race()).took(n, now - before)
        self._last = n_answers, now

    def stats(self) -> dict[str, object]:
        """Return what it did and gained, as plain JSON types.

        `time_ratio` is the time of a token over that in passes of one, by the number of answers
        that share a pass.
        """
        races = sorted(self._races.items())
        lost = {n: race.ratio for n, race in races if race.lost}
        found: dict[str, object] = {
            "on": not lost, "passes": self.n_passes, "tokens": self.n_tokens,
            "time_ratio": {str(n): round(race.ratio, 4) for n, race in races if race.ratio},
        }  # fmt: skip
        if lost:
            found["switched_off"] = "; ".join(
                f"a token took {ratio:.2f} times as long with {n} answers at once"
                for n, ratio in lost.items()
            )
        return found


def _no_times() -> dict[bool, deque[float]]:
    """Begin to note seconds of a token, by whether a pass computed several: the latest ones."""
    return {several: deque(maxlen=TRIAL_TOKENS) for several in (False, True)}


def _may(request: "Request", n: int) -> bool:
    """Whether an answer's next tokens are the strongest, whatever comes, and it wants so many."""
    return request.sampler.plain and request.depth is None and request.n_left >= n


def open_run_ahead(loaded: "LoadedModel") -> RunAhead | None:
    """Return what decides for a model; None where each pass computes one token of an answer.

    That is where the setting says so, where weights come and go, on other devices than the
    processor, and where steps of answers are routed by what passes of one token take.
    """
    params = loaded.params
    if params.run_ahead == "off" or params.steps_on or not Ahead.can(loaded.forward):
        return None
    return RunAhead(loaded.forward)
