"""Openings that hang: how they are told from slow ones, given up, and what others see of it."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgeroute import pulse
from edgeroute.pulse import BUSY_SHARE, OpeningPulse, opens_in
from edgeroute.server import openings
from edgeroute.server.errors import ApiError
from edgeroute.server.health import Readiness
from edgeroute.server.watchdog import Watchdog
from edgeroute.shelf_plan import ShelfModel
from tests.server.fleet_lab import (
    HungDisk,
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


@pytest.fixture
def models(tmp_path: Path) -> list[ShelfModel]:
    return [shelf_model(name, path) for name, path in make_files(tmp_path).items()]


@pytest.fixture
def advance(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the clock that openings are judged by; it stands otherwise."""
    now = [1000.0]

    def later(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(pulse, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return later


@contextlib.contextmanager
def working(step: Callable[[], None], *, apart: bool = False) -> Iterator[tuple[OpeningPulse, Any]]:
    """An opening that does one step for each call of what is given, in a thread of its own."""
    found, turn, done = OpeningPulse(), threading.Semaphore(0), threading.Semaphore(0)
    ending = threading.Event()

    def steps() -> None:
        while turn.acquire() and not ending.is_set():
            step()
            done.release()

    def opening() -> None:
        with found.here():
            if not apart:
                steps()
                return
            engine = threading.Thread(target=steps)
            engine.start()
            opens_in(engine)
            done.release()
            engine.join()

    def one() -> None:
        turn.release()
        assert done.acquire(timeout=30)

    thread = threading.Thread(target=opening)
    thread.start()
    if apart:
        assert done.acquire(timeout=30)
    try:
        one()
        yield found, one
    finally:
        ending.set()
        turn.release()
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("apart", [False, True])
def test_bytes_read_are_progress_and_time_alone_is_none(
    tmp_path: Path, advance: Callable[[float], None], apart: bool
) -> None:
    """Whether the thread that asks reads, or the engine thread that it waits for."""
    path = tmp_path / "weights"
    path.write_bytes(bytes(1 << 16))
    with working(lambda: bool(path.read_bytes()) and None, apart=apart) as (found, one):
        found.read()
        for _ in range(5):
            advance(0.9 * LIMIT_S)
            one()
            assert found.read().idle_s == 0.0
        advance(LIMIT_S)
        assert found.read().idle_s == LIMIT_S
        advance(1.0)
        assert found.read().idle_s == LIMIT_S + 1.0
        one()
        assert found.read().idle_s == 0.0


def test_computing_is_progress_and_looking_again_and_again_is_none(
    advance: Callable[[float], None],
) -> None:
    nothing = threading.Event()
    with working(lambda: nothing.wait(0.001) and None) as (found, one):
        found.read()
        advance(LIMIT_S)
        for _ in range(20):
            one()
        assert found.read().idle_s == LIMIT_S
    with working(lambda: sum(range(200_000)) and None) as (found, one):
        found.read()
        advance(0.001 / BUSY_SHARE)
        one()
        assert found.read().idle_s == 0.0


def test_where_threads_are_not_counted_the_process_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, advance: Callable[[float], None]
) -> None:
    monkeypatch.setattr(pulse, "_THREADS", tmp_path / "none")
    with working(lambda: sum(range(3_000_000)) and None) as (found, one):
        found.read()
        advance(0.1)
        one()
        assert found.read().idle_s == 0.0


def test_an_opening_that_hangs_fails_its_requests_and_others_go_on(
    models: list[ShelfModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = bytes_of(models[0])
    fleet = make_fleet(models, 3 * one, watchdog_s=0.3)
    disk = HungDisk(monkeypatch, "red")

    async def work() -> None:
        dog = Watchdog(fleet, 0.3)
        beside = asyncio.create_task(dog.run())
        asked = [asyncio.create_task(ask(fleet, "red")) for _ in range(3)]
        await until(lambda: disk.n_begun == 1)
        text = await ask(fleet, "green")
        for error in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(error, ApiError) and error.status == 503
            assert error.code == "model_hangs" and error.response().headers["retry-after"] == "1"
            assert "read and computed nothing for" in error.message and "try again" in error.message
        assert disk.n_begun == 1 and dog.n_forsaken == 1
        told = state(fleet, "red")
        assert (told["state"], told["n_busy"], told["n_opened"]) == ("closed", 0, 0)
        assert "given up" in told["failed"] and fleet.facts("red").failed == told["failed"]
        assert fleet.snapshot()["lost_bytes"] == one and fleet.snapshot()["n_hung"] == 1
        assert fleet.snapshot()["used_bytes"] == 2 * one
        verdict = await Readiness(fleet).verdict()
        assert verdict.model == "green" and verdict.failed == {"red": told["failed"]}

        disk.hangs.clear()  # the disk is there again; whoever hangs goes on hanging
        assert await ask(fleet, "red")
        assert fleet.facts("red").failed is None and fleet.snapshot()["lost_bytes"] == one
        assert await ask(fleet, "green") == text
        disk.go.set()
        await until(lambda: fleet.lost_bytes == 0)
        assert state(fleet, "red")["n_opened"] == 1 and fleet.snapshot()["n_hung"] == 0
        await fleet.unload("red")
        assert await ask(fleet, "red")
        beside.cancel()

    try:
        go(work(), fleet)
    finally:
        disk.go.set()


def test_a_late_opening_that_fails_leaves_the_next_one_alone(
    models: list[ShelfModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = make_fleet(models[:1])
    disk = HungDisk(monkeypatch, "red")

    async def work() -> None:
        dog = Watchdog(fleet, 0.2)
        beside = asyncio.create_task(dog.run())
        with pytest.raises(ApiError, match="given up"):
            await ask(fleet, "red")
        disk.hangs.clear()
        assert await ask(fleet, "red")
        path, kept = models[0].path, models[0].path.with_suffix(".kept")
        path.rename(kept)
        disk.go.set()
        await until(lambda: fleet.lost_bytes == 0)
        told = state(fleet, "red")
        assert (told["state"], told["failed"], told["n_busy"]) == ("open", None, 0)
        assert await ask(fleet, "red")
        beside.cancel()

    try:
        go(work(), fleet)
    finally:
        disk.go.set()


def test_so_many_openings_of_a_model_hang_and_no_more(
    models: list[ShelfModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = make_fleet(models[:1])
    disk = HungDisk(monkeypatch, "red")

    async def work() -> None:
        beside = asyncio.create_task(Watchdog(fleet, 0.1).run())
        for _ in range(openings.MAX_HUNG):
            with pytest.raises(ApiError, match="read and computed nothing"):
                await ask(fleet, "red")
        for _ in range(3):
            with pytest.raises(ApiError, match="hung 3 times") as caught:
                await ask(fleet, "red")
            assert caught.value.status == 503 and caught.value.retry_after_s
        assert disk.n_begun == openings.MAX_HUNG
        disk.go.set()
        await until(lambda: fleet.lost_bytes == 0)
        assert await ask(fleet, "red")
        beside.cancel()

    try:
        go(work(), fleet)
    finally:
        disk.go.set()


def test_who_waits_for_what_is_lost_holds_nobody_up(
    models: list[ShelfModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget has room for two: red's part is lost, and a second red would need a third."""
    one = bytes_of(models[0])
    large = shelf_model("red", models[0].path, n_ctx=512)
    budget = bytes_of(large) + one
    fleet = make_fleet([large, *models[1:]], budget)
    disk = HungDisk(monkeypatch, "red")

    async def work() -> None:
        beside = asyncio.create_task(Watchdog(fleet, 0.2).run())
        with pytest.raises(ApiError, match="given up"):
            await ask(fleet, "red")
        assert fleet.cannot_open == ["red"]
        waiting = asyncio.create_task(ask(fleet, "red"))
        await until(lambda: fleet._shelf.n_waiting == 1)
        for name in ("green", "blue", "green"):
            assert await ask(fleet, name)
        assert not waiting.done()
        disk.hangs.clear()
        disk.go.set()
        assert await waiting
        beside.cancel()

    try:
        go(work(), fleet)
    finally:
        disk.go.set()
