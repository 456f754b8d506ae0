"""What a server and the command line say of a device that is lost."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from click.testing import CliRunner

from edgeroute import recovery
from edgeroute.cli import cli
from edgeroute.runtime.errors import DeviceLostError
from edgeroute.server import health
from edgeroute.server.errors import ApiError
from edgeroute.server.metrics_engine import Kept
from edgeroute.server.records import ServerParams
from edgeroute.server.serve import Built, Server, build, listen, urls
from tests.device.loss_lab import FAR, WHY, Far, far, in_background, nowhere_else, until
from tests.server.api_lab import CHAT, HELLO
from tests.server.fleet_lab import go, make_fleet, shelf_model

__all__ = ["far", "nowhere_else"]

WATCHDOG_S = 0.1
LONG = HELLO | {"max_tokens": 100, "temperature": 1.0, "seed": 5}


@dataclass
class Served:
    """A server with one model that is far away."""

    client: httpx2.Client
    built: Built
    server: Server

    def chat(self, body: dict[str, Any] = LONG) -> httpx2.Response:
        return self.client.post(CHAT, json=body)

    def metric(self, name: str) -> float:
        """Sum of a metric's samples."""
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(each.split()[-1]) for each in lines if each.startswith(name + "{"))


@pytest.fixture
def served(tiny_path: Path, far: Far, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(recovery, "AGAIN_S", 0.0)
    monkeypatch.setattr(health, "KEPT_S", 0.0)
    params = ServerParams(memory=1 << 30, watchdog_s=WATCHDOG_S)
    model = shelf_model("base", tiny_path, n_kv=2048, device=FAR, repack_experts=False)
    built = build(params, [model])
    sockets, ready = listen("127.0.0.1", 0), threading.Event()
    server = Server(built, ready.set)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve_with_care(sockets)))
    thread.start()
    try:
        assert ready.wait(60)
        with httpx2.Client(base_url=urls(sockets)[0], timeout=60.0) as client:
            found = Served(client, built, server)
            answer = found.chat(HELLO | {"max_tokens": 1})
            assert answer.status_code == 200, answer.text
            yield found
    finally:
        server.should_exit = True
        thread.join(60)
        assert built.fleet.close(20)


def test_unavailable_until_it_is_back(served: Served, far: Far, nowhere_else: None) -> None:
    wanted = served.chat().json()["choices"][0]["message"]["content"]
    runtime = served.built.fleet.peek("base")
    far.cut_after(20, down=True)
    failed = served.chat()
    assert failed.status_code == 503 and int(failed.headers["Retry-After"]) >= 1
    error = failed.json()["error"]
    assert error["code"] == "device_lost" and FAR in error["message"] and WHY in error["message"]
    ready = served.client.get("/health/ready")
    assert ready.status_code == 503 and FAR in ready.json()["error"]["message"]
    assert served.client.get("/health/live").status_code == 200
    assert served.metric("edgeroute_device_losses_total") == 1
    assert served.metric("edgeroute_model_down") == 1
    with served.client.stream("POST", CHAT, json=LONG | {"stream": True}) as answer:
        assert "device_lost" in "".join(answer.iter_text())

    far.down = None
    again = served.chat()
    assert again.json()["choices"][0]["message"]["content"] == wanted
    assert served.client.get("/health/ready").status_code == 200
    assert served.metric("edgeroute_model_down") == 0
    assert served.metric("edgeroute_device_reopenings_total") == 1
    assert served.metric("edgeroute_device_loss_requests_total") >= 3
    assert served.built.fleet.peek("base") is runtime


def test_opening_again_is_no_stall(
    served: Served, far: Far, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it takes: the watchdog waits, and the answer goes on."""
    wanted = served.chat().json()["choices"][0]["message"]["content"]
    monkeypatch.setattr(recovery, "RECONNECT_S", 60.0)
    far.cut_after(20, down=True)
    thread, told = in_background(served.chat)
    until(lambda: far.n_tries > 3)
    time.sleep(3 * WATCHDOG_S)
    found: Any = served.built.fleet.peek("base")
    assert found.pulse().doing == "opening the model again"
    far.down = None
    thread.join(60)
    assert told[0].json()["choices"][0]["message"]["content"][:8] == wanted[:8]
    dog = served.server._watchdog
    assert dog.n_stopped == dog.n_abandoned == 0
    assert served.metric("edgeroute_device_loss_requests_total") == 1


def test_a_model_whose_device_is_not_there(tiny_path: Path, far: Far) -> None:
    far.down = "refused"
    fleet = make_fleet([shelf_model("base", tiny_path, device=FAR)])
    with pytest.raises(DeviceLostError, match=FAR):
        fleet.load_now("base")
    with pytest.raises(ApiError, match=FAR) as caught:
        go(fleet.load("base"), fleet)
    told = caught.value
    assert told.status == 503 and told.code == "device_lost" and told.retry_after_s


def test_counters_go_on_where_an_engine_begins_anew() -> None:
    """Those that it begins anew are added up; those that it goes on with are not added twice."""
    kept, runtime = Kept(), type("Runtime", (), {"__slots__": ("__weakref__",)})()
    hits, losses = ("hits", ()), ("losses", ())
    kept.take(runtime, {hits: 10.0})
    kept.take(runtime, {hits: 4.0, losses: 1.0}, 1)
    kept.take(runtime, {hits: 6.0, losses: 1.0}, 1)
    assert kept.totals() == {hits: 16.0, losses: 1.0}
    kept.take(runtime, {hits: 1.0, losses: 2.0}, 2)
    assert kept.totals() == {hits: 17.0, losses: 2.0}


@pytest.mark.parametrize("down", [False, True])
def test_the_command_line_says_it(down: bool, tiny_path: Path, far: Far) -> None:
    asked = ["generate", "-m", str(tiny_path), "--raw", "Once", "--device", FAR, "-n", "40",
             "--threads", "1", "--memory", "512MiB", "--n-ctx", "256"]  # fmt: skip
    far.cut_after(3, down=down)
    found = CliRunner().invoke(cli, asked)
    assert found.exit_code == 0, found.output
    (line,) = [each for each in found.stderr.splitlines() if "was opened again" in each]
    assert line.startswith(f"warning: device {FAR} is gone: {WHY}; the model was opened again")
    assert ("device cpu, which may be slower" in line) == down
    far.cut_after(3, down=down)
    found = CliRunner().invoke(cli, [*asked, "--json"])
    if not down:  # else nobody answers there at all
        assert json.loads(found.stdout.splitlines()[-1])["stats"]["continued"]
    else:
        assert found.exit_code == 1 and f"device {FAR} does not answer" in found.stderr
