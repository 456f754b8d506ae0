"""The watchdog: which engines it gives up, and what their requests and models see of it."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from edgeroute.pulse import Pulse
from edgeroute.runtime.errors import ClosedError
from edgeroute.server import watchdog
from edgeroute.server.errors import as_api_error
from edgeroute.server.openings import HungOpening
from edgeroute.server.watchdog import Engine, Opening, Watchdog
from tests.server.fleet_lab import (
    HungDevice,
    ask,
    bytes_of,
    go,
    make_files,
    make_fleet,
    shelf_model,
    state,
    until,
)

LIMIT_S = 60.0


@dataclass
class FakeEngine:
    """An engine whose pulse a test sets."""

    busy: bool = True
    idle_s: float = 0.0
    stuck_bytes: int = 123
    n_interrupted: int = 0
    error: BaseException | None = None

    def pulse(self) -> Pulse:
        return Pulse(busy=self.busy, idle_s=self.idle_s, doing="a prompt")

    def interrupt(self) -> None:
        self.n_interrupted += 1

    def abandon(self, error: BaseException) -> int:
        self.error = error
        return 2


@dataclass
class FakeFleet:
    engines: dict[str, Engine]
    abandoned: list[str] = field(default_factory=list)
    cannot_open: Sequence[str] = ()
    openings: dict[str, Opening] = field(default_factory=dict)
    forsaken: list[str] = field(default_factory=list)

    @property
    def names(self) -> Sequence[str]:
        return list(self.engines)

    def peek(self, name: str) -> Engine | None:
        return self.engines[name]

    def abandon(self, name: str, engine: Engine) -> None:
        assert self.engines[name] is engine
        self.abandoned.append(name)

    def forsake(self, name: str, error: HungOpening) -> None:
        del self.openings[name]
        self.forsaken.append(str(error))


@dataclass
class FakeOpening:
    idle_s: float

    @property
    def pulse(self) -> "FakeOpening":
        return self

    def read(self) -> Pulse:
        return Pulse(busy=True, idle_s=self.idle_s, doing="opening")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [1000.0]

    class Time:
        @staticmethod
        def monotonic() -> float:
            return now[0]

    def advance(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(watchdog, "time", Time)
    return advance


def test_an_engine_that_works_or_rests_is_left_alone() -> None:
    """Nobody waits for one that rests, however long it does."""
    rests, works = FakeEngine(busy=False, idle_s=1e6), FakeEngine(idle_s=LIMIT_S - 1)
    fleet = FakeFleet({"a": rests, "b": works})
    dog = Watchdog(fleet, LIMIT_S)
    for _ in range(3):
        dog.look()
    assert dog.healthy and not rests.n_interrupted + works.n_interrupted


def test_a_silent_engine_is_asked_to_stop_and_then_given_up(
    clock: Callable[[float], None],
) -> None:
    engine = FakeEngine(idle_s=LIMIT_S + 1)
    fleet = FakeFleet({"a": engine, "b": FakeEngine()})
    dog = Watchdog(fleet, LIMIT_S)
    dog.look()
    assert (engine.n_interrupted, fleet.abandoned, dog.healthy) == (1, [], False)
    clock(LIMIT_S / 8)
    engine.idle_s += LIMIT_S / 8
    dog.look()
    assert fleet.abandoned == [] and not dog.healthy  # it has a moment
    clock(LIMIT_S / 4)
    engine.idle_s += LIMIT_S / 4
    dog.look()
    assert fleet.abandoned == ["a"] and dog.n_abandoned == 1 and dog.healthy
    assert isinstance(engine.error, ClosedError) and "a prompt" in str(engine.error)
    assert as_api_error(engine.error).code == "engine_stopped"
    assert as_api_error(engine.error).status == 503


def test_one_that_comes_back_is_forgiven_but_not_at_once(clock: Callable[[float], None]) -> None:
    engine = FakeEngine(idle_s=LIMIT_S + 1)
    fleet = FakeFleet({"a": engine})
    dog = Watchdog(fleet, LIMIT_S)
    dog.look()
    clock(1.0)
    engine.idle_s = 0.5
    dog.look()
    assert dog.healthy and not fleet.abandoned
    clock(LIMIT_S)
    engine.idle_s = LIMIT_S + 0.4
    dog.look()  # computed again, it hangs again: stopping it would go on for ever
    assert fleet.abandoned == ["a"] and engine.n_interrupted == 1

    other = FakeEngine(idle_s=LIMIT_S + 1)
    fleet.engines["a"] = other
    dog.look()
    clock(1.0)
    other.idle_s = 0.0
    dog.look()
    clock(watchdog.FORGIVE * LIMIT_S)
    dog.look()
    other.idle_s = LIMIT_S + 1
    dog.look()
    assert other.n_interrupted == 2 and other.error is None


def test_an_engine_that_replaced_a_suspect_is_none(clock: Callable[[float], None]) -> None:
    fleet = FakeFleet({"a": FakeEngine(idle_s=LIMIT_S + 1)})
    dog = Watchdog(fleet, LIMIT_S)
    dog.look()
    fresh = FakeEngine()
    fleet.engines["a"] = fresh
    clock(LIMIT_S)
    dog.look()
    assert dog.healthy and not fleet.abandoned and not fresh.n_interrupted


def test_an_opening_is_given_up_that_two_looks_find_silent() -> None:
    red, blue = FakeOpening(LIMIT_S + 1), FakeOpening(LIMIT_S - 1)
    fleet = FakeFleet({}, openings={"red": red, "blue": blue})
    dog = Watchdog(fleet, LIMIT_S)
    dog.look()
    assert fleet.forsaken == []  # the whole process may have been stopped until now
    red.idle_s = 0.0
    dog.look()
    red.idle_s = LIMIT_S + 1
    dog.look()
    assert fleet.forsaken == []
    dog.look()
    (why,) = fleet.forsaken
    assert "'red'" in why and "61.0 s" in why and dog.n_forsaken == 1
    fleet.openings["red"] = FakeOpening(LIMIT_S + 1)  # another one
    dog.look()
    assert len(fleet.forsaken) == 1


def test_memory_that_keeps_a_model_away_is_unhealthy() -> None:
    fleet = FakeFleet({"a": FakeEngine(busy=False)}, cannot_open=("a",))
    assert not Watchdog(fleet, LIMIT_S).healthy


def test_a_hung_computation_fails_its_requests_and_the_model_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real engine whose device never returns, beside one that goes on answering."""
    hung = HungDevice(monkeypatch)
    files = make_files(tmp_path)
    models = [shelf_model(name, path) for name, path in files.items()]
    one = bytes_of(models[0])
    fleet = make_fleet(models, 3 * one)

    async def work() -> None:
        dog = Watchdog(fleet, 0.4)
        text = await ask(fleet, "red")
        beside = asyncio.create_task(dog.run())
        hung.hangs.set()
        asked = [asyncio.create_task(ask(fleet, "red")) for _ in range(3)]
        ends = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(each) for each in ends] == [ClosedError] * 3
        assert hung.n_hung == 1 and dog.n_abandoned == 1
        hung.hangs.clear()  # whoever hangs goes on hanging
        assert await ask(fleet, "red") == text
        assert fleet.snapshot()["lost_bytes"] == one and state(fleet, "red")["n_opened"] == 2
        assert fleet.snapshot()["used_bytes"] == 2 * one
        await ask(fleet, "green")
        await ask(fleet, "blue")  # one of the others must make room: the lost one cannot
        assert fleet.snapshot()["used_bytes"] == 3 * one and dog.healthy
        hung.go.set()
        await until(lambda: fleet.lost_bytes == 0)
        beside.cancel()

    try:
        go(work(), fleet)
    finally:
        hung.go.set()


def test_lost_memory_that_leaves_no_room_is_told_with_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung = HungDevice(monkeypatch)
    model = shelf_model("red", make_files(tmp_path)["red"])
    fleet = make_fleet([model], int(1.5 * bytes_of(model)))

    async def work() -> None:
        dog = Watchdog(fleet, 0.3)
        beside = asyncio.create_task(dog.run())
        await ask(fleet, "red")
        hung.hangs.set()
        with pytest.raises(ClosedError):
            await ask(fleet, "red")
        hung.hangs.clear()
        with pytest.raises(Exception, match="an engine that does not return holds") as caught:
            await ask(fleet, "red", wait_s=0.3)
        assert as_api_error(caught.value).status == 503
        assert fleet.cannot_open == ["red"] and not dog.healthy
        hung.go.set()
        await ask(fleet, "red")
        assert dog.healthy
        beside.cancel()

    try:
        go(work(), fleet)
    finally:
        hung.go.set()
