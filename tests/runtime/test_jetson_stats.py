"""Watts and power modes by jetson-stats, with a stand-in for its module."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from edgeroute.runtime import board as boards
from edgeroute.runtime import jetson_stats
from edgeroute.runtime.board_files import Tree
from edgeroute.runtime.jetson_stats import open_jetson_stats, power_mode

ORIN = {"rail": {"VDD_SOC": {"power": 1400}}, "tot": {"power": 5200, "name": "VDD_IN"}}


class JtopException(Exception):
    """As the module's own."""


class Client:
    """As its class jtop: what the service last said, in memory."""

    def __init__(self, power: Any, mode: Any = "15W", error: Exception | None = None) -> None:
        self.power, self.nvpmodel = power, SimpleNamespace(name=mode)
        self.error, self.lost = error, None
        self.running = False

    def start(self) -> None:
        if self.error is not None:
            raise self.error
        self.running = True

    def ok(self, spin: bool = False) -> bool:
        assert spin, "a sampler must not wait"
        if self.lost is not None:
            raise self.lost
        return self.running

    def close(self) -> None:
        self.running = False


def module(client: Client) -> Any:
    return SimpleNamespace(jtop=lambda: client, JtopException=JtopException)


def test_watts_are_summed_up_and_the_connection_ends() -> None:
    client = Client(ORIN)
    counter = open_jetson_stats(module(client))
    assert counter is not None and (counter.source, counter.estimated) == ("jetson", False)
    first = counter.joules()
    time.sleep(0.02)
    second = counter.joules()
    assert first is not None and second is not None
    assert second - first >= 0.02 * 5.2 * 0.99
    counter.close()
    counter.close()
    assert not client.running
    assert not any(each.name == "edgeroute-energy" for each in threading.enumerate())


def test_a_service_that_is_lost_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jetson_stats, "_PERIOD_S", 0.005)
    client = Client(ORIN)
    counter = open_jetson_stats(module(client))
    assert counter is not None
    client.lost = EOFError()
    end = time.monotonic() + 5
    while counter.joules() is not None:
        assert time.monotonic() < end
        time.sleep(0.002)
    counter.close()


@pytest.mark.parametrize("power", [
    None, {}, {"tot": {}}, {"tot": None}, {"tot": {"power": "5"}}, {"tot": {"power": True}},
    {"tot": {"power": float("nan")}}, [5200],
])  # fmt: skip
def test_what_is_no_figure_is_none(power: Any) -> None:
    client = Client(power)
    assert open_jetson_stats(module(client)) is None
    assert not client.running


@pytest.mark.parametrize("error", [JtopException("not active"), PermissionError("socket")])
def test_without_the_service_there_is_nothing(error: Exception) -> None:
    assert open_jetson_stats(module(Client(ORIN, error=error))) is None
    assert power_mode(module(Client(ORIN, error=error))) is None


def test_without_the_module_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jetson_stats, "_MODULE", "no_such_module_as_this")
    assert open_jetson_stats() is None and power_mode() is None


@pytest.mark.parametrize(("said", "mode"), [
    ("MAXN_SUPER", "MAXN_SUPER"), ("25W\n\x1b[31m", "25W"), (None, None), ("", None),
])  # fmt: skip
def test_the_power_mode_is_a_line(said: Any, mode: str | None) -> None:
    client = Client(ORIN, said)
    assert power_mode(module(client)) == mode and not client.running


def test_it_is_asked_last(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jetson_stats, "power_mode", lambda: "15W")
    said = "NV Power Mode: MAXN\n0\n"
    monkeypatch.setattr(boards, "run_command", lambda command: said)
    tree = Tree(tmp_path)
    assert boards._nvpmodel(tree, boards.run_command, {}) == "MAXN"
    said = ""
    assert boards._nvpmodel(tree, boards.run_command, {}) == "15W"
    assert boards._nvpmodel(tree, lambda command: "", {}) is None  # a recorded tree
