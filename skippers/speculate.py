"""Speculation: how many tokens to draft, by whom, and when to leave it.

A pass over several tokens yields those of a draft that the model would have written itself,
and one more. Whether that pays is a matter of prices on this machine now: what a pass over k
tokens takes, what a draft takes, how many of its tokens are accepted. All three are measured
while decoding. Drafts that lose are left, and tried again now and then, less and less often.
Guesses that cost nothing are judged without a pass, and draft where they beat all others.
Source: Leviathan et al. 2023 (expected tokens of a draft); S2D2, arXiv 2603.25702 (draft where
the expected gain exceeds a cost, with hysteresis).
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

LENGTHS: Final = (1, 2, 3, 4, 6, 8, 11, 15)
"""Drafts are so long: few lengths, so that few shapes of batch occur."""
GAIN_ON, GAIN_OFF = 1.05, 1.0
"""Speed over plain decoding from which on a source drafts, and below which it is left."""
TRIAL_ROUNDS, TRIAL_FIRST, TRIAL_LAST = 3, 48, 768
"""Drafts of a trial; passes between a source's trials, which double up to the last number."""
CONTROL_EVERY, CONTROL_SOON = 48, 4
"""Passes after which a plain one is made, so that its price stays known; the latter where the
last one's price was unlike those before."""
N_PLAIN, UNLIKE = 5, 1.5
FADE: Final = 0.25
"""What a source's past counts for when it is left: it may be another one when tried again."""
PLAIN_FIRST: Final = 3
"""Plain passes that are measured before anything is tried; the first is often a slow one."""
WATCH_FROM, WATCH_ROUNDS, GAIN_WATCHED = 24, 16, 0.98
"""Passes after which a watched source is compared with plain ones; drafts that this takes; the
speed over plain passes below which it is left."""
FORCED_FIRST: Final = 4
"""Tokens of a forced draft before anything is measured."""
JUDGED_ENOUGH: Final = 6
"""Guesses of a source that must have been judged before it drafts without a trial."""
DRAFT_GUESS: Final = 0.1
"""Share of a plain pass that a drafted token takes, before drafts were measured."""


class Line:
    """Seconds as a straight line in a count, from noisy measurements that drift.

    A line is laid through the medians of every count's last measurements. Its slope begins at a
    guess and follows the measurements as they come to span some counts.
    """

    MEMORY, GUESS_WEIGHT = 8, 4.0

    def __init__(self) -> None:
        self._last: dict[int, deque[float]] = {}
        self._slope_guess = 0.0
        self._fit: tuple[float, float] | None = None

    @property
    def slope_guess(self) -> float:
        """What one more is taken to cost, before measurements tell."""
        return self._slope_guess

    @slope_guess.setter
    def slope_guess(self, slope: float) -> None:
        self._slope_guess, self._fit = slope, None

    def observe(self, count: int, seconds: float) -> None:
        """Note a measurement."""
        self._last.setdefault(count, deque(maxlen=self.MEMORY)).append(seconds)
        self._fit = None

    def seconds(self, count: int) -> float | None:
        """Return the line's value, never below 0; None before the first measurement."""
        if not self._last:
            return None
        if self._fit is None:
            self._fit = self._laid()
        at_0, slope = self._fit
        return max(0.0, at_0 + slope * count)

    def _laid(self) -> tuple[float, float]:
        """Return value at 0 and slope, which is never negative."""
        points = [(len(last), k, statistics.median(last)) for k, last in self._last.items()]
        total = sum(n for n, _, _ in points)
        x = sum(n * k for n, k, _ in points) / total
        y = sum(n * mid for n, _, mid in points) / total
        xx = sum(n * (k - x) ** 2 for n, k, _ in points)
        xy = sum(n * (k - x) * (mid - y) for n, k, mid in points)
        slope = (xy + self.GUESS_WEIGHT * self._slope_guess) / (xx + self.GUESS_WEIGHT)
        slope = max(0.0, slope)
        return y - slope * x, slope


class Acceptance:
    """How often the i-th guess of a draft is right, those it follows among it; recent ones most.

    What was rarely tried is taken to be right as much less often than the guess before it as
    guesses are on average.
    """

    DECAY, PRIOR, PRIOR_WEIGHT = 0.94, 0.7, 2.0

    def __init__(self, longest: int) -> None:
        self._tried = [0.0] * longest
        self._right = [0.0] * longest
        self._before = [0.0] * longest
        """How often the one before it was right when it was tried."""

    def observe(self, right: Sequence[bool | None]) -> None:
        """Note which guesses of a draft were right; None for those that say nothing.

        Those beyond the longest draft are of no interest.
        """
        self.fade(self.DECAY)
        before = True
        for i, each in enumerate(right[: len(self._tried)]):
            if each is not None:
                self._tried[i] += 1.0
                self._right[i] += each
                self._before[i] += before
                before = each

    def fade(self, share: float) -> None:
        """Let what was seen so far count less."""
        for counts in (self._tried, self._right, self._before):
            counts[:] = [share * each for each in counts]

    def expected(self, n_drafted: int) -> float:
        """Return how many tokens a pass yields with a draft of that length, one at least."""
        weight = self.PRIOR_WEIGHT
        mean = (sum(self._right) + weight * self.PRIOR) / (sum(self._before) + weight)
        total, share = 1.0, 1.0
        for tried, right in zip(self._tried[:n_drafted], self._right, strict=False):
            share = (right + weight * share * min(1.0, mean)) / (tried + weight)
            total += share
        return total


class Choice(NamedTuple):
    """Who drafts and how many tokens; no source and 0 for a plain pass."""

    source: str | None
    n_tokens: int


PLAIN: Final = Choice(None, 0)


@dataclass(slots=True, kw_only=True)
class _Source:
    """What is known of one source of drafts."""

    accepts: Acceptance
    draft_s: Line = field(default_factory=Line)
    each_s: float | None = None
    """Seconds of a guess, lately: what one more is taken to cost until drafts of several lengths
    were measured."""
    on: bool = False
    trial: int = TRIAL_ROUNDS
    """Drafts left of the trial that is under way."""
    next_trial: int = 0
    backoff: int = TRIAL_FIRST
    tokens: float = 0.0
    seconds: float = 0.0
    n_recent: int = 0
    """Drafts in `tokens` and `seconds`, which fade."""
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    judged: int = 0
    """Guesses that were compared with what came, without being drafted."""

    @property
    def is_judged(self) -> bool:
        """Whether its acceptance is known without a trial."""
        return self.judged >= JUDGED_ENOUGH

    @property
    def realised_s(self) -> float | None:
        """Seconds per token of the last drafts, all included; None while there are few."""
        return self.seconds / self.tokens if self.n_recent >= 2 * TRIAL_ROUNDS else None


class Speculator:
    """Chooses a source and a length for every pass.

    Args:
        longest: most tokens of a draft.
        forced: draft always, whatever it costs; the best length is still chosen.
        watched: of a forced one: until its drafts have lost time; then as if it were not forced.
    """

    def __init__(self, longest: int, *, forced: bool = False, watched: bool = False) -> None:
        self._lengths = tuple(n for n in LENGTHS if n <= longest)
        self._longest = longest
        self._forced = forced
        self._watched = forced and watched
        self.left_because = ""
        """Why drafts that were on are not any more; empty if they never were left."""
        self.left_at_pass = 0
        self._pass_s = Line()
        self._plain: deque[float] = deque(maxlen=N_PLAIN)
        self._sources: dict[str, _Source] = {}
        self._n_passes = 0
        self._next_control = 0

    @property
    def plain_s(self) -> float | None:
        """Seconds of a pass over one token; None while too little was measured."""
        if len(self._plain) >= PLAIN_FIRST:
            return statistics.median(self._plain)
        return self._pass_s.seconds(1) if self._forced else None

    @property
    def on(self) -> bool:
        """Whether any source drafts at present."""
        return self._forced or any(source.on for source in self._sources.values())

    def wants(self, name: str) -> bool:
        """Whether a source would draft now if it could: worth preparing it."""
        source = self._source(name)
        return self._forced or source.on or source.trial > 0 or self._due(source)

    def choose(self, offers: Mapping[str, int]) -> Choice:
        """Choose for the next pass.

        Args:
            offers: sources that can draft now, with the most tokens of each; those of at least
                one token count.
        """
        plain_s = self.plain_s
        best, best_s = PLAIN, math.inf
        for name, most in offers.items():
            choice, token_s = self._best(name, min(most, self._longest))
            if choice.n_tokens and plain_s is not None and not self._forced:
                source, gain = self._source(name), plain_s / token_s
                if source.is_judged:
                    source.trial, source.on = 0, gain >= GAIN_ON
                elif self._due(source):
                    source.trial, source.next_trial = TRIAL_ROUNDS, 0
                if source.trial > 0 and (source.rounds or gain >= GAIN_ON):
                    return choice  # nothing is tried that would lose even if it went well
                if not (source.on if source.is_judged else self._pays(name, gain)):
                    continue
            elif plain_s is None and not self._forced:
                continue
            if choice.n_tokens and token_s < best_s:
                best, best_s = choice, token_s
        if self._forced and not (self._watched and self._n_passes >= WATCH_FROM):
            return best
        return PLAIN if self._n_passes >= self._next_control else best

    def observe_pass(self, n_tokens: int, seconds: float, computing_s: float) -> None:
        """Note what a pass over `n_tokens` took, and how much of it was arithmetic.

        Until passes of several lengths were seen, a token more is taken to cost its arithmetic.
        """
        self._n_passes += 1
        if n_tokens == 1:
            self._plain.append(seconds)
            usual = statistics.median(self._plain)
            unlike = max(seconds, usual) > UNLIKE * min(seconds, usual)
            soon = unlike or len(self._plain) < PLAIN_FIRST
            self._next_control = self._n_passes + (CONTROL_SOON if soon else CONTROL_EVERY)
        self._pass_s.observe(n_tokens, seconds)
        guess, each_s = self._pass_s.slope_guess, computing_s / n_tokens
        self._pass_s.slope_guess = guess + (each_s - guess) / min(self._n_passes, Line.MEMORY)

    def observe_draft(
        self, name: str, right: Sequence[bool | None], seconds: tuple[float, float]
    ) -> None:
        """Note a draft, which of its guesses were right, and the seconds of draft and pass.

        Of a guess that an answer did not get to, nobody knows: None.
        """
        source, (draft_s, pass_s) = self._source(name), seconds
        drafted, accepted = len(right), sum(each is True for each in right)
        source.draft_s.observe(drafted, draft_s)
        each_s = draft_s / drafted if drafted else 0.0
        known_s = each_s if source.each_s is None else source.each_s
        source.each_s = known_s + (each_s - known_s) / Line.MEMORY
        source.accepts.observe(right)
        source.tokens = 0.9 * source.tokens + accepted + 1
        source.seconds = 0.9 * source.seconds + draft_s + pass_s
        source.n_recent += 1
        source.rounds += 1
        source.drafted += drafted
        source.accepted += accepted
        if self._forced:
            self._watch(name, source)
        elif source.trial:
            source.trial -= 1
            if not source.trial:
                self._end_trial(name, source)

    def observe_guess(self, name: str, guessed: int, right: int) -> None:
        """Note a guess that was not drafted, how many tokens of it came to be compared with the
        answer, and how many of these were right."""
        source = self._source(name)
        source.accepts.observe([i < right for i in range(guessed)])
        source.judged += 1

    def judged(self, name: str) -> bool:
        """Whether a source has guessed often enough to draft without a trial."""
        return self._source(name).is_judged

    def stats(self) -> dict[str, object]:
        """Return what was drafted and accepted by source, and the speed of each over plain."""
        plain_s = self.plain_s
        found: dict[str, object] = {}
        for name, source in self._sources.copy().items():  # other threads may ask
            if not source.rounds:
                continue
            gain = None
            if plain_s is not None and source.seconds > 0:
                gain = round(plain_s * source.tokens / source.seconds, 3)
            found[name] = {"drafted": source.drafted, "accepted": source.accepted,
                           "passes": source.rounds, "on": source.on, "gain": gain}  # fmt: skip
        return found

    def _watch(self, name: str, source: _Source) -> None:
        """Force no more what has lost time over enough drafts, against plain passes measured."""
        if not self._watched or source.n_recent < WATCH_ROUNDS or len(self._plain) < PLAIN_FIRST:
            return
        gain = statistics.median(self._plain) * source.tokens / source.seconds
        if gain < GAIN_WATCHED:
            self._forced = False
            self._note_left(name, gain)
            self._leave(source)

    def _note_left(self, name: str, gain: float) -> None:
        self.left_because = f"drafts by {name} made {gain:.2f} times the speed of plain passes"
        self.left_at_pass = self._n_passes

    def _source(self, name: str) -> _Source:
        source = self._sources.get(name)
        if source is None:
            source = self._sources[name] = _Source(accepts=Acceptance(self._longest))
        return source

    def _best(self, name: str, most: int) -> tuple[Choice, float]:
        """Return the length that yields most per second, and the seconds per token then."""
        source, best, best_s = self._source(name), PLAIN, math.inf
        plain_s = self.plain_s
        if plain_s is None:
            n = min(most, FORCED_FIRST)
            return (Choice(name, n), 1.0 / n) if n > 0 else (PLAIN, math.inf)
        each_s = source.each_s
        source.draft_s.slope_guess = DRAFT_GUESS * plain_s if each_s is None else each_s
        for n in self._lengths:
            pass_s = self._pass_s.seconds(n + 1)
            if n > most or pass_s is None:
                break
            draft_s = source.draft_s.seconds(n)
            total = pass_s + (source.draft_s.slope_guess * n if draft_s is None else draft_s)
            token_s = total / source.accepts.expected(n)
            if token_s < best_s:
                best, best_s = Choice(name, n), token_s
        return best, best_s

    def _due(self, source: _Source) -> bool:
        return bool(source.next_trial) and not source.on and self._n_passes >= source.next_trial

    def _pays(self, source_name: str, gain: float) -> bool:
        """Tell whether a source that is not on trial should draft, by estimate and by result."""
        source = self._source(source_name)
        realised_s, plain_s = source.realised_s, self.plain_s
        if source.on and realised_s and plain_s is not None:
            gain = min(gain, plain_s / realised_s)
        if source.on and gain < GAIN_OFF:
            self._note_left(source_name, gain)
            self._leave(source)
        return source.on

    def _end_trial(self, name: str, source: _Source) -> None:
        """Let a source draft from now on, or leave it for a while."""
        choice, token_s = self._best(name, self._longest)
        plain_s = self.plain_s
        source.on = plain_s is not None and choice.n_tokens > 0 and plain_s / token_s >= GAIN_ON
        if source.on:
            source.backoff = TRIAL_FIRST
        else:
            self._leave(source)

    def _leave(self, source: _Source) -> None:
        source.on = False
        source.trial = 0
        source.next_trial = self._n_passes + source.backoff
        source.backoff = min(TRIAL_LAST, 2 * source.backoff)
        source.accepts.fade(FADE)
        source.tokens = source.seconds = 0.0
        source.n_recent = 0
