"""Races of configurations: exact chances, error rates under made-up noise, lives and contests."""

import math
import random
from collections.abc import Mapping
from itertools import product
from typing import Any

import pytest

from edgeroute.runtime.errors import EdgerouteError
from edgeroute.tools.levers.candidates import Candidate
from edgeroute.tools.levers.exhaustive import (
    AGAIN,
    MOST_SLOWER,
    Contest,
    contest_notes,
    hold,
    results_of,
    rows_of,
    singles_of,
)
from edgeroute.tools.levers.race import LIFE, LOOKS, Race, below_chance
from edgeroute.tools.levers.runner import Turn
from edgeroute.tools.levers.turns import DEFAULT, Heat, Lives, need_bytes

MARGIN = 1 / MOST_SLOWER - 1
N_RACES, N_RUNNERS, MOST_ROUNDS = 300, 4, 48


class Noise:
    """Seconds of turns on a shared machine.

    One turn in eight takes 1.3 to 2.5 times as long; all drift together, by 15 % within some
    thirty turns; and a process is about 2 % quicker or slower than the next for all its life.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.drift = 0.0
        self.luck: dict[str, float] = {}

    def renew(self, names: list[str]) -> None:
        """Open new processes."""
        self.luck = {name: self.rng.gauss(0, 0.02) for name in names}

    def turn(self, name: str, gain: float) -> float:
        """Return how long a turn takes that would take a second by the default, undisturbed."""
        keep = 0.97
        self.drift = keep * self.drift + self.rng.gauss(0, 0.15 * math.sqrt(1 - keep**2))
        log = self.drift + self.luck[name] + self.rng.gauss(0, 0.04)
        if self.rng.random() < 1 / 8:
            log += self.rng.uniform(math.log(1.3), math.log(2.5))
        return math.exp(log) / (1 + gain)


def heat(noise: Noise, gains: Mapping[str, float]) -> Heat:
    names = [DEFAULT, *gains]
    noise.renew(names)
    found = Heat(seconds={name: [] for name in names})
    for _ in range(LIFE):
        for name in noise.rng.sample(names, len(names)):
            found.seconds[name].append(noise.turn(name, gains.get(name, 0.0)))
    return found


def play(gain: float, seed: int) -> dict[str, int]:
    """Race configurations of one true gain; count where they stand in the end."""
    noise, counts = Noise(seed), {"open": 0, "within": 0, "beyond": 0}
    for _ in range(N_RACES):
        race = Race([f"s{i}" for i in range(N_RUNNERS)], MARGIN)
        for _ in range(MOST_ROUNDS // LIFE):
            found = heat(noise, dict.fromkeys(race.open, gain))
            for name in race.open:
                for pair in zip(found.seconds[DEFAULT], found.seconds[name], strict=True):
                    race.add(name, *pair)
        for standing in race.standings.values():
            counts[standing] += 1
    return counts


def test_the_chance_is_that_of_all_signs() -> None:
    sizes = [0.5, 1.5, 2.0, 3.5, 4.0, 6.0]
    sums = [sum(rank for rank, up in enumerate(signs, 1) if up)
            for signs in product((False, True), repeat=6)]  # fmt: skip
    for signs in ([-1] * 6, [-1, -1, 1, -1, 1, -1], [1] * 6):
        values = [size * sign for size, sign in zip(sizes, signs, strict=True)]
        mine = sum(rank for rank, sign in enumerate(signs, 1) if sign > 0)
        assert below_chance(values) == pytest.approx(sum(w <= mine for w in sums) / 64)
    assert below_chance([-1.0, 1.0]) == 0.75  # the one above has the higher rank of equals
    assert below_chance([0.0] * 8) == 1.0


def test_one_turn_of_twice_the_time_is_one_rank() -> None:
    quiet = [-0.05 + 0.001 * i for i in range(12)]
    disturbed = [*quiet[:11], 0.7]
    assert below_chance(quiet) < 0.001 and below_chance(disturbed) < 0.05
    mean = sum(disturbed) / 12
    assert mean > 0


@pytest.mark.parametrize(("gain", "wrong", "most"), [
    (MARGIN, "within", 0.035), (MARGIN, "beyond", 0.035), (0.0, "beyond", 0.01),
    (-0.1, "beyond", 0.0), (0.1, "within", 0.01),
])  # fmt: skip
def test_wrong_exits_are_rare(gain: float, wrong: str, most: float) -> None:
    counts = play(gain, seed=7)
    assert counts[wrong] <= most * N_RACES * N_RUNNERS, counts


def test_what_differs_much_leaves_soon() -> None:
    slower, quicker = play(-0.12, seed=3), play(0.2, seed=4)
    assert slower["within"] > 0.9 * N_RACES * N_RUNNERS, slower
    assert quicker["beyond"] > 0.9 * N_RACES * N_RUNNERS, quicker


def test_who_is_known_does_not_run_on() -> None:
    race = Race(["slow", "equal", "dead"], MARGIN)
    race.drop("dead")
    assert race.best is None and race.open == ["slow", "equal"]
    for i in range(LOOKS[0]):
        race.add("slow", 1.0, 1.5)
        race.add("equal", 1.0, 1.0 + 0.2 * (-1) ** i)
    assert race.standings == {"slow": "within", "equal": "open"} and race.open == ["equal"]
    assert race.best == "equal" and race.rounds("slow") == LOOKS[0]
    for _ in range(LOOKS[-1]):
        race.add("equal", 1.0, 1.3)
    assert race.open == []


class PlayedLives(Lives):
    """Lives of made-up seconds, without processes."""

    def __init__(self, gains: Mapping[str, float], seed: int, room: int = 3) -> None:
        self.gains, self._noise, self._room = gains, Noise(seed), room
        self.heats: list[list[str]] = []

    @property
    def room(self) -> int:
        return self._room

    def heat(self, singles: Mapping[str, Mapping[str, Any]]) -> Heat:
        self.heats.append(list(singles))
        found = heat(self._noise, {name: self.gains[name] for name in singles})
        if "broken" in singles:
            found.errors["broken"] = "no room"
            del found.seconds["broken"]
        return found


def contest(gains: Mapping[str, float], seed: int = 1) -> tuple[Contest, PlayedLives]:
    found, lives = Contest(race=Race(gains, MARGIN)), PlayedLives(gains, seed)
    hold(found, lives, {name: {} for name in gains}, 600.0, lambda line: None)
    return found, lives


def test_the_best_is_found_and_measured_again() -> None:
    gains = {"best": 0.25, "good": 0.1, "level": 0.0, "slow": -0.2, "broken": 0.5}
    found, lives = contest(gains)
    assert found.best == "best" and found.errors == {"broken": "no room"}
    assert all(len(group) <= 3 for group in lives.heats)
    assert lives.heats[-len(found.ratios) :] == [["best"]] * len(found.ratios)
    gain = found.confirmed
    assert gain is not None and found.decided and len(found.ratios) == AGAIN[0]
    assert gain.low < 1 / 1.25 - 1 < gain.high < MOST_SLOWER - 1
    rows = rows_of(found)
    assert rows[0][1] == "best" and rows[-1][8:] == ("failed", "no room")
    by_name = {each["setting"]: each for each in results_of(found)}
    assert by_name["slow"]["standing"] == "within" and by_name["broken"] == {
        "lever": "single", "setting": "broken", "error": "no room"
    }  # fmt: skip
    assert f"{len(found.ratios)} lives of each" in contest_notes(found)[1]


def test_verdicts_are_right_under_noise() -> None:
    """Ten configurations, the best quicker by 15 %, or all level or slower: 20 contests each."""
    slower = {f"s{i}": -0.03 * i for i in range(1, 10)}
    right = {0.15: 0, 0.0: 0}
    for seed in range(20):
        for best in right:
            gain = contest({"best": best, **slower}, seed)[0].confirmed
            assert gain is not None
            right[best] += (1 + gain.value >= MOST_SLOWER) == (best == 0.0)
    assert right[0.15] == 20 and right[0.0] >= 19, right


def test_when_the_time_is_over_it_says_what_is_open() -> None:
    gains = dict.fromkeys(("a", "b", "c", "d"), 0.0)
    found, lives = Contest(race=Race(gains, MARGIN)), PlayedLives(gains, 1)
    hold(found, lives, {name: {} for name in gains}, 0.0, lambda line: None)
    assert found.best is None and found.confirmed is None and not lives.heats
    assert "4 open; more --minutes" in contest_notes(found)[0]


def test_singles_are_lossless_settings_and_their_off() -> None:
    listed = [
        Candidate(lever="policy", settings={"policy": "lfu"}, off={"policy": "lru"}),
        Candidate(lever="threads", settings={"threads": 1}, off={"threads": None}),
        Candidate(lever="depth", settings={"depth": "half"}, off={"depth": "full"},
                  quality="measured"),
        Candidate(lever="adapters", settings={}, off={}, options={"adapter": "auto"}),
    ]  # fmt: skip
    found = singles_of(listed, {"policy": "auto", "threads": None})
    assert set(found) == {"policy=lfu", "policy=lru", "threads=1"}
    assert found["policy=lru"] == {"levers": "asked", "policy": "lru"}


class PlayedWorker:
    """A worker whose tokens are counted up, quicker with one setting; some are faulty."""

    def __init__(self, settings: Mapping[str, Any], log: list[str]) -> None:
        self.name, self.at, self.log = str(settings.get("policy", "default")), 0, log

    def call(self, method: str, *args: Any) -> Any:
        if method == "begin":
            if self.name == "dead":
                raise EdgerouteError("no room")
            return None
        assert method == "turn"
        self.log.append(self.name)
        n = args[0]
        self.at += n
        ids = tuple(range(self.at, self.at + n + (self.name == "odd")))
        return Turn(token_s=0.5 if self.name == "lfu" else 1.0, token_ids=ids)


class PlayedBench:
    """Opens played workers; knows how many are alive."""

    def __init__(self) -> None:
        self.alive, self.most, self.log = 0, 0, list[str]()
        self.params = type("P", (), {"seconds": 40.0})
        self.prompts = ("p",)

    def opened(self, own: Any, factory: object, settings: Mapping[str, Any]) -> PlayedWorker:
        self.alive += 1
        self.most = max(self.most, self.alive)
        own.callback(self._ended)
        return PlayedWorker(settings, self.log)

    def _ended(self) -> None:
        self.alive -= 1

    def probed(self, action: Any) -> tuple[Any, bool]:
        return action(), True


@pytest.mark.parametrize(("need", "most"), [(1, 4), (1 << 60, 1)])
def test_lives_take_turns_and_end(need: int, most: int) -> None:
    bench = PlayedBench()
    lives = Lives(bench, need)  # type: ignore[arg-type]
    singles = {name: {"policy": name} for name in ("lfu", "odd", "dead", "static")}
    found = lives.heat(singles)
    assert bench.alive == 0 and bench.most == most and found.noisy
    assert found.seconds == {DEFAULT: [1.0] * LIFE, "lfu": [0.5] * LIFE, "static": [1.0] * LIFE}
    assert found.errors == {"odd": "its answers differ from the default's", "dead": "no room"}
    rounds = bench.log[1:]  # the first turn finds out how long turns are
    together = {frozenset(rounds[i : i + 4]) for i in range(0, len(rounds), 4)}
    assert (together == {frozenset({"default", "lfu", "odd", "static"})}) == (most > 1)


def test_the_default_must_run_and_nothing_is_left_behind() -> None:
    bench = PlayedBench()

    lives = Lives(bench, 1)  # type: ignore[arg-type]
    lives.heat({})
    bench.log = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        lives.heat({"lfu": {"policy": "lfu"}})
    assert bench.alive == 0


class Interrupting(list[str]):
    """Ctrl-C in the third turn."""

    def append(self, name: str) -> None:
        super().append(name)
        if len(self) == 3:
            raise KeyboardInterrupt


def test_what_a_process_may_take() -> None:
    gib = 1 << 30
    assert need_bytes(4 * gib, 2 * gib, paged=True) == 2 * gib
    assert need_bytes(gib // 10, 20 * gib, paged=False) < gib
    assert need_bytes(4 * gib, 5 * gib, paged=False) == 5 * gib
