"""The default against every single configuration: which is best here, and by how much.

1. All race against the default, see `race` and `turns`; it ends when each is surely within the
   margin or surely beyond it, or when its share of the time is over.
2. The best of them is measured again in lives that took no part in choosing it. Each life is one
   figure, the middle of its rounds' ratios; their gain and interval are those of all levers, see
   `gain`. After 6, 12 and 24 lives it ends if the interval excludes the limit.

What is demanded has not changed: the default's speed over that configuration's, as measured by
the second step, is at least MOST_SLOWER.
"""

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from edgeroute.tools.bench.report import plain
from edgeroute.tools.levers.candidates import Candidate
from edgeroute.tools.levers.gain import MIN_PAIRS, Gain, centre, gain_of
from edgeroute.tools.levers.measure import Progress
from edgeroute.tools.levers.race import Race
from edgeroute.tools.levers.turns import DEFAULT, Heat, Lives

MOST_SLOWER: Final = 0.97
"""Speed of the default over the best single configuration's, at least."""
RACE_RATIO: Final = 0.7
"""Share of the time after which the race ends, whoever is open."""
AGAIN: Final = (6, 12, 24)
"""Lives of the best after which it is asked whether that is enough."""
AT_ONCE: Final = 2
"""Configurations beside the default where each process must live alone."""


@dataclass(slots=True)
class Contest:
    """What was measured so far.

    Attributes:
        race: everybody against the default.
        errors: why some could not be run.
        best: the configuration that was measured again.
        ratios: speed of the default over that one's, by life.
        n_heats, n_noisy: heats of both steps, and those that others disturbed.
    """

    race: Race
    errors: dict[str, str] = field(default_factory=dict)
    best: str | None = None
    ratios: list[float] = field(default_factory=list)
    n_heats: int = 0
    n_noisy: int = 0

    @property
    def confirmed(self) -> Gain | None:
        """By how much the default is quicker than the best one; None with too few lives."""
        if len(self.ratios) < MIN_PAIRS:
            return None
        return gain_of(self.ratios, [1.0] * len(self.ratios))

    @property
    def decided(self) -> bool:
        """Whether the interval excludes the limit."""
        gain = self.confirmed
        return gain is not None and not 1 + gain.low <= MOST_SLOWER <= 1 + gain.high


def singles_of(listed: Sequence[Candidate], auto: Mapping[str, object]) -> dict[str, Any]:
    """List single lossless configurations, and the off of each lever, as settings by name.

    Args:
        listed: candidates that can be run.
        auto: settings that leave a lever to the default; an off that is such is none of its own.
    """
    found = {}
    for each in listed:
        if each.quality == "same" and not each.options:
            found[each.name] = each.settings
    for each in listed:
        off = each.off
        if each.name in found and any(auto.get(name) != value for name, value in off.items()):
            found[", ".join(f"{name}={value}" for name, value in off.items()
                            if name != "small")] = off  # fmt: skip
    return {name: {"levers": "asked", **settings} for name, settings in found.items()}


def hold(contest: Contest, lives: Lives, singles: Mapping[str, Any], seconds: float,
         say: Progress) -> None:  # fmt: skip
    """Fill a contest; what was measured stays in it, whatever ends this.

    Raises:
        EdgerouteError: the default cannot be run.
    """
    end = time.monotonic() + seconds
    _race(contest, lives, singles, time.monotonic() + RACE_RATIO * seconds, say)
    contest.best = contest.race.best
    if contest.best is not None:
        _again(contest, lives, {contest.best: singles[contest.best]}, end, say)


def _race(contest: Contest, lives: Lives, singles: Mapping[str, Any], end: float,
          say: Progress) -> None:  # fmt: skip
    race, rng, took_s = contest.race, random.Random(1), 0.0
    while race.open and time.monotonic() + took_s / 2 < end:
        began = time.monotonic()
        names = rng.sample(race.open, len(race.open))  # who meets whom is drawn anew
        names.sort(key=race.rounds)
        group = names[: lives.room or AT_ONCE]
        heat = lives.heat({name: singles[name] for name in group})
        _note(contest, heat)
        for name in group:
            if name in heat.errors:
                race.drop(name)
                continue
            for default_s, single_s in zip(heat.seconds[DEFAULT], heat.seconds[name], strict=True):
                race.add(name, default_s, single_s)
        took_s = time.monotonic() - began
        best = race.best
        ahead = "" if best is None else f"; ahead: {best} {math.expm1(race.centre(best)):+.1%}"
        say(f"race: {len(race.open)} of {len(singles)} open{ahead}; {took_s:.0f} s a heat, "
            f"{max(0.0, end - time.monotonic()):.0f} s left")  # fmt: skip


def _again(contest: Contest, lives: Lives, best: Mapping[str, Any], end: float,
           say: Progress) -> None:  # fmt: skip
    """Measure the best once more, a life at a time."""
    (name,) = best
    while len(contest.ratios) < AGAIN[-1]:
        if len(contest.ratios) >= MIN_PAIRS and time.monotonic() > end:
            return
        if len(contest.ratios) in AGAIN and contest.decided:
            return
        heat = lives.heat(best)
        _note(contest, heat)
        if name in heat.errors:
            return
        pairs = zip(heat.seconds[name], heat.seconds[DEFAULT], strict=True)
        contest.ratios.append(math.exp(centre([math.log(mine / its) for mine, its in pairs])))
        say(f"again {len(contest.ratios)}: {DEFAULT} over {name} {contest.ratios[-1]:.3f}")


def _note(contest: Contest, heat: Heat) -> None:
    contest.n_heats += 1
    contest.n_noisy += heat.noisy
    contest.errors |= heat.errors


def rows_of(contest: Contest | None) -> list[tuple[str, ...]]:
    """Return the single configurations as rows of the table of levers, the quickest first."""
    if contest is None:
        return []
    rows = [
        ("single", name, "", "", f"{gain.value:+.1%}", f"{gain.low:+.1%} to {gain.high:+.1%}", "",
         "", contest.race.standings[name], f"over the default, {contest.race.rounds(name)} rounds")
        for name, gain in _gains(contest)
    ]  # fmt: skip
    return rows + [
        ("single", name, *[""] * 6, "failed", why) for name, why in contest.errors.items()
    ]


def results_of(contest: Contest | None) -> list[dict[str, object]]:
    """Return the single configurations as plain JSON types, the quickest first."""
    if contest is None:
        return []
    found: list[dict[str, object]] = [
        {"lever": "single", "setting": name, "over_default": plain_gain(gain),
         "standing": contest.race.standings[name], "n_rounds": contest.race.rounds(name)}
        for name, gain in _gains(contest)
    ]  # fmt: skip
    return found + [
        {"lever": "single", "setting": name, "error": why} for name, why in contest.errors.items()
    ]


def _gains(contest: Contest) -> list[tuple[str, Gain]]:
    gains = [(name, gain_of([math.exp(log) for log in each], [1.0] * len(each)))
             for name, each in contest.race.logs.items() if len(each) >= MIN_PAIRS]  # fmt: skip
    return sorted(gains, key=lambda pair: -pair[1].value)


def plain_gain(gain: Gain | None) -> dict[str, float | None] | None:
    """Return a gain as plain JSON types."""
    if gain is None:
        return None
    return {"value": plain(gain.value), "low": plain(gain.low), "high": plain(gain.high)}


def contest_notes(contest: Contest) -> list[str]:
    """Say in sentences what a contest has shown, and what it has not."""
    standings = list(contest.race.standings.values())
    n_open = standings.count("open")
    found = [
        f"quicker than the default by less than {1 / MOST_SLOWER - 1:.1%}, or slower: "
        f"{standings.count('within')} of {len(standings)} single configurations surely, "
        f"{standings.count('beyond')} surely not, {n_open} open"
        f"{'; more --minutes decide more' if n_open else ''}"
    ]
    gain = contest.confirmed
    if gain is not None:
        unsure = "" if contest.decided else f", which does not exclude {MOST_SLOWER}"
        found.append(f"the default over {contest.best}: {1 + gain.value:.3f} [{1 + gain.low:.3f} "
                     f"to {1 + gain.high:.3f}], {len(contest.ratios)} lives of each{unsure}"
                     )  # fmt: skip
    if contest.n_noisy:
        found.append(f"others used the machine during {contest.n_noisy} of {contest.n_heats} "
                     "heats of the race")  # fmt: skip
    return found
