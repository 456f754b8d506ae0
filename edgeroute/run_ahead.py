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
"""Tokens of an answer at once: eight gained no more (BENCHLOG, 2026-11-23, seventh)."""
MOST_OUT: Final = 4
"""Tokens of all answers at once: ggml's argmax takes a row after another, by one thread, and with
four answers costs what the host's work between two passes does."""
BURST_S: Final = 0.06
"""How long nobody may hear anything: what arrives or is cancelled meanwhile waits for it."""
KEPT: Final = 16
LOSS_RATIO: Final = 1.02
"""Time of a token over that in passes of one, from which on it loses."""
PAUSE_TOKENS: Final = 512
"""Passes of one after a loss, until it is tried again."""


class _Race:
    """Time of a token when a pass computes one of each answer, and when it computes several."""

    def __init__(self) -> None:
        self._single: deque[float] = deque(maxlen=KEPT)
        self._several: deque[float] = deque(maxlen=KEPT)
        self._left = 0
        self.lost = 0.0

    def took(self, n_passes: int, seconds: float) -> None:
        if n_passes > 1:
            self._several.append(seconds / n_passes)
        else:
            self._single.append(seconds)
            self._left -= 1
        ratio = self.ratio
        if ratio is not None and ratio > LOSS_RATIO and self._left <= 0:
            self.lost = ratio
            self._left = PAUSE_TOKENS
            self._several.clear()

    @property
    def single_s(self) -> float | None:
        return median(self._single) if self._single else None

    @property
    def ratio(self) -> float | None:
        """Time of a token in passes of several over that in passes of one, once it is known."""
        if len(self._single) < KEPT or len(self._several) < KEPT:
            return None
        return median(self._several) / median(self._single)

    @property
    def open(self) -> bool:
        return self._left <= 0


class RunAhead:
    """Decides for every pass, by what passes took. Not thread-safe: the engine thread owns it."""

    def __init__(self, forward: Forward, clock: Callable[[], float] = time.perf_counter) -> None:
        self._ahead = Ahead(forward)
        self._clock = clock
        self._races: dict[int, _Race] = {}
        self._last: tuple[int, float] = 0, 0.0
        self.n_passes = 0
        self.n_tokens = 0

    def n_tokens_each(self, pieces: Sequence[Piece], batch: Sequence["Request"]) -> int:
        """Return how many tokens of each answer the next pass should compute."""
        n = min(MOST, MOST_OUT // len(batch))
        if n < 2:
            return 1
        race = self._races.get(len(batch))
        if race is None or not race.open or (single_s := race.single_s) is None:
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
        if n_before == n_answers:  # else it is not the time of one round
            self._races.setdefault(n_answers, _Race()).took(n, now - before)
        self._last = n_answers, now

    def stats(self) -> dict[str, object]:
        """Return what it did and gained, as plain JSON types.

        `time_ratio` is the time of a token over that in passes of one, by the number of answers
        that share a pass.
        """
        ratios = {str(n): round(race.ratio, 4) for n, race in sorted(self._races.items())
                  if race.ratio is not None}  # fmt: skip
        found: dict[str, object] = {
            "on": all(race.open for race in self._races.values()), "passes": self.n_passes,
            "tokens": self.n_tokens, "time_ratio": ratios,
        }  # fmt: skip
        if lost := {n: race.lost for n, race in sorted(self._races.items()) if not race.open}:
            found["switched_off"] = "; ".join(
                f"a token took {ratio:.2f} times as long with {n} answers at once"
                for n, ratio in lost.items()
            )
        return found


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
