"""The fleet: models opened on demand under one budget, whatever comes when."""

import asyncio
import random
import threading
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest

from edgeroute import Runtime
from edgeroute.runtime.errors import CapacityError, ClosedError
from edgeroute.runtime.units import MIB
from edgeroute.server.errors import ApiError
from edgeroute.shelf_plan import ShelfModel
from edgeroute.tools.synth import make
from tests.edgeroute.layered_lab import plain_machine
from tests.server.fleet_lab import (
    GIB,
    NAMES,
    PROMPT,
    SlowOpening,
    ask,
    bytes_of,
    go,
    make_files,
    make_fleet,
    shelf_model,
    soon,
    state,
    states,
    until,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_files(tmp_path_factory.mktemp("fleet"))


@pytest.fixture
def models(files: dict[str, Path]) -> list[ShelfModel]:
    return [shelf_model(name, path) for name, path in files.items()]


@pytest.fixture
def one(models: list[ShelfModel]) -> int:
    return bytes_of(models[0])


async def refused(work: Awaitable[Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await work
    return caught.value


# on demand, under a budget


def test_models_are_opened_on_demand_and_evicted_by_bytes(
    models: list[ShelfModel], one: int
) -> None:
    fleet = make_fleet(models, 2 * one)

    async def work() -> None:
        assert set(states(fleet).values()) == {"closed"}
        for name in ("red", "green", "red", "blue"):
            await ask(fleet, name)
            assert fleet.snapshot()["used_bytes"] <= 2 * one
        assert states(fleet) == {"red": "open", "green": "closed", "blue": "open"}
        assert fleet.snapshot()["n_evicted"] == 1
        assert fleet.peek("green") is None and fleet.peek("red") is not None

    go(work(), fleet)


def test_the_default_model_is_also_base_and_others_are_404(models: list[ShelfModel]) -> None:
    fleet = make_fleet(models)

    async def work() -> None:
        assert fleet.names[0] == "red" and "base" not in fleet.names
        assert fleet.facts("base") == fleet.facts("red")
        async with fleet.use("base", deadline=soon()) as use:
            assert use.name == "red"
            assert fleet.facts("red").n_busy == 1
        error = await refused(ask(fleet, "rde"))
        assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
        assert "red, green, blue" in error.message

    go(work(), fleet)


def test_all_who_wait_for_a_model_share_its_opening(
    models: list[ShelfModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, slow = make_fleet(models), SlowOpening(monkeypatch)

    async def work() -> None:
        asked = [asyncio.create_task(ask(fleet, "red")) for _ in range(40)]
        await until(lambda: slow.n_begun == 1 and fleet.snapshot()["n_waiting"] == 40)
        assert threading.active_count() < 20
        slow.go.set()
        assert len(set(await asyncio.gather(*asked))) == 1
        assert (slow.n_begun, state(fleet, "red")["n_opened"]) == (1, 1)
        assert state(fleet, "red")["n_busy"] == fleet.snapshot()["n_requests"] == 0

    go(work(), fleet)


def test_a_busy_model_is_never_closed_and_who_cannot_wait_gets_numbers(
    models: list[ShelfModel], one: int
) -> None:
    fleet = make_fleet(models, one)

    async def work() -> None:
        async with fleet.use("red", deadline=soon()) as use:
            error = await refused(ask(fleet, "green", wait_s=0.05))
            assert (error.status, error.code) == (503, "no_room")
            assert error.retry_after_s and "MiB of the server's" in error.message
            assert "red" in error.message
            later = asyncio.create_task(ask(fleet, "green"))
            await until(lambda: fleet.snapshot()["n_waiting"] == 1)
            assert states(fleet)["red"] == "open"
            assert (await use.runtime.agenerate(PROMPT, max_tokens=2)).stats.n_generated
        await later
        assert states(fleet) == {"red": "closed", "green": "open", "blue": "closed"}

    go(work(), fleet)


def test_a_deadline_that_has_passed_is_an_answer_at_once(models: list[ShelfModel]) -> None:
    fleet = make_fleet(models)

    async def work() -> None:
        error = await refused(ask(fleet, "red", wait_s=-1.0))
        assert error.status == 503
        await ask(fleet, "red")

    go(work(), fleet)


def test_one_request_too_many_is_429_and_places_come_back(models: list[ShelfModel]) -> None:
    fleet = make_fleet(models, max_waiting=2)

    async def work() -> None:
        async with fleet.use("red", deadline=soon()), fleet.use("red", deadline=soon()):
            error = await refused(ask(fleet, "red"))
            assert (error.status, error.code) == (429, "too_many_requests")
            assert error.retry_after_s is not None
            async with fleet.use("red", deadline=soon(), counts=False) as glance:
                assert glance.runtime.adapters == []
        await ask(fleet, "red")
        assert fleet.snapshot()["n_requests"] == 0

    go(work(), fleet)


def test_a_pair_is_planned_and_opened_as_one(files: dict[str, Path]) -> None:
    alone = bytes_of(shelf_model("red", files["red"]))
    pair = shelf_model("red", files["red"], small=str(files["green"]), steps="random:0.5")
    both = bytes_of(pair)
    assert both > 1.5 * alone
    fleet = make_fleet([pair, shelf_model("blue", files["blue"])], both + alone - 1)

    async def work() -> None:
        await ask(fleet, "red")
        runtime = fleet.peek("red")
        assert runtime is not None and runtime.stats()["memory_bytes"] <= both  # type: ignore[operator]
        await ask(fleet, "blue")
        assert states(fleet) == {"red": "closed", "blue": "open"}
        await ask(fleet, "red")
        assert states(fleet) == {"red": "open", "blue": "closed"}

    go(work(), fleet)


def test_models_have_their_own_settings(files: dict[str, Path]) -> None:
    mine = [shelf_model("red", files["red"], n_ctx=128), shelf_model("green", files["green"])]
    fleet = make_fleet(mine)

    async def work() -> None:
        assert (fleet.facts("red").n_ctx, fleet.facts("green").n_ctx) == (128, 256)
        async with fleet.use("red", deadline=soon()) as use:
            assert use.runtime.params.n_ctx == 128

    go(work(), fleet)


# what never fits, or cannot be opened


def test_a_model_that_never_fits_is_400_with_numbers(
    models: list[ShelfModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_machine(monkeypatch)
    make("llama", tmp_path / "deep.gguf", n_layer=16)
    deep = shelf_model("deep", tmp_path / "deep.gguf", MIB)
    fleet = make_fleet([*models, deep])

    async def work() -> None:
        for _ in range(2):
            error = await refused(ask(fleet, "deep"))
            assert (error.status, error.code) == (400, "does_not_fit")
            assert "1 MiB of the server's 1 GiB, not even paged" in error.message
            assert error.retry_after_s is None
        assert "over the budget" in state(fleet, "deep")["failed"]
        assert fleet.snapshot()["used_bytes"] == 0
        await ask(fleet, "red")

    go(work(), fleet)


def test_a_model_that_wants_more_than_the_budget_is_refused_at_once(
    files: dict[str, Path],
) -> None:
    with pytest.raises(CapacityError, match=r"2 GiB, over the server's 1 GiB; lower models\.red"):
        make_fleet([shelf_model("red", files["red"], 2 * GIB)])


def test_a_model_that_cannot_be_opened_is_500_until_it_can(
    models: list[ShelfModel], tmp_path: Path
) -> None:
    content = models[0].path.read_bytes()
    (tmp_path / "bad.gguf").write_bytes(content)
    fleet = make_fleet([shelf_model("bad", tmp_path / "bad.gguf"), *models])
    (tmp_path / "bad.gguf").write_bytes(content[: len(content) // 2])

    async def work() -> None:
        errors = await asyncio.gather(*(refused(ask(fleet, "bad")) for _ in range(5)))
        assert {(error.status, error.code) for error in errors} == {(500, "model_not_opened")}
        assert state(fleet, "bad")["failed"] and state(fleet, "bad")["state"] == "closed"
        (tmp_path / "bad.gguf").write_bytes(content)
        await ask(fleet, "bad")
        assert state(fleet, "bad")["failed"] is None

    go(work(), fleet)


def test_an_engine_that_stopped_is_opened_anew(models: list[ShelfModel]) -> None:
    fleet = make_fleet(models)

    async def work() -> None:
        text = await ask(fleet, "red")
        runtime = fleet.peek("red")
        assert runtime is not None
        await asyncio.to_thread(runtime.close)
        with pytest.raises(ClosedError):
            await ask(fleet, "red")
        assert fleet.peek("red") is None
        assert await ask(fleet, "red") == text
        assert state(fleet, "red")["n_opened"] == 2

    go(work(), fleet)


# who leaves


def test_who_leaves_while_waiting_for_room_leaves_nothing_behind(
    models: list[ShelfModel], one: int
) -> None:
    fleet = make_fleet(models, one)

    async def work() -> None:
        async with fleet.use("red", deadline=soon()):
            waiting = [asyncio.create_task(ask(fleet, "green")) for _ in range(3)]
            await until(lambda: fleet.snapshot()["n_waiting"] == 3)
            for each in waiting:
                each.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await until(lambda: fleet._shelf.n_waiting == 0)
            assert fleet.snapshot()["n_requests"] == 1
            await ask(fleet, "red")  # nobody is in front any more
        assert states(fleet)["green"] == "closed"
        await ask(fleet, "green")

    go(work(), fleet)


def test_who_leaves_during_the_opening_leaves_an_idle_model(
    models: list[ShelfModel], monkeypatch: pytest.MonkeyPatch, one: int
) -> None:
    fleet, slow = make_fleet(models, one), SlowOpening(monkeypatch)

    async def work() -> None:
        leaving = asyncio.create_task(ask(fleet, "red"))
        await until(lambda: slow.n_begun == 1)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        error = await refused(ask(fleet, "red", wait_s=0.05))
        assert (error.status, error.code) == (503, "model_opening")
        error = await refused(fleet.unload("red"))
        assert error.status == 409 and "opening" in error.message
        slow.go.set()
        await until(lambda: states(fleet)["red"] == "open")
        await until(lambda: state(fleet, "red")["n_busy"] == 0)
        await ask(fleet, "green")  # which needs its room
        assert states(fleet)["red"] == "closed"

    go(work(), fleet)


def test_an_opening_that_one_waits_for_is_not_given_up_by_another(
    models: list[ShelfModel], one: int
) -> None:
    fleet = make_fleet(models, one)

    async def work() -> None:
        async with fleet.use("red", deadline=soon()):
            stays = asyncio.create_task(ask(fleet, "green"))
            await refused(ask(fleet, "green", wait_s=0.05))
        assert await stays is not None

    go(work(), fleet)


# unloading, and models that nobody uses


def test_unloading_is_refused_while_busy(models: list[ShelfModel]) -> None:
    fleet = make_fleet(models)

    async def work() -> None:
        await fleet.load("red")
        assert states(fleet)["red"] == "open"
        async with fleet.use("red", deadline=soon()):
            error = await refused(fleet.unload("red"))
            assert (error.status, error.code) == (409, "model_busy")
            assert "1 requests use it" in error.message
        for _ in range(2):
            await fleet.unload("red")
            assert states(fleet)["red"] == "closed"
        assert fleet.snapshot()["n_evicted"] == 0

    go(work(), fleet)


def test_a_model_unused_for_long_is_closed_and_glances_do_not_count(
    models: list[ShelfModel],
) -> None:
    fleet = make_fleet(models, idle_s=0.4)

    async def work() -> None:
        beside = asyncio.create_task(fleet.close_unused())
        async with fleet.use("red", deadline=soon()):
            await asyncio.sleep(0.8)
            assert states(fleet)["red"] == "open"  # it is used

        async def glance() -> None:
            async with fleet.use("red", deadline=soon(), counts=False):
                return

        def is_closed() -> bool:
            return states(fleet)["red"] == "closed"

        while not is_closed():
            await glance() if not is_closed() else None
            await asyncio.sleep(0.05)
        beside.cancel()

    go(work(), fleet)


# races


@pytest.mark.parametrize("room", [1, 2])
def test_a_storm_of_uses_loads_unloads_and_leavers(
    models: list[ShelfModel], one: int, room: int
) -> None:
    """Whatever comes when: answers are right, bytes within the budget, and nothing stays behind."""
    alone = {each.name: _alone(each) for each in models}
    fleet = make_fleet(models, room * one, max_waiting=64)
    over: list[int] = []

    def watch(stop: threading.Event) -> None:
        while not stop.wait(0.001):
            found = fleet.snapshot()
            over.append(found["used_bytes"] > room * one)
            for name in NAMES:
                fleet.facts(name)

    async def client(turn: int) -> None:
        dice = random.Random(turn)
        for _ in range(6):
            name, kind = dice.choice(NAMES), dice.random()
            if kind < 0.15:
                try:
                    await fleet.unload(name)
                except ApiError as error:
                    assert error.status == 409
            elif kind < 0.25:
                await fleet.load(name)
            elif kind < 0.45:  # leaves after a moment
                task = asyncio.create_task(ask(fleet, name, 40))
                await asyncio.sleep(dice.random() * 0.05)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            else:
                assert await ask(fleet, name, 6) == alone[name]

    async def work() -> None:
        await asyncio.gather(*(client(turn) for turn in range(24)))
        await until(lambda: fleet._shelf.n_waiting == 0)
        found = fleet.snapshot()
        assert found["n_requests"] == found["n_waiting"] == found["lost_bytes"] == 0
        await until(lambda: not any(each["n_busy"] for each in fleet.snapshot()["models"]))
        # A task leaves the set by a callback, a turn of the loop after its end.
        await until(lambda: not fleet._openings and not fleet._tasks)
        for name in NAMES:
            assert await ask(fleet, name, 6) == alone[name]

    stop = threading.Event()
    watcher = threading.Thread(target=watch, args=(stop,))
    watcher.start()
    try:
        go(work(), fleet)
    finally:
        stop.set()
        watcher.join()
    assert over and not any(over)


def _alone(model: ShelfModel) -> str:
    with Runtime(model.path, threads=1, n_ctx=256, n_ubatch=64) as runtime:
        return runtime.generate(PROMPT, max_tokens=6).text


def test_engines_die_while_others_answer(models: list[ShelfModel], one: int) -> None:
    """One model's end, again and again, is no end of another's answers."""
    fleet = make_fleet(models, 3 * one)

    async def kill(name: str) -> None:
        for _ in range(5):
            runtime = fleet.peek(name)
            if runtime is not None:
                await asyncio.to_thread(runtime.close)
            await asyncio.sleep(0.01)

    async def victim() -> int:
        n_failed = 0
        for _ in range(12):
            try:
                await ask(fleet, "green", 8)
            except ClosedError:
                n_failed += 1
        return n_failed

    async def work() -> None:
        calm = [asyncio.create_task(ask(fleet, "red", 60)) for _ in range(4)]
        found = await asyncio.gather(victim(), victim(), kill("green"), kill("green"))
        assert found[0] is not None and len(set(await asyncio.gather(*calm))) == 1
        assert state(fleet, "red")["n_opened"] == 1
        await ask(fleet, "green")

    go(work(), fleet)


def test_closing_while_models_open_and_answer_ends_all(
    models: list[ShelfModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = make_fleet(models)

    async def work() -> None:
        running = asyncio.create_task(ask(fleet, "red", 10_000))
        await until(lambda: state(fleet, "red")["n_busy"] == 1 and states(fleet)["red"] == "open")
        slow = SlowOpening(monkeypatch)
        opening = asyncio.create_task(ask(fleet, "green"))
        await until(lambda: slow.n_begun == 1)
        closing = asyncio.create_task(asyncio.to_thread(fleet.close, 20.0))
        await asyncio.sleep(0.05)
        slow.go.set()
        assert await closing
        ends = await asyncio.gather(running, opening, return_exceptions=True)
        assert all(isinstance(each, ClosedError | ApiError | str) for each in ends), ends
        error = await refused(ask(fleet, "blue"))
        assert (error.status, error.code) == (503, "shutting_down")
        assert set(states(fleet).values()) == {"closed"}

    go(work())


def test_an_opening_that_hangs_takes_one_thread_however_many_come_and_leave(
    models: list[ShelfModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else those who come and leave would use up the threads that others are opened in."""
    fleet = make_fleet(models)

    async def work() -> None:
        await ask(fleet, "green")
        slow = SlowOpening(monkeypatch)
        for _ in range(30):
            error = await refused(ask(fleet, "red", wait_s=0.01))
            assert error.code == "model_opening"
        assert slow.n_begun == 1 and len(fleet._tasks) == 1
        assert await ask(fleet, "green") is not None
        await fleet.unload("green")
        slow.go.set()
        assert await ask(fleet, "red") is not None
        await until(lambda: state(fleet, "red")["n_busy"] == 0)

    go(work(), fleet)


def test_who_comes_when_the_last_one_leaves_still_gets_the_model(
    models: list[ShelfModel], one: int
) -> None:
    fleet = make_fleet(models, one)

    async def work() -> None:
        for turn in range(30):
            async with fleet.use("red", deadline=soon()):
                first = asyncio.create_task(ask(fleet, "green"))
                await until(lambda: fleet._shelf.n_waiting == 1)
                first.cancel()
                if turn % 3:  # so that the thread may have noticed, or not
                    await asyncio.sleep(0.0005 * (turn % 3))
                second = asyncio.create_task(ask(fleet, "green", 1))
                await asyncio.sleep(0)
            await second

    go(work(), fleet)


def test_cells_for_several_long_requests_where_they_are_cheap(files: dict[str, Path]) -> None:
    """A chat without max_tokens reserves the whole context: the next must not wait for it."""
    plain = shelf_model("red", files["red"], n_kv=None)
    given = shelf_model("red", files["red"], n_kv=512)
    tight = shelf_model("red", files["red"], memory=bytes_of(plain), n_kv=None)
    for model, n_cells in ((plain, 4 * 256), (given, 512), (tight, 256)):
        fleet = make_fleet([model])
        fleet.load_now("red")
        runtime = fleet.peek("red")
        assert runtime is not None and runtime.stats()["kv_cells"] == n_cells
        assert fleet.close(20.0)
