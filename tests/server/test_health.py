"""Health checks: what they cost, whom they disturb, and what they say when nothing answers."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from edgeroute import Runtime
from edgeroute.server import health
from edgeroute.server.health import Readiness
from edgeroute.server.records import ServerParams, Services
from tests.server.fleet_lab import (
    HungDevice,
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
from tests.server.lab import OneModel, serving


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return make_files(tmp_path)


def told(verdict: health.Verdict) -> tuple[int, dict[str, Any]]:
    response = verdict.response()
    return response.status_code, json.loads(bytes(response.body))


def test_over_http(tiny: Runtime) -> None:
    services = Services(params=ServerParams(), models=OneModel(tiny))
    with serving(services, health.routes(services)) as url:
        assert httpx2.get(url + "/health/live").json() == {"status": "live", "open": 1}
        ready = httpx2.get(url + "/health/ready")
        assert ready.status_code == 200 and ready.json()["model"] == "base"
        tiny.close()
        assert httpx2.get(url + "/health/live").status_code == 200


def test_a_check_is_shared_and_its_result_kept_for_a_moment(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = make_fleet([shelf_model("red", files["red"])])
    readiness = Readiness(fleet)

    async def work() -> None:
        asked = [asyncio.create_task(readiness.verdict()) for _ in range(20)]
        asked[0].cancel()  # who leaves takes nothing from the others
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert {each.why for each in found[1:] if isinstance(each, health.Verdict)} == {None}
        assert readiness.n_checked == 1
        await readiness.verdict()
        assert readiness.n_checked == 1
        monkeypatch.setattr(health, "KEPT_S", 0.0)
        await readiness.verdict()
        assert readiness.n_checked == 2
        assert states(fleet)["red"] == "open" and state(fleet, "red")["n_busy"] == 0

    go(work(), fleet)


def test_a_check_asks_a_model_that_is_open_and_pushes_none_out(files: dict[str, Path]) -> None:
    models = [shelf_model(name, path) for name, path in files.items()]
    fleet = make_fleet(models, bytes_of(models[0]))

    async def work() -> None:
        await ask(fleet, "green")
        status, body = told(await Readiness(fleet).verdict())
        assert (status, body["model"]) == (200, "green")
        assert states(fleet)["green"] == "open"

    go(work(), fleet)


def test_it_has_its_place_where_there_is_none_for_requests(files: dict[str, Path]) -> None:
    fleet = make_fleet([shelf_model("red", files["red"])], max_waiting=1)

    async def work() -> None:
        async with fleet.use("red", deadline=soon()):
            assert told(await Readiness(fleet).verdict())[0] == 200

    go(work(), fleet)


def test_a_model_that_cannot_be_opened_is_503_with_the_reason(files: dict[str, Path]) -> None:
    fleet = make_fleet([shelf_model("red", files["red"])])
    files["red"].write_bytes(b"GGUF")

    async def work() -> None:
        status, body = told(await Readiness(fleet).verdict())
        assert status == 503 and "'red' cannot be opened" in body["error"]["message"]

    go(work(), fleet)


def test_an_engine_that_stopped_is_503_once_and_opened_anew(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "KEPT_S", 0.0)
    fleet = make_fleet([shelf_model("red", files["red"])])
    readiness = Readiness(fleet)

    async def work() -> None:
        await fleet.load("red")
        runtime = fleet.peek("red")
        assert runtime is not None
        runtime.close()
        status, body = told(await readiness.verdict())
        assert status == 503 and "does not answer" in body["error"]["message"]
        assert told(await readiness.verdict())[0] == 200

    go(work(), fleet)


def test_an_engine_that_hangs_is_503_in_time(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hung = HungDevice(monkeypatch)
    fleet = make_fleet([shelf_model("red", files["red"])])

    async def work() -> None:
        await fleet.load("red")
        hung.hangs.set()
        running = asyncio.create_task(ask(fleet, "red"))
        await until(lambda: hung.n_hung == 1)
        monkeypatch.setattr(health, "READY_S", 0.2)
        status, body = told(await Readiness(fleet, limit_s=0.2).verdict())
        assert status == 503 and "wrote no token within 0.2 s" in body["error"]["message"]
        assert "its last sign of life" in body["error"]["message"]
        hung.go.set()
        await running

    try:
        go(work(), fleet)
    finally:
        hung.go.set()
